import asyncio
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ActorUnavailableError

from rl_lightning.batching.collate import collate
from rl_lightning.engines.engine import EngineError, UpdateGivenUpError, WeightMismatchError
from rl_lightning.prompts.source import PromptSource
from rl_lightning.rewards.pool import RewardScore
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_client import ControllerClient
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.errors import RolloutError
from rl_lightning.rollout.group_record import GroupRecord
from rl_lightning.rollout.outbox import Outbox
from rl_lightning.rollout.share import Share
from rl_lightning.rollout.worker import RolloutWorker, WorkerSettings
from rl_lightning.rollout.workflow import SingleTurnWorkflow, sample_seed
from rl_lightning.testing import FakeEngine, FakePrompts, FakeTokenizer, fake_completion
from rl_lightning.types import Prompt, Rollout, RolloutGroup, SamplingParams
from rl_lightning.weights.transport import WeightUpdate

SETTINGS = WorkerSettings("a", "model", room=4, max_engine_restarts=2, heartbeat_s=0.02)


async def score(prompt, answers):
    return [RewardScore(1.0, {"one": 1.0}, None) for _ in answers]


def make_controller(batch=2, eta=1):
    settings = ControllerSettings(StalenessGate(batch, eta, 100), group_size=2, params=SamplingParams(max_new_tokens=16))
    return RolloutController(PromptSource(FakePrompts(size=50), shuffle=False), settings)


def update(version):
    return WeightUpdate(version, "object_store", {}, {})


@asynccontextmanager
async def serving(engine, controller, workflow=None, settings=SETTINGS, store=nullcontext):
    workflow, decode = workflow or SingleTurnWorkflow(), FakeTokenizer().decode
    worker = RolloutWorker(settings, controller, engine, workflow, score, decode, store)
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not engine.alive, "the engine outlived its worker"


async def publish(controller, worker, version):
    """Retries as the trainer's publisher does while an engine restarts."""
    while True:
        try:
            await worker.update_weights(update(version))
            return await controller.publish(version, ["a"])
        except EngineError:
            await asyncio.sleep(0.01)


async def train(controller, worker, steps):
    """A trainer that takes batches and publishes; gives the groups of each step."""
    batches = []
    await publish(controller, worker, 0)
    for version in range(steps):
        while not isinstance(share := await controller.take(version, wait_s=0.1), Share):
            if share.unsynced:
                await publish(controller, worker, version)
        batches.append(share.contents)
        await publish(controller, worker, version + 1)
    return batches


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_the_loop_trains_every_prompt_once_within_the_staleness_bound():
    async def scenario():
        controller, engine = make_controller(eta=1), FakeEngine(seconds_per_token=0.001)
        async with serving(engine, controller) as worker:
            return await train(controller, worker, steps=6)

    batches = run(scenario())
    assert len({g.index for batch in batches for g in batch}) == 12
    for version, batch in enumerate(batches):
        for group in batch:
            for rollout in group.rollouts:
                assert (np.diff(rollout.completion.versions) >= 0).all()
                assert 0 <= version - rollout.completion.versions[0] <= 1
                assert rollout.text == FakeTokenizer().decode(rollout.completion.token_ids)


def test_an_engine_that_crashes_is_restarted_gets_weights_and_no_prompt_is_lost():
    async def scenario():
        controller, engine = make_controller(), FakeEngine(seconds_per_token=0.001, crash_at=[3, 9])
        async with serving(engine, controller) as worker:
            batches = await train(controller, worker, steps=4)
        return batches, engine.starts, await controller.statistics()

    batches, starts, statistics = run(scenario())
    assert starts == 3 and statistics["engine_restarts"] == 2 and statistics["groups_requeued"] >= 2
    assert sorted(g.index for batch in batches for g in batch) == list(range(8))


class LossyHandle:
    """An actor handle to `controller`, for `ControllerClient`: the answers of its first leases get lost on the way."""

    def __init__(self, controller, losses):
        self.controller, self.losses = controller, losses

    def __getattr__(self, method):
        async def remote(*args):
            answer = await getattr(self.controller, method)(*args)
            if method == "lease" and answer and self.losses:
                self.losses -= 1
                raise ActorUnavailableError("connection lost", None)
            return answer

        return SimpleNamespace(remote=remote)


