"""SlotBatch: continuous batching. Requests join and leave between single decode steps.

It lives in the engine's thread and knows nothing of asyncio or of how weights arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rl_lightning.engines.engine import EngineError
from rl_lightning.engines.sampling import sample
from rl_lightning.engines.slot_decoder import PREFILL_TOKENS, Piece, SlotDecoder
from rl_lightning.engines.slot_rows import SlotRows
from rl_lightning.types import Completion, GenerationRequest

FINISH_TOKENS = 64
"""Answers that have at most so many tokens to go may end before weights are replaced."""

Detokenise = Callable[[list[list[int]]], list[str]]


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request that is not answered yet.

    Attributes:
        request: what was asked.
        limit: most tokens of its answer; `max_new_tokens`, or less where the model's context ends.
        reply: called once, in the engine's thread, with the completion or with the error.
        cancelled: set by anyone; the batch drops it before its next step.
        tokens: (n,) int32, the answer so far; kept here only while the request is in no slot.
        logprobs: (n,) float32, likewise.
        versions: (n,) int32, likewise.
    """

    request: GenerationRequest
    limit: int
    reply: Callable[[Completion | EngineError], None]
    cancelled: bool = False
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    versions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def prompt(self) -> tuple[int, ...]:
        """The prompt's token ids."""
        return self.request.prompt_ids

    @property
    def fresh(self) -> bool:
        """Whether it joins with an empty answer."""
        return not len(self.tokens)

    def context(self, start: int) -> np.ndarray:
        """Prompt and answer from position `start` on, int64."""
        answer = self.tokens[max(0, start - len(self.prompt)) :]
        return np.concatenate([np.array(self.prompt[start:], np.int64), answer.astype(np.int64)])


