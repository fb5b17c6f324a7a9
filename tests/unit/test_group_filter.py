"""A user's predicate decides which groups are trained on; the others give their place back, and its failure ends the run."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from test_worker import make_controller, publish, run, serving, train

from rl_lightning.cli import RLCLI
from rl_lightning.failure import may_be_mended_by_restart
from rl_lightning.prompts.source import PromptSource
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.rollout.errors import GroupFilterError
from rl_lightning.rollout.group_filter import GroupFilter
from rl_lightning.rollout.share import Share
from rl_lightning.rollout.worker import WorkerSettings
from rl_lightning.testing import FakeEngine, FakePrompts
from rl_lightning.types import RolloutGroup, SamplingParams


def is_even(group: RolloutGroup) -> bool:
    """Every other prompt."""
    return group.index % 2 == 0


def looks_for_a_level(group: RolloutGroup) -> bool:
    """Fails where the data lacks it."""
    return bool(group.prompt.reference["level"] > 3)


def settings(group_filter: GroupFilter | None) -> WorkerSettings:
    return WorkerSettings("a", "model", room=4, heartbeat_s=0.02, group_filter=group_filter)


def test_groups_that_do_not_pass_are_replaced_and_counted():
    async def scenario() -> tuple[list[Any], dict[str, float]]:
        controller = make_controller(batch=2, eta=1)
        async with serving(FakeEngine(), controller, settings=settings(is_even)) as worker:
            return await train(controller, worker, steps=4), await controller.statistics()

    batches, statistics = run(scenario())
    assert sorted(group.index for batch in batches for group in batch) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert 7 <= statistics["groups_rejected"] <= 10


def test_a_rejected_group_gives_its_place_back_at_once():
    """At eta 0 two groups may be open; both are rejected, and the batch still comes without a new version."""

    async def scenario() -> Any:
        controller = make_controller(batch=2, eta=0)
        async with serving(FakeEngine(), controller, settings=settings(lambda group: group.index >= 6)) as worker:
            await publish(controller, worker, 0)
            share = await controller.take(0, wait_s=10)
            return share, await controller.statistics()

    share, statistics = run(scenario())
    assert isinstance(share, Share) and [group.index for group in share.contents] == [6, 7]
    assert statistics["groups_rejected"] == 6


def test_a_predicate_that_raises_ends_the_run_and_names_itself_and_the_group():
    async def scenario() -> None:
        controller = make_controller()
        async with serving(FakeEngine(), controller, settings=settings(looks_for_a_level)) as worker:
            await train(controller, worker, steps=1)

    expected = r"data.group_filter looks_for_a_level raised KeyError: 'level' on prompt group \d \(q\d\); mend it"
    with pytest.raises(GroupFilterError, match=expected) as error:
        run(scenario())
    assert not may_be_mended_by_restart(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value), "it travels between processes"


def test_validation_is_not_filtered():
    async def scenario() -> Any:
        only_validation = ControllerSettings(StalenessGate(2, 0, 9), 2, SamplingParams(max_new_tokens=4), n_groups=0)
        prompts = FakePrompts()
        controller = RolloutController(PromptSource(prompts, shuffle=False), only_validation, prompts)
        async with serving(FakeEngine(), controller, settings=settings(looks_for_a_level)) as worker:
            evaluation = await controller.begin_evaluation([1, 3])
            await publish(controller, worker, 0)
            return await controller.take_evaluation(evaluation, wait_s=10)

    share = run(scenario())
    assert isinstance(share, Share) and [group.index for group in share.contents] == [1, 3]


def test_it_is_given_by_import_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["rl-lightning"])
    cli = RLCLI(
        [
            "--model=AsyncPPOModule",
            "--model.path=m",
            "--data=RolloutDataModule",
            "--data.prompts=rl_lightning.prompts.arithmetic.ArithmeticPrompts",
            '--data.rewards=[{"reward": "rl_lightning.rewards.exact.exact_match"}]',
            "--data.engine=rl_lightning.testing.FakeEngine",
            "--data.group_filter=test_group_filter.is_even",
        ],
        run=False,
    )
    assert isinstance(cli.datamodule, RolloutDataModule) and cli.datamodule.group_filter is is_even
