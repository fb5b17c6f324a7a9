"""Public fakes of every seam: what user tests, and ours, put in the place of engines, rewards, tokenizers and clocks.

All of them pickle (before they are started), so they work inside Ray actors too.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_lightning.engines.engine import EngineError, WeightMismatchError
from rl_lightning.types import Completion, FinishReason, GenerationRequest, Prompt
from rl_lightning.weights.transport import Refusal, WeightTarget, WeightUpdate, no_refusal

if TYPE_CHECKING:
    from rl_lightning.weights.source import WeightSource

AnswerFn = Callable[[GenerationRequest], Sequence[int]]
"""Scripts an engine: the whole answer to a request, before `max_new_tokens` cuts it."""

WAIT_LIMIT_S = 60.0


def random_answer(request: GenerationRequest) -> list[int]:
    """1 to 16 tokens below 100: a pure function of the prompt and the request's seed."""
    rng = random.Random(f"{request.prompt_ids}{request.seed}")
    return [rng.randrange(100) for _ in range(rng.randint(1, 16))]


def fake_logprob(token: int, version: int) -> float:
    """What FakeEngine reports for `token` under `version`, so that a test can tell which weights made it."""
    return -1.0 - token % 7 - version / 1024


class FakeEngine:
    """An Engine without a model: scripted tokens at a chosen speed, with real versions, interruption and faults.

    Args:
        answer: the whole answer to a request; called in the worker's process.
        seconds_per_token: time that one token takes; 0 only yields to the loop.
        step: awaited before every token instead of sleeping; a test's own hold on time.
        update_s: seconds that loading new weights takes.
        crash_at: the engine dies in these calls of `generate` (1 is the first, counted over restarts).
        mismatch_at: versions that `update_weights` refuses with WeightMismatchError.
        transports: weight transports that the engine claims to receive.
    """

    def __init__(
        self,
        answer: AnswerFn = random_answer,
        *,
        seconds_per_token: float = 0.0,
        step: Callable[[], Awaitable[None]] | None = None,
        update_s: float = 0.0,
        crash_at: Sequence[int] = (),
        mismatch_at: Sequence[int] = (),
        transports: tuple[str, ...] = ("object_store",),
    ) -> None:
        self.answer = answer
        self.seconds_per_token = seconds_per_token
        self.step = step
        self.update_s = update_s
        self.crash_at = frozenset(crash_at)
        self.mismatch_at = frozenset(mismatch_at)
        self.transports = transports
        self.alive = False
        self.version = 0
        self.starts = 0
        self.calls = 0
        self.running = 0
        self.model_path = ""
        self.updates: list[WeightUpdate] = []
        self._open: asyncio.Event | None = None

    @property
    def target(self) -> WeightTarget:
        """Takes weights as they are."""
        return WeightTarget()

    async def start(self, model_path: str) -> None:
        """Comes alive with version 0; also the way back from a crash."""
        self.model_path = model_path
        self.version = 0
        self.starts += 1
        self.alive = True
        self._open = asyncio.Event()
        self._open.set()

    async def generate(self, request: GenerationRequest) -> Completion:
        """The scripted answer; every token carries the version that was live when it was made."""
        self.calls += 1
        if self.calls in self.crash_at:
            self.crash()
        script = list(self.answer(request))
        tokens: list[int] = []
        versions: list[int] = []
        self.running += 1
        try:
            for token in script[: request.params.max_new_tokens]:
                await self._next_token()
                tokens.append(token)
                versions.append(self.version)
        finally:
            self.running -= 1
        return fake_completion(tokens, versions, "length" if len(script) > len(tokens) else "stop")

    async def update_weights(self, update: WeightUpdate) -> float:
        """Stops token production for `update_s`, then makes `update.version` live."""
        self._check_alive()
        assert self._open is not None
        began = time.monotonic()
        self._open.clear()
        try:
            await asyncio.sleep(self.update_s)
            self._check_alive()
            if update.version in self.mismatch_at:
                raise WeightMismatchError(f"fake engine: the weights of version {update.version} are not the ones that were sent")
            self.version = update.version
            self.updates.append(update)
        finally:
            self._open.set()
        return time.monotonic() - began

    async def health(self) -> None:
        """Raises EngineError unless alive."""
        self._check_alive()

    async def stop(self) -> None:
        """Ends it; answers under way fail with EngineError."""
        self.crash()

    def crash(self) -> None:
        """Dies at once, as a killed server does: everything under way and to come raises EngineError until `start`."""
        self.alive = False
        if self._open is not None:
            self._open.set()

    async def _next_token(self) -> None:
        assert self._open is not None, "generate before start"
        if self.step is not None:
            await self.step()
        else:
            await asyncio.sleep(self.seconds_per_token)
        if not self._open.is_set():
            await asyncio.wait_for(self._open.wait(), WAIT_LIMIT_S)
        self._check_alive()

    def _check_alive(self) -> None:
        if not self.alive:
            raise EngineError("fake engine: not running")