class SlotBatch:
    """Waiting and running requests over one decoder. Running ones sit in the first slots, without gaps.

    Args:
        decoder: the model and its cache.
        stop_ids: tokens that end any answer.
        detokenise: token id lists to texts, for `stop` texts.
    """

    def __init__(self, decoder: SlotDecoder, stop_ids: Sequence[int], detokenise: Detokenise) -> None:
        self._decoder, self._stop_ids, self._detokenise = decoder, tuple(stop_ids), detokenise
        self._rows = SlotRows(decoder.cache.max_slots)
        self.version = 0
        self.prefilled_tokens = 0
        self.waiting: deque[OpenRequest] = deque()
        self.running: list[OpenRequest] = []

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self.waiting or self.running)

    def add(self, request: OpenRequest) -> None:
        """Queues a request behind the others."""
        self.waiting.append(request)

    def step(self) -> None:
        """Admits what fits and gives every running request one more token.

        Raises:
            EngineError: the model returned something that is not a number.
        """
        self._drop_cancelled()
        self._make_room()
        self.admit()
        if self.running:
            self._decode()

    def finish_short(self) -> None:
        """Lets running answers end, and nobody join, while that is less work than computing their contexts again would be.

        New weights that wait for it are as late as `FINISH_TOKENS` tokens at most.

        Raises:
            EngineError: the model returned something that is not a number.
        """
        self._drop_cancelled()
        while self._end_soon():
            self._decode()
            self._drop_cancelled()

    def _end_soon(self) -> bool:
        n = len(self.running)
        left = int((self._rows.limit[:n] - self._rows.count[:n]).max(initial=0))
        held = int(self._rows.length[:n].sum())
        return 0 < left <= FINISH_TOKENS and n * left <= held and self._decoder.cache.fits(n, self._longest() + 1)

    def _decode(self) -> None:
        n = len(self.running)
        logits = self._decoder.decode(self._rows.last_tokens(n), self._rows.length[:n])
        self._rows.length[:n] += 1
        self._sample(slice(0, n), logits)

    def _longest(self) -> int:
        return int(self._rows.length[: len(self.running)].max(initial=0))

    def interrupt(self) -> None:
        """Takes every running request out of its slot and queues it before the others; nothing cached is used again."""
        self._suspend(len(self.running))

    def fail(self, error: EngineError) -> None:
        """Ends every request with `error`."""
        self.interrupt()
        while self.waiting:
            self.waiting.popleft().reply(error)

    # -- joining

    def admit(self) -> None:
        """Moves waiting requests into free slots, fills their part of the cache and samples their next token.

        No more of them than one prefill pass takes, so that running ones and weight updates do not wait long.
        """
        first = len(self.running)
        longest = self._longest() + 1
        prompts: set[tuple[int, ...]] = set()
        tokens = 0
        while self.waiting and tokens < PREFILL_TOKENS:
            request = self.waiting[0]
            longest = max(longest, len(request.prompt) + len(request.tokens) + 1)
            if not self._decoder.cache.fits(len(self.running) + 1, longest):
                break
            self.waiting.popleft()
            if not request.cancelled:
                tokens += len(request.tokens) + (len(request.prompt) if request.prompt not in prompts else 0)
                prompts.add(request.prompt)
                self._seat(request)
        if len(self.running) > first:
            rows = range(first, len(self.running))
            self._decoder.cache.reserve(len(self.running), self._longest() + 1)
            self._sample(slice(first, len(self.running)), self._fill(rows))

    def _seat(self, request: OpenRequest) -> None:
        row, stops = len(self.running), (*self._stop_ids, *request.request.params.stop_token_ids)
        self._rows.seat(row, request.request, request.limit, stops)
        self._rows.resume(row, request.tokens, request.logprobs, request.versions)
        self.running.append(request)

    def _fill(self, new: range) -> Tensor:
        """Computes the cache of the rows `new`, each distinct prompt once; returns their (m, V) logits.

        The first row with a prompt leads: it is computed whole.  The others take the prompt's keys and values from it,
        and its logits too where neither has an answer yet.
        """
        leaders = {request.prompt: row for row, request in enumerate(self.running[: new.start])}
        leader = {row: leaders.setdefault(self.running[row].prompt, row) for row in new}
        logits = self._prefill({row: 0 for row in new if leader[row] == row})
        followers = [row for row in new if leader[row] != row]
        self._copy_prompts({row: leader[row] for row in followers})
        twins = {row for row in followers if leader[row] in logits and self._fresh(row) and self._fresh(leader[row])}
        rest = {row: len(self.running[row].prompt) - self._fresh(row) for row in followers if row not in twins}
        logits.update(self._prefill(rest))
        return torch.stack([logits[leader[row] if row in twins else row] for row in new])

    def _fresh(self, row: int) -> bool:
        return self.running[row].fresh

    def _prefill(self, starts: dict[int, int]) -> dict[int, Tensor]:
        """Computes rows from their start position on; (V,) logits after the last token of each."""
        pieces = [Piece(row, start, self.running[row].context(start)) for row, start in starts.items()]
        self.prefilled_tokens += sum(len(piece.tokens) for piece in pieces)
        return self._decoder.prefill(pieces)

    def _copy_prompts(self, sources: dict[int, int]) -> None:
        by_length: dict[int, list[int]] = {}
        for row in sources:
            by_length.setdefault(len(self.running[row].prompt), []).append(row)
        for length, rows in by_length.items():
            self._decoder.cache.copy(np.array([sources[row] for row in rows]), np.array(rows), length)

    # -- one token

    def _sample(self, span: slice, logits: Tensor) -> None:
        """Draws a token from each row of `logits` for the rows of `span`; finished requests leave."""
        tokens, logprobs = (t.cpu().numpy() for t in sample(logits, self._rows.sampling(span)))
        stopped = self._rows.append(span, tokens, logprobs, self.version)
        texts = [row for row in np.flatnonzero(self._rows.has_text[span]) if not stopped[row]]
        if texts:
            stopped[texts] = self._end_in_stop_text([span.start + row for row in texts])
        stopped &= self._rows.count[span] >= self._rows.minimum[span]
        finished = np.flatnonzero(stopped | (self._rows.count[span] >= self._rows.limit[span]))
        for i in finished:
            self._reply(span.start + int(i), stopped=bool(stopped[i]))
        self._leave(span.start + finished)

    def _end_in_stop_text(self, rows: list[int]) -> list[bool]:
        """Whether each row's newest token completes one of its `stop` texts. Every token is at least a byte long."""
        stops = [self.running[row].request.params.stop for row in rows]
        longest = [max(len(text.encode()) for text in texts) + 1 for texts in stops]
        ends = self._rows.count[rows]
        tails = [self._rows.tokens[row, max(0, end - n) : end] for row, end, n in zip(rows, ends, longest, strict=True)]
        decoded = self._detokenise([tail.tolist() for tail in tails])
        found = [any(text in tail for text in texts) for texts, tail in zip(stops, decoded, strict=True)]
        for i in np.flatnonzero(found):  # a text that came before `min_new_tokens` may still be in sight
            (before,) = self._detokenise([tails[i][:-1].tolist()])
            found[i] = any(decoded[i].count(text) > before.count(text) for text in stops[i])
        return found

    def _reply(self, row: int, *, stopped: bool) -> None:
        tokens, logprobs, versions = self._rows.answer(row)
        if not np.isfinite(logprobs).all():
            raise EngineError(f"the model's logits are not finite under version {self.version}")
        self.running[row].reply(Completion(tokens, logprobs, versions, "stop" if stopped else "length"))

    # -- leaving

    def _drop_cancelled(self) -> None:
        self._leave(np.array([row for row, request in enumerate(self.running) if request.cancelled], np.int64))

    def _leave(self, rows: np.ndarray) -> None:
        """Frees `rows` (m,) and closes the gaps with the last running ones."""
        if not len(rows):
            return
        n = len(self.running) - len(rows)
        stay = np.ones(len(self.running), bool)
        stay[rows] = False
        holes, last = np.flatnonzero(~stay[:n]), n + np.flatnonzero(stay[n:])
        if len(holes):
            self._decoder.cache.copy(last, holes, int(self._rows.length[last].max()))
            self._rows.move(last, holes)
            for source, target in zip(last, holes, strict=True):
                self.running[target] = self.running[source]
        del self.running[n:]

    def _make_room(self) -> None:
        """Sends requests from the last slots back to the queue while the next tokens of all would not fit."""
        n = len(self.running)
        while n > 1 and not self._decoder.cache.fits(n, int(self._rows.length[:n].max()) + 1):
            n -= 1
        self._suspend(len(self.running) - n)

    def _suspend(self, n: int) -> None:
        """Moves the last `n` running requests, with their answers, to the front of the queue."""
        for row in reversed(range(len(self.running) - n, len(self.running))):
            request = self.running.pop()
            request.tokens, request.logprobs, request.versions = self._rows.answer(row)
            self.waiting.appendleft(request)
