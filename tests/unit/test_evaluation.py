"""Validation through the engines: it goes first, and leaves the rollouts in flight as they would have been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_worker import publish, run, serving
from training_samples import Alone, make_batch, make_trainer

from rl_lightning.prompts.source import PromptSource
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.rollout.errors import RolloutError
from rl_lightning.rollout.share import Share
from rl_lightning.rollout.workflow import SingleTurnWorkflow
from rl_lightning.testing import FakeEngine, FakePrompts, FakeReward
from rl_lightning.types import Batch, Completion, GenerationRequest, Lease, RolloutGroup, SamplingParams

GREEDY = SamplingParams(max_new_tokens=4, greedy=True)
STEPS = 6


class Recording(FakeEngine):
    """Keeps every request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> Completion:
        self.requests.append(request)
        return await super().generate(request)


@dataclass
class Run:
    """What a short run trained on, what each validation gave, what the engine was asked, and the controller's counts."""

    trained: list[RolloutGroup]
    validated: list[list[RolloutGroup]]
    requests: list[GenerationRequest]
    statistics: dict[str, float]


async def train(*, validate_at: tuple[int, ...]) -> Run:
    """Six steps at eta 2, with validations before some of them while the engine is busy."""
    prompts = FakePrompts(size=50)
    settings = ControllerSettings(
        StalenessGate(2, 2, 100), 2, SamplingParams(max_new_tokens=16), evaluation_group_size=3, evaluation_params=GREEDY
    )
    controller = RolloutController(PromptSource(prompts, shuffle=False), settings, prompts)
    engine, trained, validated = Recording(seconds_per_token=0.002), [], []
    async with serving(engine, controller) as worker:
        await publish(controller, worker, 0)
        for version in range(STEPS):
            if version in validate_at:
                evaluation = await controller.begin_evaluation(range(5))
                share = await controller.take_evaluation(evaluation, wait_s=10)
                assert isinstance(share, Share)
                validated.append(list(share.contents))
            share = await controller.take(version, wait_s=10)
            assert isinstance(share, Share)
            for group in share.contents:
                assert all(0 <= version - r.completion.versions[0] <= 2 for r in group.rollouts)
            trained += share.contents
            await publish(controller, worker, version + 1)
        return Run(trained, validated, engine.requests, await controller.statistics())


def answers(groups: list[RolloutGroup]) -> dict[int, list[list[int]]]:
    return {group.index: [r.completion.token_ids.tolist() for r in group.rollouts] for group in groups}


def test_rollouts_in_flight_are_not_disturbed():
    alone, validating = run(train(validate_at=())), run(train(validate_at=(1, 3)))
    expected, got = answers(alone.trained), answers(validating.trained)
    both = expected.keys() & got.keys()
    assert len(both) >= 8 and {index: got[index] for index in both} == {index: expected[index] for index in both}
    assert validating.statistics["groups_requeued"] == validating.statistics["groups_abandoned"] == 0
    asked = [request.request_id for request in validating.requests]
    assert len(set(asked)) == len(asked), "no answer was begun twice"
    assert len(validating.validated) == 2


def test_every_validation_answers_all_prompts_as_asked_under_the_newest_weights():
    validating = run(train(validate_at=(0, 2)))
    for version, groups in zip((0, 2), validating.validated, strict=True):
        assert [group.prompt.query_id for group in groups] == [f"q{i}" for i in range(5)]
        assert all(len(group.rollouts) == 3 for group in groups)
        assert {int(v) for group in groups for r in group.rollouts for v in r.completion.versions} == {version}
    assert all(request.params.greedy == request.request_id.startswith("eval") for request in validating.requests)


def test_sampled_answers_are_the_same_at_every_validation():
    """So that two validations differ by the weights alone."""
    validating = run(train(validate_at=(0, 2)))
    seeds = [request.seed for request in validating.requests if request.request_id.startswith("eval")]
    first, second = validating.validated
    assert sorted(seeds[:15]) == sorted(seeds[15:]) and answers(first) == answers(second)


def make_data(n_validation: int) -> RolloutDataModule:
    reward = [WeightedReward(FakeReward())]
    return RolloutDataModule(
        FakePrompts(), reward, "m", batch_size=4, engine=FakeEngine(), validation_prompts=FakePrompts(n_validation)
    )


def test_batches_stay_on_the_cpu():
    batch = object()
    assert make_data(2).transfer_batch_to_device(batch, torch.device("meta"), 0) is batch


def test_a_rank_without_validation_prompts_is_refused_before_it_hangs():
    make_data(2)._check_shares(2)
    with pytest.raises(ValueError, match="validation_prompts holds 1 prompts, too few for 2 trainer ranks"):
        make_data(1)._check_shares(2)


def test_accuracy_and_pass_at_k_are_those_of_a_slow_count():
    class Given:
        def __init__(self, batch: Batch) -> None:
            self.batch = batch

        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Any:
            return iter([self.batch])

    batch = make_batch(seed=4, n_groups=6, group_size=3)
    trainer = make_trainer()
    (results,) = trainer.validate(Unscored("m"), Given(batch), verbose=False)
    solved = [any(r.reward > 0 for r in group.rollouts) for group in batch.groups]
    rewards = [r.reward for group in batch.groups for r in group.rollouts]
    assert 0 < sum(solved) < len(solved)
    assert results["val_pass_at_k"] == pytest.approx(sum(solved) / len(solved))
    assert results["val_accuracy"] == pytest.approx(sum(r > 0 for r in rewards) / len(rewards))
    assert results["val_reward"] == pytest.approx(sum(rewards) / len(rewards))


class Unscored(Alone):
    """Validation needs no model: the engines have answered."""

    def configure_model(self) -> None:
        self.model = torch.nn.Linear(1, 1)


def test_a_validation_prompt_that_nobody_can_answer_ends_the_run_with_its_reason() -> None:
    class Refusing(SingleTurnWorkflow):
        async def run(self, lease: Lease, *args: Any) -> RolloutGroup:
            asked.append(lease.index)
            if lease.index == 3:
                raise ValueError("a prompt of 9000 tokens is too long")
            return await super().run(lease, *args)

    async def scenario() -> None:
        prompts = FakePrompts(size=50)
        settings = ControllerSettings(StalenessGate(2, 0, 100), 2, SamplingParams(max_new_tokens=16), evaluation_params=GREEDY)
        controller = RolloutController(PromptSource(prompts, shuffle=False), settings, prompts)
        async with serving(FakeEngine(), controller, Refusing()) as worker:
            await publish(controller, worker, 0)
            evaluation = await controller.begin_evaluation([3])
            await controller.take_evaluation(evaluation, wait_s=1.0)

    asked: list[int] = []
    with pytest.raises(RolloutError, match="validation prompt 3 was given up after 4 attempts: .*9000 tokens is too long"):
        run(scenario())
    assert asked.count(3) == 4
