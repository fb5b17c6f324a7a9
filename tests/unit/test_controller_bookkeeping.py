"""The controller's bookkeeping costs the same however much is in flight, and decides as looking at everything would."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lightning.prompts.source import PromptSource
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.group_record import GroupRecord
from rl_lightning.rollout.ledger import RolloutLedger
from rl_lightning.rollout.roster import WorkerRoster
from rl_lightning.rollout.share import Share
from rl_lightning.testing import FakeClock, FakePrompts
from rl_lightning.types import SamplingParams

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from simulation_loop import simulate  # noqa: E402

DONE = GroupRecord(n_tokens=10, n_answer_tokens=4, success_rate=0.5)


def controller_of(cls: type[RolloutController] = RolloutController, clock=None, batch=4, eta=1, **options) -> RolloutController:
    gate = StalenessGate(batch, eta, 1000)
    return cls(
        PromptSource(FakePrompts(size=100)), ControllerSettings(gate, 2, SamplingParams(), **options), None, clock or FakeClock()
    )


def would_be_ready(ledger: RolloutLedger) -> bool:
    """By the definition: with the B oldest gone, at most j B of the others are due within j steps."""
    size, eta = ledger.gate.batch_size, ledger.gate.max_head_offpolicyness
    finished = sorted(ledger.finished.values(), key=lambda group: group.submission)
    others = [*ledger.running.values(), *finished[size:]]
    within = [sum(group.version + eta - ledger.version <= steps for group in others) for steps in range(eta + 1)]
    return len(finished) >= size and all(count <= steps * size for steps, count in enumerate(within))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_a_batch_is_ready_exactly_when_those_left_behind_can_meet_their_step(batch, eta, concurrent, seed):
    rng, ledger = random.Random(seed), RolloutLedger(StalenessGate(batch, eta, concurrent))
    asked = set()
    for _ in range(150):
        for _ in range(rng.randint(0, ledger.capacity())):
            ledger.submit(f"w{rng.randrange(3)}", 0.0)
        for index in rng.sample(sorted(ledger.running), min(len(ledger.running), rng.randint(0, 3))):
            fate = rng.random()
            if fate < 0.8:
                ledger.finish(index, 1, None)
            elif fate < 0.9:
                ledger.reject(index)
            else:
                ledger.give_back(index)
        asked.add(would_be_ready(ledger))
        assert ledger.ready() == would_be_ready(ledger)
        if rng.random() < 0.7 and ledger.take() is not None:
            ledger.advance(ledger.version + rng.choice([1, 1, 1, 2]))
    assert False in asked


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["round_robin", "least_requests", "least_token_usage"]), st.integers(0, 10**6))
def test_turns_are_those_of_one_choice_after_another(policy, seed):
    rng = random.Random(seed)
    rooms = {f"w{i}": rng.randrange(4) for i in range(rng.randrange(6))}

    def roster() -> WorkerRoster:
        made = WorkerRoster(60.0, policy)
        for i, name in enumerate(rooms):
            made.register(name, "1", None, 0.0)
            made.heartbeat(name, "1", {"tokens": float(seed % (i + 2))}, 0.0)
        made.mark_synced(list(rooms)[1:], 3)
        return made

    one_by_one, queued, left, chosen = roster(), roster(), dict(rooms), []
    keys = {
        "round_robin": lambda entry: entry.last_grant,
        "least_requests": lambda entry: (entry.running, entry.last_grant),
        "least_token_usage": lambda entry: (entry.tokens, entry.running, entry.last_grant),
    }
    while ready := [entry for entry in one_by_one if left[entry.name] and entry.version == 3]:
        entry = min(ready, key=keys[policy])
        chosen.append(entry.name)
        left[entry.name] -= 1
        one_by_one.note_grant(entry, 10 + len(chosen) % 3)
    turns = []
    for entry in queued.turns(rooms, 3):
        turns.append(entry.name)
        queued.note_grant(entry, 10 + len(turns) % 3)
    assert turns == chosen and len(turns) == sum(list(rooms.values())[1:])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_leases_and_workers_expire_at_the_first_turn_after_their_deadline(seed):
    async def scenario() -> None:
        rng, clock = random.Random(seed), FakeClock()
        controller = controller_of(clock=clock, batch=50, worker_timeout_s=20.0, lease_timeout_s=30.0, max_rejections=10**6)
        await controller.publish(0, [])
        heard: dict[str, float] = {}
        started: dict[tuple[str, int], float] = {}
        for _ in range(120):
            clock.advance(rng.choice([0.0, 1.0, 3.0, 8.0]))
            heard = {name: at for name, at in heard.items() if clock() - at <= 20.0}
            started = {key: at for key, at in started.items() if clock() - at <= 30.0 and key[0] in heard}
            name = f"w{rng.randrange(4)}"
            if name not in heard:
                await controller.register(name, "1", None)
                await controller.publish(0, [name])
                heard[name] = clock()
            elif rng.random() < 0.5:
                await controller.heartbeat(name, "1", {})
                heard[name] = clock()
            else:
                await controller.publish(0, [])
            assert (await controller.statistics())["groups_running"] == len(started)
            assert {worker for worker, _ in await controller.workers()} == set(heard)
            for lease in await controller.lease(name, rng.randrange(3), poll_s=1.0):
                started[name, lease.submission] = clock()

    simulate(scenario())


class CountingController(RolloutController):
    """Counts how often a rank looks for its batch: it asks before whether there will ever be one."""

    looks = 0

    async def check(self) -> None:
        self.looks += 1
        await super().check()


def test_no_rank_is_woken_before_there_is_a_batch():
    async def scenario() -> None:
        controller = controller_of(CountingController, asyncio.get_running_loop().time, batch=8)
        await controller.register("a", "1", None)
        await controller.publish(0, ["a"])
        ranks = [asyncio.create_task(controller.take(0, rank, 4)) for rank in range(4)]
        await asyncio.sleep(0.1)
        leases = await controller.lease("a", 8)
        for n, lease in enumerate(leases):
            assert controller.looks == 4, n
            await controller.put("a", lease, DONE, lease.index)
            await asyncio.sleep(0.01)
        shares = [await rank for rank in ranks]
        assert asyncio.get_running_loop().time() < 0.2, "they were woken, and did not find it when they looked by themselves"
        assert all(isinstance(share, Share) for share in shares) and controller.looks == 8
        assert sorted(index for share in shares for index in share.contents) == list(range(8))

    simulate(scenario())
