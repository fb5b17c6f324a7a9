import asyncio

import pytest

from rl_lightning.failure import may_be_mended_by_restart
from rl_lightning.prompts.source import PromptSource
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.errors import RewardsError, RolloutError, StepLostError
from rl_lightning.rollout.group_record import GroupRecord
from rl_lightning.rollout.share import Share, Waiting
from rl_lightning.testing import FakeClock, FakePrompts
from rl_lightning.types import SamplingParams

DONE = GroupRecord(n_tokens=10, n_answer_tokens=4, success_rate=0.5)
AT_ONCE = 0.0


def make_controller(batch=2, eta=0, concurrent=100, clock=None, **kwargs):
    source = PromptSource(FakePrompts(size=100), shuffle=False)
    settings = ControllerSettings(
        StalenessGate(batch, eta, concurrent), group_size=2, params=SamplingParams(max_new_tokens=4), **kwargs
    )
    return RolloutController(source, settings, FakePrompts(size=5), clock or FakeClock())


async def ready(controller, *workers, version=0):
    for worker in workers:
        await controller.register(worker, f"{worker}-1", None)
    await controller.publish(version, workers)


async def put_all(controller, worker, leases, record=DONE):
    for lease in leases:
        assert await controller.put(worker, lease, record, lease.index)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def test_nothing_is_leased_before_a_worker_proved_the_published_weights():
    async def scenario():
        controller = make_controller()
        await controller.register("a", "a-1", None)
        assert await controller.lease("a", 9, poll_s=0.01) == []
        await controller.publish(0, ["a"])
        assert [x.index for x in await controller.lease("a", 9)] == [0, 1]
        await controller.register("b", "b-1", None)
        await controller.publish(1, ["a"])
        assert await controller.lease("b", 9, poll_s=0.01) == []
        assert (await controller.take(1, wait_s=AT_ONCE)).unsynced == (("b", None),)

    run(scenario())


def test_a_request_that_comes_again_has_the_same_leases_until_the_worker_registers_anew():
    async def scenario():
        controller = make_controller(batch=4)
        await ready(controller, "a", "b")
        first = await controller.lease("a", 2, request=0)
        assert await controller.lease("a", 2, request=0) == first
        assert [x.index for x in await controller.lease("a", 1, request=1)] == [2]
        assert [x.index for x in await controller.lease("b", 1, request=1)] == [3]
        await ready(controller, "a")
        again = await controller.lease("a", 9, request=1)
        assert [x.index for x in again] == [0, 1, 2]

    run(scenario())


def test_a_request_that_comes_again_while_it_waits_is_answered_once():
    async def scenario():
        controller = make_controller()
        await controller.register("a", "a-1", None)
        asking = [asyncio.create_task(controller.lease("a", 9, request=0)) for _ in range(2)]
        await asyncio.sleep(0)
        await controller.publish(0, ["a"])
        first, again = await asyncio.gather(*asking)
        assert [x.index for x in first] == [0, 1] and again == first

    run(scenario())


def test_a_batch_reaches_every_rank_once_and_balanced():
    async def scenario():
        controller = make_controller(batch=4)
        await ready(controller, "a")
        leases = await controller.lease("a", 9)
        for lease, n_tokens in zip(leases, (10, 1, 9, 2), strict=True):
            await controller.put("a", lease, GroupRecord(n_tokens, 1, 1.0), lease.index)
        shares = [await controller.take(0, rank, 2) for rank in (0, 1)]
        assert sorted(shares[0].contents + shares[1].contents) == [0, 1, 2, 3]
        assert {frozenset(s.contents) for s in shares} == {frozenset({0, 1}), frozenset({2, 3})}, "10 + 1 against 9 + 2"

    run(scenario())


def test_a_waiting_trainer_is_woken_and_a_late_one_is_told_what_is_missing():
    async def scenario():
        clock = FakeClock()
        controller = make_controller(clock=clock)
        await ready(controller, "a")
        leases = await controller.lease("a", 9)
        clock.advance(7)
        waiting = await controller.take(0, wait_s=AT_ONCE)
        assert isinstance(waiting, Waiting)
        assert "step 1 needs 2 prompt groups: 0 finished, 2 leased to 1 live workers" in waiting.report
        assert "group 0 on a for 7 s" in waiting.report
        taking = asyncio.create_task(controller.take(0, wait_s=5))
        await asyncio.sleep(0)
        await put_all(controller, "a", leases)
        assert await taking == Share(0, (0, 1))

    run(scenario())


