"""simulate_run: a whole training run in simulated time, with the real controller between fake engines and a fake trainer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from statistics import fmean

from simulation_engine import Answer, SimulatedEngine, SimulatedGroup
from simulation_inputs import Hardware, Workload
from simulation_loop import simulate

from rl_lightning.prompts.source import PromptSource
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.group_record import GroupRecord
from rl_lightning.rollout.share import Share
from rl_lightning.testing import FakePrompts
from rl_lightning.types import Lease, SamplingParams

HEARTBEAT_S = 10.0
"""Between a worker's signs of life: ten times what a run has, for the simulation's sake."""


@dataclass(frozen=True)
class Setup:
    """One run.

    Attributes:
        engines: GPUs that generate, one engine each.
        trainers: GPUs that train, one rank each; they share the batch equally.
        eta: max_head_offpolicyness.
        steps: training steps.
        concurrent: most prompts in flight; None is the prompts of a step.
        endless: whether engines have prompts beyond the last step, as in the middle of a run.
        workload, hardware: see there.
    """

    engines: int
    trainers: int
    eta: int
    steps: int
    concurrent: int | None = None
    endless: bool = True
    workload: Workload = Workload()
    hardware: Hardware = Hardware()

    @property
    def batch(self) -> int:
        """Prompts of a step: those of the workload, made a multiple of the ranks, as a run demands it."""
        return max(1, round(self.workload.prompts / self.trainers)) * self.trainers


@dataclass
class Step:
    """A training step as the trainer saw it.

    Attributes:
        started_s, taken_s, ended_s: when it asked for the batch, had it, and had given the new weights to the engines.
        tokens: prompt and answer tokens trained on.
        indices: of the groups, in the order of the ranks.
        staleness: head_offpolicyness of every answer.
    """

    started_s: float
    taken_s: float = 0.0
    ended_s: float = 0.0
    tokens: int = 0
    indices: list[int] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What a run showed.

    Attributes:
        steps: all of them.
        engine_idle: share of the engines' time without an answer to decode.
        longest_lease_s: from a lease to its last answer; `lease_timeout_s` must be more.
    """

    steps: list[Step]
    engine_idle: float
    longest_lease_s: float

    def tokens_per_s(self, skip: int = 2) -> float:
        """Effective throughput: tokens trained on per second of the steps after the first `skip`."""
        kept = self.steps[skip:]
        return sum(step.tokens for step in kept) / (kept[-1].ended_s - kept[0].started_s)

    def trainer_idle(self, skip: int = 2) -> float:
        """Share of those steps' time that the trainer waited for a batch."""
        kept = self.steps[skip:]
        return sum(step.taken_s - step.started_s for step in kept) / (kept[-1].ended_s - kept[0].started_s)

    def step_s(self, skip: int = 2) -> float:
        """Mean seconds of those steps."""
        kept = self.steps[skip:]
        return (kept[-1].ended_s - kept[0].started_s) / len(kept)

    def staleness(self, skip: int = 2) -> tuple[float, int]:
        """Mean and maximum of head_offpolicyness."""
        kept = self.steps[skip:]
        return fmean(s for step in kept for s in step.staleness), max(s for step in kept for s in step.staleness)


def simulate_run(setup: Setup) -> Outcome:
    """The whole run; a pure function of `setup`."""
    return simulate(_Run(setup).run())


