"""Answer: one request's tokens while segments of them come in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rl_lightning.types import Completion, FinishReason, GenerationRequest

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What an engine returned for one stretch of an answer.

    Attributes:
        token_ids: (n,) int32, ending with the one that stopped it.
        logprobs: (n,) float32, one each.
        reason: why the stretch ended; `interrupt` where the engine was told to end it.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    reason: Literal["stop", "length", "interrupt"]


class Answer:
    """Adds segments up to one Completion, such as no interruption ever happened.

    The engine sees each segment as a request of its own.  So what has to hold for all segments together is kept here: the
    limits on the count of tokens, and stop texts that begin in one segment and end in the next.

    Args:
        request: what is answered.
        decode: needed only where the request has stop texts.
    """

    def __init__(self, request: GenerationRequest, decode: Decode | None = None) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self._decode = decode
        self._segments: list[Segment] = []
        self._versions: list[np.ndarray] = []
        self._length = 0
        self._stop_pending = False

    @property
    def context(self) -> np.ndarray:
        """(m,) int32: the prompt and the tokens so far."""
        return np.concatenate([np.asarray(self.request.prompt_ids, np.int32), *(s.token_ids for s in self._segments)])

    def next_limits(self, chunk: int | None = None) -> tuple[int, int]:
        """(most, fewest) new tokens of the next segment, which is to be at most `chunk` long."""
        params, done = self.request.params, self._length
        most = params.max_new_tokens - done
        if self._stop_pending:
            most = 1
        elif chunk is not None:
            most = min(most, chunk)
        return most, min(most, max(0, params.min_new_tokens - done))

    def add(self, segment: Segment, versions: np.ndarray, asked: int) -> None:
        """Appends `segment`, asked for with a limit of `asked` tokens, and decides whether the answer is finished.

        Args:
            segment: of n tokens.
            versions: (n,) int32, of the weights that sampled each of them.
            asked: the limit.
        """
        resumed = self._length > 0
        self._segments.append(segment)
        self._versions.append(versions)
        self._length += len(segment.token_ids)
        params, done = self.request.params, self._length
        ended = segment.reason == "stop" or (resumed and self._ends_in_stop_text())
        if ended and done >= params.min_new_tokens:
            self.finish_reason = "stop"
        elif done >= params.max_new_tokens or (segment.reason == "length" and len(segment.token_ids) < asked):
            self.finish_reason = "length"  # the second case: the context is full
        else:
            self._stop_pending = self._may_be_inside_stop_text()

    def cut_short(self) -> None:
        """The context is full: the answer ends here."""
        self.finish_reason = "length"

    def completion(self) -> Completion:
        """All of it; only when finished."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=np.concatenate([segment.token_ids for segment in self._segments], dtype=np.int32),
            logprobs=np.concatenate([segment.logprobs for segment in self._segments], dtype=np.float32),
            versions=np.concatenate(self._versions, dtype=np.int32),
            finish_reason=self.finish_reason,
        )

    def _tail(self, without: int = 0) -> str:
        """Text of the last tokens, long enough for every stop text, but the `without` newest. A token is at least one byte."""
        longest = max(len(text.encode()) for text in self.request.params.stop)
        assert self._decode is not None, "stop texts need a decoder"
        tail = self.context[len(self.request.prompt_ids) :][-longest - 1 :].tolist()
        return self._decode(tail[: max(0, len(tail) - without)])

    def _ends_in_stop_text(self) -> bool:
        """Whether the newest segment completes one; one that came before `min_new_tokens` may still be in sight."""
        stop = self.request.params.stop
        if not stop:
            return False
        tail, before = self._tail(), self._tail(without=len(self._segments[-1].token_ids))
        return any(tail.count(text) > before.count(text) for text in stop)

    def _may_be_inside_stop_text(self) -> bool:
        """Whether the text ends like the beginning of a stop text (or in the middle of a character)."""
        stop = self.request.params.stop
        if not stop or not self._length:
            return False
        tail = self._tail()
        return tail.endswith("\ufffd") or any(tail.endswith(text[:n]) for text in stop for n in range(1, len(text)))
