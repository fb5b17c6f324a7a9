"""SimulatedEngine: when the answers given to an inference engine would be finished, without computing them."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from simulation_inputs import Hardware

from rl_lightning.types import Lease


@dataclass(slots=True, eq=False)
class Answer:
    """One answer on its way. `offset` is its context's length less the engine's count of decode steps, hence constant."""

    group: SimulatedGroup
    length: int
    offset: float = 0.0
    first_version: int = 0
    last_version: int = 0


@dataclass(slots=True, eq=False)
class SimulatedGroup:
    """What a RolloutGroup is in a run: the answers to one lease."""

    lease: Lease
    prompt_len: int
    answers: list[Answer] = field(default_factory=list)
    open: int = 0

    @property
    def lengths(self) -> list[int]:
        """Prompt and answer tokens of each sequence."""
        return [self.prompt_len + answer.length for answer in self.answers]


class SimulatedEngine:
    """Continuous batching: up to `max_running` answers get a token each per decode step, the others wait in order.

    The engine only acts when an answer ends, comes or is interrupted. In between, a decode step of n answers takes
    decode_s(n) + read_s * (all their contexts), and contexts grow by n tokens a step: the time of m steps is a quadratic in m,
    solved in either direction.

    Args:
        hardware: how fast it is.
        finished: called with each group whose last answer ended.
    """

    def __init__(self, hardware: Hardware, finished: Callable[[SimulatedGroup], None]) -> None:
        self.hardware = hardware
        self.version = 0
        self._decode_s = [hardware.decode_s(n) for n in range(hardware.max_running + 1)]
        self._read_s = hardware.read_s
        self._finished = finished
        self._loop = asyncio.get_running_loop()
        self._queue: deque[Answer] = deque()
        self._running: list[tuple[float, int, Answer]] = []
        self._admitted = 0
        self._steps = 0.0
        self._offsets = self._squared_offsets = 0.0
        self._idle_s = 0.0
        self._as_of_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        """Answers that get tokens now."""
        return len(self._running)

    def idle_s(self) -> float:
        """Seconds up to now without an answer to decode."""
        self._catch_up()
        return self._idle_s

    def add(self, group: SimulatedGroup) -> None:
        """Queues all answers of `group`."""
        self._catch_up()
        self._queue.extend(group.answers)
        self._admit()

    def interrupt(self, version: int) -> None:
        """New weights: nothing is decoded while they come, and then until all contexts are computed again under them."""
        self._catch_up()
        tokens = self._offsets + self.running * self._steps
        squares = self._squared_offsets + 2 * self._steps * self._offsets + self.running * self._steps**2
        self.version = version
        self._as_of_s += self.hardware.sync_s + self.hardware.forward_s(tokens, squares)
        self._wake_at_next_end()

    # -- inside

    def _catch_up(self) -> None:
        """Counts the decode steps up to now."""
        now = self._loop.time()
        elapsed = now - self._as_of_s
        if elapsed <= 0:  # standing still for weights or prompts
            return
        self._as_of_s = now
        if not self._running:
            self._idle_s += elapsed
            return
        linear, growth = self._step_s()
        self._steps += (math.sqrt(linear * linear + 2 * growth * elapsed) - linear) / growth

    def _step_s(self) -> tuple[float, float]:
        """(a, b) such that the next m decode steps take a m + b m^2 / 2 seconds: each takes b more than the one before."""
        running, growth = len(self._running), self._read_s * len(self._running)
        return self._decode_s[running] + self._read_s * (self._offsets + running * self._steps) - growth / 2, growth

    def _admit(self) -> None:
        """Starts waiting answers while there is room; decoding stands still while their prompts are computed."""
        while self._queue and self.running < self.hardware.max_running:
            answer = self._queue.popleft()
            prompt_len = answer.group.prompt_len
            answer.offset, answer.first_version = prompt_len - self._steps, self.version
            self._count(answer.offset, 1)
            heapq.heappush(self._running, (self._steps + answer.length, self._admitted, answer))
            self._admitted += 1
            self._as_of_s += self.hardware.forward_s(prompt_len, prompt_len**2)
        self._wake_at_next_end()

    def _wake_at_next_end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            linear, growth = self._step_s()
            steps = max(0.0, self._running[0][0] - self._steps)
            self._timer = self._loop.call_at(self._as_of_s + steps * (linear + growth * steps / 2), self._end)

    def _end(self) -> None:
        """The answers that end with this decode step."""
        self._timer = None
        self._as_of_s, self._steps = self._loop.time(), self._running[0][0]
        while self._running and self._running[0][0] <= self._steps:
            answer = heapq.heappop(self._running)[2]
            self._count(answer.offset, -1)
            answer.last_version = self.version
            answer.group.open -= 1
            if not answer.group.open:
                self._finished(answer.group)
        self._admit()

    def _count(self, offset: float, sign: int) -> None:
        self._offsets += sign * offset
        self._squared_offsets += sign * offset * offset
