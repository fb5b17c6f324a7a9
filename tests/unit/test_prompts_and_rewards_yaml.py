"""Prompts and rewards are configured by class path or import path in YAML."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from rl_lightning.prompts.dataset import PromptDataset
from rl_lightning.rewards.exact import ExactMatchReward, exact_match
from rl_lightning.rewards.reward import WeightedReward


class Part:
    """Stands for what takes prompts and rewards."""

    def __init__(self, prompts: PromptDataset, rewards: list[WeightedReward]) -> None:
        self.prompts = prompts
        self.rewards = rewards


def built(config: dict[str, Any]) -> Part:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Part, "part")
    parsed = parser.parse_string(yaml.safe_dump({"part": config}))
    part = parser.instantiate_classes(parsed).part
    assert isinstance(part, Part)
    return part


PROMPTS = [
    {
        "class_path": "rl_lightning.prompts.jsonl.JsonlPrompts",
        "init_args": {"path": "x.jsonl", "template_options": {"thinking": True}},
    },
    {"class_path": "rl_lightning.prompts.gym.GymPrompts", "init_args": {"task": "chain_sum", "options": {"min_terms": 2}}},
    {"class_path": "rl_lightning.prompts.arithmetic.ArithmeticPrompts", "init_args": {"operator": "-", "digits": 2}},
    {"class_path": "rl_lightning.testing.FakePrompts"},
]
HALF = "tests.reward_samples.half"
REWARDS = [
    {"reward": "rl_lightning.rewards.exact.exact_match"},
    {"reward": {"class_path": "rl_lightning.rewards.exact.ExactMatchReward", "init_args": {"first_line": True}}, "weight": 0.5},
    {"reward": {"class_path": "rl_lightning.rewards.math.MathReward"}},
    {"reward": {"class_path": "rl_lightning.rewards.gym.GymReward", "init_args": {"extract": "tag"}}},
    {"reward": {"class_path": "rl_lightning.rewards.code.CodeReward", "init_args": {"max_cases": 5}}},
    {"reward": {"class_path": "rl_lightning.rewards.task.TaskReward", "init_args": {"rewards": {"x": HALF}}}},
    {"reward": "tests.reward_samples.length"},
    {"reward": "tests.reward_samples.unannotated"},
    {"reward": {"class_path": "tests.reward_samples.Unannotated", "init_args": {"factor": 3}}},
]


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda p: p["class_path"].rsplit(".", 1)[1])
def test_prompts_by_class_path(prompts: dict[str, Any]) -> None:
    dataset = built({"prompts": prompts, "rewards": REWARDS[:1]}).prompts
    assert type(dataset).__name__ == prompts["class_path"].rsplit(".", 1)[1]
    for name, value in prompts.get("init_args", {}).items():
        assert name == "path" or getattr(dataset, name) == value


def test_rewards_by_class_path_and_import_path() -> None:
    rewards = built({"prompts": PROMPTS[3], "rewards": REWARDS}).rewards
    assert rewards[0].reward is exact_match and isinstance(rewards[1].reward, ExactMatchReward) and rewards[1].reward.first_line
    names = ["exact_match", "ExactMatchReward", "MathReward", "GymReward"]
    names += ["CodeReward", "TaskReward", "length", "unannotated", "Unannotated"]
    assert [term.name for term in rewards] == names
    assert [term.weight for term in rewards] == [1.0, 0.5] + [1.0] * 7
