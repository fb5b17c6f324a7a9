"""A whole training with compiled layers: the first step compiles, later ones of other lengths do not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from training_samples import Alone, fit, make_batch, write_model  # noqa: E402

from rl_lightning.modules.ppo_config import PPOConfig  # noqa: E402


class Counting(Alone):
    """Keeps the statistics of every step."""

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(path, **options)
        self.steps: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.steps.append(self.step_statistics)


@pytest.mark.slow
def test_later_steps_compile_nothing(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen3")
    options: dict[str, Any] = {"ppo": PPOConfig(n_minibatches=2), "max_tokens_per_mb": 60, "share_prompts": True}
    batches = [make_batch(seed, n_groups=2 * seed + 2) for seed in range(4)]
    compiled, plain = Counting(folder, compile=True, gradient_checkpointing="light", **options), Counting(folder, **options)
    for module in (compiled, plain):
        fit(module, batches)
    graphs = [step["compiled_graphs"] for step in compiled.steps]
    assert graphs[0] > 0 and graphs[1:] == [0.0] * 3
    assert [step["compiled_graphs"] for step in plain.steps] == [0.0] * 4
    for name in ("grad_norm", "actor_loss", "entropy"):
        got, expected = ([step[name] for step in module.steps] for module in (compiled, plain))
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-3, atol=1e-5)