def test_leases_whose_answer_is_lost_are_those_of_the_call_that_is_tried_again():
    async def scenario():
        controller, engine = make_controller(), FakeEngine()
        handle = LossyHandle(controller, losses=2)
        async with serving(engine, ControllerClient(handle)) as worker:
            batches = await train(controller, worker, steps=3)
        return batches, handle.losses, await controller.statistics()

    batches, losses, statistics = run(scenario())
    assert losses == 0 and statistics["groups_requeued"] == 0
    assert sorted(g.index for batch in batches for g in batch) == list(range(6))


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("under_way", [False, True])
def test_a_put_whose_answer_is_lost_counts_once(under_way, evaluation, caplog):
    class Fetching(RolloutController):
        """Fetches groups from the worker's outbox. If `under_way`, the first one arrives when it was fetched again."""

        async def _claim(self, worker, content):
            group = outbox.fetch(content)
            if content in fetched:
                again.set()
            fetched.append(content)
            if under_way and len(fetched) == 1:
                await again.wait()
            return group

    class Handle:
        """The network loses the first put's answer, if `under_way` before the controller has it."""

        def __getattr__(self, method):
            async def remote(*args):
                answer = asyncio.create_task(getattr(controller, method)(*args))
                if method == "put" and not puts:
                    puts.append(answer)
                    await asyncio.wait([answer], timeout=0 if under_way else None)
                    raise ActorUnavailableError("connection lost", None)
                return await answer

            return SimpleNamespace(remote=remote)

    async def scenario():
        engine = FakeEngine()
        async with serving(engine, ControllerClient(Handle()), store=outbox.keep) as worker:
            await publish(controller, worker, 0)
            if evaluation:
                share = await controller.take_evaluation(await controller.begin_evaluation([0, 1]), wait_s=10)
            else:
                share = await controller.take(0, wait_s=10)
            while worker._leases:
                await asyncio.sleep(0.01)
            await asyncio.wait(puts, timeout=5)
            return share, await controller.statistics()

    prompts = FakePrompts(size=50)
    settings = ControllerSettings(StalenessGate(2, 0, 100), group_size=2, params=SamplingParams(max_new_tokens=16))
    controller = Fetching(PromptSource(prompts, shuffle=False), settings, prompts)
    outbox, again, fetched, puts = Outbox(), asyncio.Event(), [], []
    share, statistics = run(scenario())
    assert sorted(group.index for group in share.contents) == [0, 1] and again.is_set()
    assert statistics["groups_requeued"] == 0 and "could not be answered" not in caplog.text


def test_a_death_with_nothing_in_flight_is_noticed():
    async def scenario():
        controller, engine = make_controller(), FakeEngine()
        async with serving(engine, controller):
            while not await controller.workers():
                await asyncio.sleep(0.01)
            engine.crash()
            while engine.starts < 2:
                await asyncio.sleep(0.01)

    run(scenario())


def test_an_engine_that_never_works_stops_the_run_with_its_reason():
    async def scenario():
        controller, engine = make_controller(), FakeEngine(crash_at=range(1, 100))
        async with serving(engine, controller) as worker:
            await train(controller, worker, steps=1)

    with pytest.raises(RolloutError, match=r"a gave up: its engine failed 3 times in a row; the last time: .*not running"):
        run(scenario())


def test_an_engine_whose_update_the_trainer_gave_up_is_restarted():
    async def scenario():
        controller, engine = make_controller(), FakeEngine(update_s=60)
        async with serving(engine, controller) as worker:
            while not await controller.workers():
                await asyncio.sleep(0.01)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(worker.update_weights(update(0)), 0.05)
            engine.update_s = 0
            while engine.starts < 2:
                await asyncio.sleep(0.01)
            await train(controller, worker, steps=1)

    run(scenario())


def test_an_engine_whose_update_others_gave_up_is_sent_it_again_and_not_restarted():
    class Kept(FakeEngine):
        given_up = 0

        async def update_weights(self, update):
            if update.version == 1 and not self.given_up:
                self.given_up += 1
                raise UpdateGivenUpError("engine 1 died")
            return await super().update_weights(update)

    async def scenario():
        controller, engine = make_controller(), Kept()
        async with serving(engine, controller) as worker:
            await train(controller, worker, steps=2)
        return engine.starts, engine.given_up

    assert run(scenario()) == (1, 1)


