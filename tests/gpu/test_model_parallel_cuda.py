"""A model cut over two GPUs trains as on one, over NCCL. Skipped where there are not two; see CONTRIBUTING.md."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lightning.strategies import RayModelParallelStrategy
from rl_lightning.strategies.cluster import disconnect

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("unit", "integration")]

from test_model_parallel import OBJECTIVES, make_module, make_steps, train  # noqa: E402
from training_samples import write_model  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

LAYOUTS = {
    "FSDP2": {"tensor_parallel_size": 1},
    "tensor parallel": {"tensor_parallel_size": 2},
    "FSDP2, offloaded": {"tensor_parallel_size": 1, "cpu_offload": True},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, Any]]:
    """One Ray cluster with both GPUs."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield {"address": "local", "num_cpus": 8, "num_gpus": 2, "include_dashboard": False, "_temp_dir": folder}
        disconnect()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_on_two_gpus_trains_as_on_one(cluster: dict[str, Any], tmp_path: Path, layout: str) -> None:
    ppo = OBJECTIVES["critic and moving reference"]
    folder = write_model(tmp_path / "model", "qwen3", hidden_size=64, head_dim=16)
    options: dict[str, Any] = {"dtype": "float32", "max_tokens_per_mb": 64}
    one, weights = train(tmp_path / "one.pt", make_module(folder, ppo, **options), make_steps(), accelerator="gpu")
    strategy = RayModelParallelStrategy(num_workers=2, num_gpus_per_worker=1, ray_init=cluster, **LAYOUTS[layout])
    module = make_module(folder, ppo, **options)
    many, pieced = train(tmp_path / "many.pt", module, make_steps(), strategy=strategy, accelerator="gpu", devices=1)
    assert many.losses == pytest.approx(one.losses, rel=1e-3, abs=1e-4)
    assert many.norms == pytest.approx(one.norms, rel=1e-3)
    for name, weight in weights.items():
        torch.testing.assert_close(pieced[name].to(weight.device), weight, rtol=1e-2, atol=2e-4)