def fake_completion(
    token_ids: Sequence[int], versions: Sequence[int] | int = 0, finish_reason: FinishReason = "stop"
) -> Completion:
    """A Completion of `token_ids` whose log-probabilities are `fake_logprob`."""
    spread = [versions] * len(token_ids) if isinstance(versions, int) else list(versions)
    logprobs = [fake_logprob(t, v) for t, v in zip(token_ids, spread, strict=True)]
    return Completion(np.array(token_ids, np.int32), np.array(logprobs, np.float32), np.array(spread, np.int32), finish_reason)


@dataclass
class FakeReward:
    """A Reward that scores by a table, and can be slow or broken.

    Args:
        scores: reward by answer text.
        default: reward of any other answer.
        delay_s: how long every call takes.
        error: message of the RuntimeError that every call raises; None for no error.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    default: float = 0.0
    delay_s: float = 0.0
    error: str | None = None

    def __call__(self, prompt: Prompt, answer: str) -> float:
        """The table's entry for `answer`."""
        time.sleep(self.delay_s)
        if self.error is not None:
            raise RuntimeError(self.error)
        return self.scores.get(answer, self.default)


class FakeTokenizer:
    """One token per character (its code point, below `vocab_size`), with the few members that this library uses."""

    vocab_size = 256
    eos_token_id = 0
    pad_token_id = 0
    eos_token = "\x00"
    chat_template: str | None = "fake"

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Code points of `text`."""
        return [ord(c) % self.vocab_size for c in text]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`."""
        return "".join(chr(int(t)) for t in token_ids if not (skip_special_tokens and int(t) == self.eos_token_id))

    def __call__(self, text: Sequence[str], add_special_tokens: bool = False) -> dict[str, list[list[int]]]:
        """Encodes many texts at once."""
        return {"input_ids": [self.encode(t) for t in text]}

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], tokenize: bool = False, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """`<role>content` lines, ended by `<assistant>`."""
        return "".join(f"<{m['role']}>{m['content']}\n" for m in messages) + ("<assistant>" if add_generation_prompt else "")


class FakePrompts:
    """A PromptDataset of `size` prompts `q0`, `q1`, ...; each one's expected answer is its number."""

    def __init__(self, size: int = 8, prompt_len: int = 3) -> None:
        self.size = size
        self.prompt_len = prompt_len

    def setup(self, tokenizer: Any) -> None:
        """Nothing to load."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Prompt:
        if not 0 <= i < self.size:
            raise IndexError(f"prompt {i} of {self.size}")
        return Prompt(f"q{i}", f"q{i}", (i % 100,) * self.prompt_len, "math", {"solutions": [str(i)]})


class FakeTransport:
    """A WeightTransport that moves nothing and remembers what it was asked.

    Args:
        name: the transport's name in the updates.
        send_error: exception that `send` raises; None for none.
    """

    def __init__(self, name: str = "object_store", send_error: Exception | None = None) -> None:
        self.name = name
        self.send_error = send_error
        self.staged: list[int] = []
        self.sent = 0
        self.released = 0
        self.closed = False

    def stage(self, version: int, weights: WeightSource, targets: Sequence[WeightTarget]) -> list[WeightUpdate]:
        """One update for each of `targets`; the fingerprint is a real one."""
        from rl_lightning.weights.fingerprint import take_fingerprint

        fingerprint = take_fingerprint(weights)
        self.staged.append(version)
        return [WeightUpdate(version, self.name, {}, fingerprint) for _ in targets]

    def send(self, timeout_s: float, refusal: Refusal = no_refusal) -> None:
        """Counts, or raises `send_error`."""
        if self.send_error is not None:
            raise self.send_error
        self.sent += 1

    def release(self) -> None:
        """Counts."""
        self.released += 1

    def close(self) -> None:
        """Remembers."""
        self.closed = True


class FakeClock:
    """A clock that moves when told: pass it where `time.monotonic` is the default."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Moves time forward by `seconds`."""
        self.now += seconds
