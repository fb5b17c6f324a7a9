"""Every block of docs/algorithms.md is one that can be trained with."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rl_lightning.cli import RLCLI
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.prompts.jsonl import JsonlPrompts
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.testing import FakeEngine, FakePrompts, FakeReward
from rl_lightning.types import SamplingParams

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
ROWS = [{"model": {"init_args": {"ppo": yaml.safe_load(row)}}} for row in re.findall(r"\| `(\{.*\})` \|", PAGE)]
LEAST = {
    "model": {"class_path": "AsyncPPOModule", "init_args": {"path": "m"}},
    "data": {
        "class_path": "RolloutDataModule",
        "init_args": {
            "prompts": {"class_path": "rl_lightning.prompts.arithmetic.ArithmeticPrompts"},
            "rewards": [{"reward": "rl_lightning.rewards.exact.exact_match"}],
            "engine": {"class_path": "rl_lightning.testing.FakeEngine"},
        },
    },
}


def options(block: dict[str, Any], part: str) -> dict[str, Any]:
    return dict(block.get(part, {}).get("init_args", {}))


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 11 and len(ROWS) == 7


@pytest.mark.parametrize("block", [b for b in BLOCKS if "trainer" not in b] + ROWS, ids=lambda b: str(b)[:80])
def test_module_and_data_take_a_block_and_each_other(block: dict[str, Any]) -> None:
    module, of_data = AsyncPPOModule("m", **options(block, "model")), options(block, "data")
    generation = replace(SamplingParams(max_new_tokens=8192), **of_data.pop("generation", {}))
    data = RolloutDataModule(
        FakePrompts(), [WeightedReward(FakeReward())], "m", engine=FakeEngine(), generation=generation, **of_data
    )
    module.check_data(data, world_size=1)
    for name, value in options(block, "model").get("ppo", {}).items():
        assert getattr(module.ppo, name) == value


def test_a_block_follows_a_recipe_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rl-lightning"])
    monkeypatch.chdir(tmp_path)
    (dapo,) = (block for block in BLOCKS if "success_rate_lb" in options(block, "data"))
    (validation,) = (block for block in BLOCKS if "trainer" in block)
    for name, block in (("recipe", LEAST), ("dapo", dapo), ("validation", validation)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(block))
    cli = RLCLI(["--config=recipe.yaml", "--config=dapo.yaml", "--config=validation.yaml"], run=False)
    data = cli.datamodule
    assert isinstance(data, RolloutDataModule) and isinstance(data.validation_prompts, JsonlPrompts)
    assert (data.success_rates, cli.model.ppo.eps_clip_high) == ((0.01, 0.99), 0.28)
    assert data.validation_generation.greedy and not data.generation.greedy and cli.trainer.val_check_interval == 20