def test_a_silent_worker_loses_its_leases_and_its_late_answer_is_dropped():
    async def scenario():
        clock = FakeClock()
        controller = make_controller(clock=clock, worker_timeout_s=60)
        await ready(controller, "a", "b")
        (lost, *_) = await controller.lease("a", 1)
        clock.advance(61)
        await controller.heartbeat("b", "b-1", {})
        assert await controller.heartbeat("a", "a-1", {}) is None, "it must register again"
        (again,) = await controller.lease("b", 1)
        assert (again.index, again.prompt) == (lost.index, lost.prompt)
        assert not await controller.put("a", lost, DONE, "late")
        assert await controller.put("b", again, DONE, "once")

    run(scenario())


def test_a_group_that_takes_too_long_is_revoked_and_leased_again():
    async def scenario():
        clock = FakeClock()
        controller = make_controller(batch=1, clock=clock, lease_timeout_s=100, worker_timeout_s=1000)
        await ready(controller, "a")
        (lease,) = await controller.lease("a", 9)
        clock.advance(101)
        assert await controller.heartbeat("a", "a-1", {}) == [lease.submission]
        (again,) = await controller.lease("a", 9)
        assert again.index == lease.index and again.submission != lease.submission

    run(scenario())


def test_a_validation_prompt_that_takes_too_long_is_answered_by_another_worker():
    async def scenario():
        clock = FakeClock()
        controller = make_controller(clock=clock, lease_timeout_s=100, worker_timeout_s=1000)
        await ready(controller, "a", "b")
        evaluation = await controller.begin_evaluation([1])
        (lease,) = await controller.lease("a", 1)
        clock.advance(101)
        assert await controller.heartbeat("a", "a-1", {}) == [-lease.submission]
        (again,) = await controller.lease("b", 1)
        assert again.evaluation and again.index == lease.index and again.submission != lease.submission
        await controller.put("a", lease, DONE, "late")
        await controller.put("b", again, DONE, "once")
        assert (await controller.take_evaluation(evaluation)).contents == ("once",)

    run(scenario())


def test_a_validation_prompt_that_always_takes_too_long_ends_the_run():
    async def scenario():
        clock = FakeClock()
        controller = make_controller(clock=clock, lease_timeout_s=100, worker_timeout_s=1000)
        await ready(controller, "a")
        evaluation = await controller.begin_evaluation([1])
        for _ in range(4):
            assert (await controller.lease("a", 1))[0].evaluation
            clock.advance(101)
            await controller.heartbeat("a", "a-1", {})
        with pytest.raises(RolloutError, match=r"prompt 1 was given up after 4 attempts: not answered within 100 s"):
            await controller.take_evaluation(evaluation)

    run(scenario())


def test_a_worker_whose_group_was_revoked_gets_as_much_as_the_others_again():
    async def scenario():
        clock = FakeClock()
        controller = make_controller(eta=9, clock=clock, lease_timeout_s=10, worker_timeout_s=1000, policy="least_requests")
        await ready(controller, "a", "b")
        running = lambda: {entry.name: entry.running for entry in controller._roster}  # noqa: E731
        (revoked,) = await controller.lease("a", 1)
        clock.advance(11)
        assert await controller.heartbeat("a", "a-1", {}) == [revoked.submission]
        assert running() == {"a": 0, "b": 0}
        (held,) = await controller.lease("a", 1)
        await controller.give_back("a", revoked, "it ended as it was revoked", counts=True)
        assert running() == {"a": 1, "b": 0}
        await controller.put("a", held, DONE, 0)
        assert running() == {"a": 0, "b": 0}

    run(scenario())


