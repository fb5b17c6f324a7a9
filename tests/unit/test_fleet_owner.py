"""Whose the engines are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from rl_lightning.rewards.exact import exact_match
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.testing import FakeEngine, FakePrompts


def test_several_ranks_without_a_ray_strategy_are_refused() -> None:
    data: Any = RolloutDataModule(FakePrompts(), [WeightedReward(exact_match)], "m", engine=FakeEngine())
    data.trainer = SimpleNamespace(world_size=2, strategy=DDPStrategy())
    with pytest.raises(ValueError, match=r"trainer.strategy=ray .* \(it is DDPStrategy\); or set trainer.devices=1"):
        data.setup("fit")