class _Run:
    """The parties of one run. What is real: the controller with ledger, gate and roster, and the loop they run on."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    async def run(self) -> Outcome:
        setup, loop = self.setup, asyncio.get_running_loop()
        workload = setup.workload
        settings = ControllerSettings(
            StalenessGate(setup.batch, setup.eta, setup.concurrent or setup.batch),
            workload.answers,
            SamplingParams(max_new_tokens=workload.max_new_tokens),
            n_groups=None if setup.endless else setup.steps * setup.batch,
            lease_timeout_s=float("inf"),
        )
        source = PromptSource(FakePrompts(size=10_000, prompt_len=workload.prompt_len), shuffle=False)
        controller = RolloutController(source, settings, clock=loop.time)
        workers = [_Worker(f"worker {i}", setup, controller) for i in range(setup.engines)]
        for worker in workers:
            await controller.register(worker.name, "1", None)
        await controller.publish(0, [worker.name for worker in workers])
        tasks = [asyncio.create_task(life) for worker in workers for life in (worker.serve(), worker.beat())]
        steps = [await self._step(version, controller, workers) for version in range(setup.steps)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        idle = fmean(worker.engine.idle_s() for worker in workers) / loop.time()
        return Outcome(steps, idle, max(worker.longest_lease_s for worker in workers))

    async def _step(self, version: int, controller: RolloutController, workers: list[_Worker]) -> Step:
        """Takes a batch, trains on it, gives the engines the new weights."""
        loop, hardware = asyncio.get_running_loop(), self.setup.hardware
        step = Step(loop.time())
        shares = [await _take(controller, version, rank, self.setup.trainers) for rank in range(self.setup.trainers)]
        step.taken_s = loop.time()
        await asyncio.sleep(max(self._train_s(share) for share in shares))
        for worker in workers:
            worker.engine.interrupt(version + 1)
        await asyncio.sleep(hardware.sync_s)
        await controller.publish(version + 1, [worker.name for worker in workers])
        step.ended_s = loop.time()
        groups = [group for share in shares for group in share]
        step.tokens = sum(sum(group.lengths) for group in groups)
        step.indices = [group.lease.index for group in groups]
        step.staleness = [version - answer.first_version for group in groups for answer in group.answers]
        return step

    def _train_s(self, share: list[SimulatedGroup]) -> float:
        """Seconds of one rank: its share forward and backward, and forward for pi_prox of all minibatches but the first."""
        lengths = [length for group in share for length in group.lengths]
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        again = 1 - 1 / self.setup.workload.minibatches
        hardware = self.setup.hardware
        return hardware.train_s(tokens, squares) + again * hardware.forward_s(tokens, squares)


async def _take(controller: RolloutController, version: int, rank: int, world_size: int) -> list[SimulatedGroup]:
    while not isinstance(answer := await controller.take(version, rank, world_size), Share):
        pass
    return list(answer.contents)


class _Worker:
    """A RolloutWorker without processes: leases while there is room, puts what its engine finished."""

    def __init__(self, name: str, setup: Setup, controller: RolloutController) -> None:
        self.name, self.controller, self.workload = name, controller, setup.workload
        self.engine = SimulatedEngine(setup.hardware, self._finished)
        self.longest_lease_s = 0.0
        self._room = -(-(setup.concurrent or setup.batch) // setup.engines)
        self._leased_s: dict[int, float] = {}
        self._puts: set[asyncio.Task[None]] = set()
        self._freed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def serve(self) -> None:
        while True:
            if not (room := self._room - len(self._leased_s)):
                self._freed.clear()
                await self._freed.wait()
                continue
            for lease in await self.controller.lease(self.name, room):
                self._leased_s[lease.submission] = self._loop.time()
                self.engine.add(self._group(lease))

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            tokens = len(self._leased_s) * self.workload.answers * self.workload.prompt_len
            await self.controller.heartbeat(self.name, "1", {"tokens": float(tokens)})

    def _group(self, lease: Lease) -> SimulatedGroup:
        group = SimulatedGroup(lease, len(lease.prompt.token_ids))
        group.answers = [Answer(group, length) for length in self.workload.lengths(lease.index)]
        group.open = len(group.answers)
        return group

    def _finished(self, group: SimulatedGroup) -> None:
        task = asyncio.create_task(self._put(group))
        self._puts.add(task)
        task.add_done_callback(self._puts.discard)

    async def _put(self, group: SimulatedGroup) -> None:
        tokens, answer_tokens = sum(group.lengths), sum(answer.length for answer in group.answers)
        await self.controller.put(self.name, group.lease, GroupRecord(tokens, answer_tokens, 0.5), group)
        self.longest_lease_s = max(self.longest_lease_s, self._loop.time() - self._leased_s.pop(group.lease.submission))
        self._freed.set()