def test_a_restarted_worker_loses_its_leases_and_is_counted():
    async def scenario():
        controller = make_controller()
        await ready(controller, "a")
        first = await controller.lease("a", 9)
        await controller.register("a", "a-2", None)
        assert await controller.lease("a", 9, poll_s=0.01) == [], "its new engine has not proved the weights"
        await controller.publish(0, ["a"])
        assert [x.index for x in await controller.lease("a", 9)] == [x.index for x in first]
        assert (await controller.statistics())["engine_restarts"] == 1

    run(scenario())


def test_rejected_groups_give_their_place_back_until_the_run_says_that_all_are_rejected():
    async def scenario():
        controller = make_controller(success_rate_lb=0.9, max_rejections=5)
        await ready(controller, "a")
        for _ in range(2):
            await put_all(controller, "a", await controller.lease("a", 9))
        assert (await controller.statistics())["groups_rejected"] == 4
        await put_all(controller, "a", (await controller.lease("a", 1)))
        with pytest.raises(RolloutError, match=r"5 prompt groups in a row .*success_rate_lb=0.9") as raised:
            await controller.take(0)
        assert not may_be_mended_by_restart(raised.value)

    run(scenario())


FAILED = GroupRecord(n_tokens=10, n_answer_tokens=4, success_rate=0.0, failures={"error": 2}, is_scored=False)


def test_rewards_that_fail_on_all_answers_of_the_first_batch_end_the_run():
    async def scenario():
        controller = make_controller(batch=9)
        await ready(controller, "a")
        await put_all(controller, "a", await controller.lease("a", 8), FAILED)
        await put_all(controller, "a", await controller.lease("a", 1), FAILED)
        with pytest.raises(RewardsError, match=r"failed on all answers to the first 9 prompts \(18 x error\)") as raised:
            await controller.check()
        assert not may_be_mended_by_restart(raised.value)

    run(scenario())


def test_rewards_that_all_fail_end_the_run_of_a_trainer_that_never_waits():
    async def scenario():
        controller = make_controller(batch=4, eta=2)
        await ready(controller, "a")
        await put_all(controller, "a", await controller.lease("a", 12), FAILED)
        with pytest.raises(RewardsError, match=r"failed on all answers to the first 8 prompts"):
            await controller.take(0)

    run(scenario())


def test_rewards_that_worked_once_may_fail():
    async def scenario():
        controller = make_controller(batch=4, eta=2)
        await ready(controller, "a")
        await put_all(controller, "a", await controller.lease("a", 1))
        await put_all(controller, "a", await controller.lease("a", 11), FAILED)
        assert isinstance(await controller.take(0), Share)

    run(scenario())


def test_an_answer_that_always_fails_is_given_up_and_the_next_prompt_takes_its_place():
    async def scenario():
        controller = make_controller(batch=1)
        await ready(controller, "a")
        for _ in range(4):
            (lease,) = await controller.lease("a", 9)
            assert lease.index == 0
            await controller.give_back("a", lease, "ValueError: boom", counts=True)
        (lease,) = await controller.lease("a", 9)
        assert lease.index == 1

    run(scenario())


@pytest.mark.parametrize("policy", ["round_robin", "least_requests", "least_token_usage"])
def test_work_is_spread_over_the_workers_that_wait(policy):
    async def scenario():
        controller = make_controller(batch=4, policy=policy)
        for worker in "ab":
            await controller.register(worker, f"{worker}-1", None)
        asking = [asyncio.create_task(controller.lease(worker, 9)) for worker in "ab"]
        await asyncio.sleep(0)
        await controller.publish(0, ["a", "b"])
        assert [len(await task) for task in asking] == [2, 2]

    run(scenario())


def test_evaluation_goes_first_beside_training_and_survives_a_worker():
    async def scenario():
        controller = make_controller(batch=1, evaluation_group_size=3, evaluation_params=SamplingParams(greedy=True))
        await ready(controller, "a", "b")
        evaluation = await controller.begin_evaluation([1, 3])
        leases = await controller.lease("a", 2)
        assert [(x.index, x.evaluation, x.group_size, x.params.greedy) for x in leases] == [
            (1, True, 3, True),
            (3, True, 3, True),
        ]
        await controller.put("a", leases[1], DONE, "three")
        await controller.register("a", "a-2", None)
        waiting = await controller.take_evaluation(evaluation, wait_s=AT_ONCE)
        assert "1 of 2 validation prompts answered" in waiting.report
        (again, training) = await controller.lease("b", 9)
        assert again.index == 1 and again.evaluation and not training.evaluation
        await controller.put("b", again, DONE, "one")
        assert await controller.take_evaluation(evaluation) == Share(0, ("one", "three"))

    run(scenario())


