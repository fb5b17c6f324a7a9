"""Workflow: how one lease becomes a group of rollouts. Single-turn question and answer is the first."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from rl_lightning.rewards.pool import RewardScore
from rl_lightning.types import Completion, GenerationRequest, Lease, Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:
    from rl_lightning.engines.engine import Engine


Scorer = Callable[[Prompt, Sequence[str]], Awaitable[Sequence[RewardScore]]]
"""Scores all answers to a prompt together, in the order given."""


@runtime_checkable
class Workflow(Protocol):
    """Answers a lease. Configured in the driver, pickled, called concurrently on the worker's event loop."""

    async def run(self, lease: Lease, engine: Engine, score: Scorer, decode: Callable[[Sequence[int]], str]) -> RolloutGroup:
        """Returns `lease.group_size` rollouts of `lease.prompt`.

        Raises:
            EngineError: from the engine, untouched; the group is then answered again elsewhere or later.
        """
        ...


def sample_seed(seed: int, index: int, sample: int) -> int:
    """A 63-bit seed that is a pure function of (run seed, group, answer), independent of timing and of other groups."""
    words = np.random.SeedSequence((seed & 0xFFFFFFFF, index, sample)).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


class SingleTurnWorkflow:
    """One prompt, one answer, `group_size` times at once."""

    async def run(self, lease: Lease, engine: Engine, score: Scorer, decode: Callable[[Sequence[int]], str]) -> RolloutGroup:
        """See `Workflow.run`."""
        completions = await self._generate(lease, engine)
        texts = [decode(c.token_ids.tolist()) for c in completions]
        scores = await score(lease.prompt, texts)
        rollouts = tuple(
            Rollout(c, text, s.total, s.parts, np.ones(len(c), dtype=bool), s.failure)
            for c, text, s in zip(completions, texts, scores, strict=True)
        )
        return RolloutGroup(lease.index, lease.prompt, rollouts)

    async def _generate(self, lease: Lease, engine: Engine) -> list[Completion]:
        kind = "eval" if lease.evaluation else "train"
        requests = [
            GenerationRequest(
                f"{kind}-{lease.index}-{lease.submission}-{sample}",
                lease.prompt.token_ids,
                lease.params,
                sample_seed(lease.seed, lease.index, sample),
            )
            for sample in range(lease.group_size)
        ]
        # A TaskGroup cancels the other answers as soon as one fails, so a dead engine is left at once.
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(engine.generate(request)) for request in requests]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]