def test_an_update_that_fails_when_its_engine_is_long_restarted_does_not_cost_the_new_one():
    class Waiting(FakeEngine):
        async def update_weights(self, update):
            if self.starts > 1:
                return await super().update_weights(update)
            await ended.wait()
            raise EngineError("SGLang was stopped")

    async def scenario():
        controller, engine = make_controller(), Waiting()
        async with serving(engine, controller) as worker:
            while not await controller.workers():
                await asyncio.sleep(0.01)
            late = asyncio.create_task(worker.update_weights(update(0)))
            await asyncio.sleep(0)
            engine.crash()
            while engine.starts < 2 or not await controller.workers():
                await asyncio.sleep(0.01)
            ended.set()
            with pytest.raises(EngineError, match="stopped"):
                await late
            await train(controller, worker, steps=2)
            return engine.starts

    ended = asyncio.Event()
    assert run(scenario()) == 2


def test_a_workflow_that_raises_costs_its_prompt_and_not_the_worker(caplog: pytest.LogCaptureFixture):
    class Fussy(SingleTurnWorkflow):
        async def run(self, lease, *args):
            if lease.index == 1:
                raise KeyError("no such tool")
            return await super().run(lease, *args)

    async def scenario():
        controller = make_controller()
        async with serving(FakeEngine(), controller, Fussy()) as worker:
            batches = await train(controller, worker, steps=3)
        return batches, await controller.statistics()

    batches, statistics = run(scenario())
    assert sorted(g.index for batch in batches for g in batch) == [0, 2, 3, 4, 5, 6]
    assert statistics["groups_abandoned"] == 1
    assert [record.exc_info is not None for record in caplog.records if "could not be answered" in record.message] == [True]
    assert "came back from a: KeyError: 'no such tool'" in caplog.text


def test_a_group_with_an_empty_answer_costs_its_prompt_and_not_the_run():
    class Silent(SingleTurnWorkflow):
        async def _generate(self, lease, engine):
            completions = await super()._generate(lease, engine)
            return [*completions[1:], fake_completion([])] if lease.index == 1 else completions

    async def scenario():
        controller = make_controller(eta=0)
        async with serving(FakeEngine(), controller, Silent()) as worker:
            batches = await train(controller, worker, steps=3)
        return batches, await controller.statistics()

    batches, statistics = run(scenario())
    assert [collate(batch).n_seqs for batch in batches] == [4, 4, 4]
    assert statistics["groups_abandoned"] == 1


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"loss_mask": np.ones(3, bool)}, "3 loss_mask for the 2 tokens"),
        ({"completion": replace(fake_completion([1, 2]), logprobs=np.zeros(1, np.float32))}, "1 logprobs for the 2 tokens"),
        ({"reward": float("nan")}, "the reward nan"),
    ],
)
def test_a_group_that_would_spoil_its_batch_is_refused(broken, reason):
    right = Rollout(fake_completion([1, 2]), "ab", 1.0, {}, np.array([True, False]))
    group = RolloutGroup(0, Prompt("q7", "t", (1,)), (right, right))
    assert GroupRecord.of(group, group_size=2, passes_filter=True).n_answer_tokens == 2
    with pytest.raises(ValueError, match=f"{reason}.*'q7'"):
        GroupRecord.of(replace(group, rollouts=(right, replace(right, **broken))), group_size=2, passes_filter=True)
    with pytest.raises(ValueError, match="2 answers instead of 3 to prompt 'q7'"):
        GroupRecord.of(group, group_size=3, passes_filter=True)


def test_wrong_weights_are_the_callers_to_handle():
    async def scenario():
        controller = make_controller()
        async with serving(FakeEngine(mismatch_at=[0]), controller) as worker:
            await publish(controller, worker, 0)

    with pytest.raises(WeightMismatchError):
        run(scenario())


def test_seeds_depend_on_run_group_and_sample_alone():
    seeds = {sample_seed(run_seed, index, sample) for run_seed in (1, 2) for index in range(50) for sample in range(8)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)
