"""RewardPool: scores answers in killable processes, so that no reward can hang, crash or fill the run's memory."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from rl_lightning.rewards.child import CellResult, Init, Job
from rl_lightning.rewards.pickling import pickled_reward
from rl_lightning.rewards.process import RewardLoadError, RewardProcess, RewardProcessDied
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.types import Prompt

logger = logging.getLogger(__name__)

Cell = tuple[int, int]
"""(answer, reward): one call of one reward."""

SPREAD_ABOVE_S = 0.25
SHOWN_FAILURES = 3
SHOW_EVERY = 100


class RewardScore(NamedTuple):
    """One answer's reward.

    Attributes:
        total: weighted sum of the parts.
        parts: raw value by reward name; 0 where it failed.
        failure: `timeout`, `memory` or `error` where a reward failed (the first one), else None.
    """

    total: float
    parts: dict[str, float]
    failure: str | None = None


class RewardPool:
    """A few spawned interpreters that run rewards in their main thread under a deadline and a memory limit.

    A reward that raises, returns no finite number, runs too long, eats too much memory or kills its process scores 0
    for that answer and is counted in `failures`; its process is killed with all that it started, and replaced.  A
    reward may have a method `setup()`, which runs once in each process, outside deadline and memory limit: the place
    for slow imports.  Processes beyond the first start when they are needed.

    A pool pickles until it is started; all methods belong to the event loop that starts it:

        async with RewardPool(rewards) as score:
            scores = await score(prompt, answers)

    Args:
        rewards: the terms of the reward sum.
        processes: most rewards that run at one time.
        timeout_s: longest time that one reward may take for one answer.
        memory_gb: what a process may allocate beyond what it holds when its rewards are loaded.
        start_timeout_s: longest time that a process may take to start and load the rewards.

    Raises:
        ValueError: no reward, a limit that is not positive, or a reward that does not pickle.
    """

    def __init__(
        self,
        rewards: Sequence[WeightedReward],
        processes: int = 1,
        timeout_s: float = 8.0,
        memory_gb: float = 4.0,
        start_timeout_s: float = 180.0,
    ) -> None:
        if not rewards:
            raise ValueError("no reward is given; name at least one")
        if processes < 1 or timeout_s <= 0 or memory_gb <= 0:
            raise ValueError(
                f"need processes >= 1, timeout_s > 0 and memory_gb > 0, got {processes=}, {timeout_s=}, {memory_gb=}"
            )
        self.rewards = tuple(rewards)
        self.names = unique_names(self.rewards)
        self.processes = processes
        self.timeout_s = timeout_s
        self.memory_gb = memory_gb
        self.start_timeout_s = start_timeout_s
        self.failures: Counter[str] = Counter()
        self.restarts = 0
        self._pickled = [pickled_reward(name, term.reward) for name, term in zip(self.names, self.rewards, strict=True)]
        self._init: Init | None = None
        self._idle: asyncio.LifoQueue[RewardProcess | None] | None = None
        self._running: set[RewardProcess] = set()
        self._seconds_per_answer = 0.0
        self._closed = False

    async def __aenter__(self) -> Callable[[Prompt, Sequence[str]], Awaitable[list[RewardScore]]]:
        await self.start()
        return self.score_many

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Starts the first process, so that a reward that cannot be loaded is found now.

        Raises:
            ValueError: a reward cannot be loaded in a process of its own; one sentence with the remedy.
            TimeoutError: it did not load in time.
        """
        self._init = Init(list(sys.path), self._pickled, int(self.memory_gb * 2**30))
        first = await self._start_process()
        self._idle = asyncio.LifoQueue()
        for process in (*[None] * (self.processes - 1), first):
            self._idle.put_nowait(process)

    async def score(self, prompt: Prompt, answer: str) -> RewardScore:
        """The reward of one answer."""
        return (await self.score_many(prompt, [answer]))[0]

    async def score_many(self, prompt: Prompt, answers: Sequence[str]) -> list[RewardScore]:
        """The rewards of a group's answers, in their order; never raises for what a reward does.

        Raises:
            RuntimeError: the pool was not started, or is closed.
            TimeoutError: a replaced process did not start in time.
        """
        began = time.monotonic()
        n_parts = self.processes if self._seconds_per_answer * len(answers) > SPREAD_ABOVE_S else 1
        shares = [range(part, len(answers), n_parts) for part in range(min(n_parts, len(answers)))]
        results: dict[Cell, CellResult] = {}
        await asyncio.gather(*(self._score_share(prompt, tuple(answers), share, results) for share in shares))
        if answers:
            self._seconds_per_answer = (time.monotonic() - began) * len(shares) / len(answers)
        return [self._sum([results[answer, reward] for reward in range(len(self.rewards))]) for answer in range(len(answers))]

    async def close(self) -> None:
        """Kills all processes; whoever waits for one gets a RuntimeError. Idempotent."""
        self._closed = True
        if self._idle is not None:
            self._idle.put_nowait(None)  # wakes who waits for a process; each of them wakes the next
        await asyncio.gather(*(process.end() for process in self._running))
        self._running.clear()

    async def _score_share(self, prompt: Prompt, answers: tuple[str, ...], share: range, results: dict[Cell, CellResult]) -> None:
        """Fills `results` for the answers in `share`, through as many processes as their faults cost."""
        pending = [(answer, reward) for answer in share for reward in range(len(self.rewards))]
        if self._idle is None:
            raise RuntimeError("the RewardPool is not started")
        process = await self._idle.get()
        try:
            while pending:
                process = await self._ready(process)
                done, healthy = await self._advance(process, Job(prompt, answers, tuple(pending)))
                results.update(zip(pending, done, strict=False))
                pending = pending[len(done) :]
                if not healthy:
                    await self._discard(process)
                    process = None
        except BaseException:
            if process is not None:
                process.kill()
            raise
        finally:
            self._idle.put_nowait(process)

    async def _ready(self, process: RewardProcess | None) -> RewardProcess:
        if self._closed:
            raise RuntimeError("the RewardPool is closed")
        if process is not None and process.alive:
            return process
        if process is not None:
            await self._discard(process)
        return await self._start_process()

    async def _advance(self, process: RewardProcess, job: Job) -> tuple[list[CellResult], bool]:
        """Results of the job's first cells, up to one that cost the process; and whether the process is still good."""
        done: list[CellResult] = []
        try:
            await process.submit(job, self.timeout_s)
            for _ in job.cells:
                done.append(await process.result(self.timeout_s))
                if done[-1].failure == "memory":
                    break
        except TimeoutError:
            done.append(CellResult(0.0, "timeout", f"it took longer than timeout_s={self.timeout_s:g}"))
        except RewardProcessDied:
            ended = await process.last_words()
            done.append(CellResult(0.0, "memory" if ended == "SIGKILL" else "error", f"its process ended ({ended})"))
        else:
            self._count(job, done)
            return done, done[-1].failure != "memory"
        self._count(job, done)
        return done, False

    def _count(self, job: Job, done: list[CellResult]) -> None:
        for (_, reward), result in zip(job.cells, done, strict=False):
            if result.failure is None:
                continue
            self.failures[result.failure] += 1
            n = self.failures[result.failure]
            if n <= SHOWN_FAILURES or n % SHOW_EVERY == 0:
                message = "reward %s failed on prompt %s and scores 0: %s (%s number %d)"
                logger.warning(message, self.names[reward], job.prompt.query_id, result.message, result.failure, n)

    def _sum(self, results: list[CellResult]) -> RewardScore:
        parts = {name: result.value for name, result in zip(self.names, results, strict=True)}
        total = sum(term.weight * result.value for term, result in zip(self.rewards, results, strict=True))
        return RewardScore(total, parts, next((result.failure for result in results if result.failure), None))

    async def _start_process(self) -> RewardProcess:
        assert self._init is not None
        try:
            process = await RewardProcess.start(self._init, self.start_timeout_s)
        except RewardLoadError as error:
            raise ValueError(
                f"reward {self.names[error.reward]} cannot be loaded in a process of its own ({error}); "
                "define it in a module that can be imported from the folders on sys.path"
            ) from error
        except RewardProcessDied as error:
            raise ValueError(f"loading the rewards {', '.join(self.names)} ends the process that they are loaded in") from error
        self._running.add(process)
        return process

    async def _discard(self, process: RewardProcess) -> None:
        self._running.discard(process)
        self.restarts += 1
        await process.end()


def unique_names(rewards: Sequence[WeightedReward]) -> list[str]:
    """The rewards' names, `_2`, `_3`, ... added where one occurs again."""
    seen: Counter[str] = Counter()
    names = []
    for term in rewards:
        seen[term.name] += 1
        names.append(term.name if seen[term.name] == 1 else f"{term.name}_{seen[term.name]}")
    return names