def test_state_goes_on_where_it_stood():
    async def scenario():
        controller = make_controller(eta=1)
        await ready(controller, "a")
        leases = await controller.lease("a", 9)
        await put_all(controller, "a", leases[:2])
        await controller.take(0)
        resumed = make_controller(eta=1)
        await resumed.load_state_dict(await controller.state_dict(1))
        await ready(resumed, "a", version=1)
        assert [x.index for x in await resumed.lease("a", 9)] == [2, 3, 4, 5]

    run(scenario())


def test_groups_that_were_lost_with_their_node_are_answered_again_for_the_same_step():
    async def scenario():
        controller = make_controller(batch=3, eta=0)
        await ready(controller, "a")
        await put_all(controller, "a", await controller.lease("a", 9))
        assert (await controller.take(0)).contents == (0, 1, 2)
        await controller.lost(0, 0, [1])
        assert isinstance(await controller.take(0, wait_s=AT_ONCE), Waiting)
        (again,) = await controller.lease("a", 9)
        assert again.index == 1
        await controller.put("a", again, DONE, "again")
        assert (await controller.take(0)).contents == (0, 2, "again")
        with pytest.raises(StepLostError, match="batch of step 2 was lost"):
            await controller.lost(1, 0, [0])

    run(scenario())


@pytest.mark.parametrize("eta", [0, 1])
def test_two_ranks_that_lost_groups_with_the_same_node_both_go_on(eta):
    async def scenario():
        controller = make_controller(batch=4, eta=eta)
        await ready(controller, "a")
        await put_all(controller, "a", await controller.lease("a", 9))
        shares = [await controller.take(0, rank, 2) for rank in (0, 1)]
        await controller.lost(0, 0, [0])
        await controller.lost(0, 1, [0, 1])
        await put_all(controller, "a", await controller.lease("a", 9))
        again = [await controller.take(0, rank, 2, wait_s=AT_ONCE) for rank in (0, 1)]
        assert all(isinstance(share, Share) and len(share.contents) == 2 for share in again), again
        assert again[0].contents[0] == shares[0].contents[1]
        assert len({content for share in again for content in share.contents}) == 4

    run(scenario())


def test_a_new_trainer_begins_anew_and_what_the_old_one_asked_for_is_void():
    async def scenario():
        controller = make_controller(eta=1)
        await ready(controller, "a")
        old = await controller.lease("a", 9)
        waiting = asyncio.create_task(controller.lease("a", 9))
        await asyncio.sleep(0)
        await controller.begin()
        assert await waiting == [], "the worker asks again at once"
        assert await controller.heartbeat("a", "a-1", {}) is None, "it must register again"
        assert not await controller.put("a", old[0], DONE, "late")
        await ready(controller, "a")
        new = await controller.lease("a", 9)
        assert [x.index for x in new] == [x.index for x in old]
        assert not {x.submission for x in new} & {x.submission for x in old}

    run(scenario())


def test_a_restarted_controller_goes_on_from_what_rank_0_got_with_its_share():
    async def scenario():
        controller = make_controller(eta=1)
        await ready(controller, "a")
        await put_all(controller, "a", (await controller.lease("a", 9))[:3])
        assert (await controller.take(0, rank=1, world_size=2)).state is None
        state = (await controller.take(0, rank=0, world_size=2)).state
        restarted = make_controller(eta=1)
        await restarted.begin(state, published=True)
        await restarted.register("a", "a-1", None)
        assert (await restarted.take(1, wait_s=AT_ONCE)).unsynced == (("a", None),), "it asks for the weights by itself"
        with pytest.raises(StepLostError, match="batch of step 1 was lost"):
            await restarted.take(0, rank=1, world_size=2)
        await restarted.publish(1, ["a"])
        assert [x.index for x in await restarted.lease("a", 9)] == [2, 3, 4, 5]

    run(scenario())
