"""The loop on one GPU that trainer and SGLang share, and on two. Skipped where there is none; see CONTRIBUTING.md."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.strategies.ray import RayStrategy
from rl_lightning.types import SamplingParams
from tests.samples import LetterPrompts, share_of_even_digits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 16
SHOWN = ("task_reward", "head_offpolicyness", "engine_logprob_diff", "engine_logprob_diff_max", "time/update", "wait_s")
SERVER = {
    "mem_fraction_static": 0.2,
    "attention_backend": "fa3",
    "skip_server_warmup": True,
    "cuda_graph_max_bs": 160,
    "mm_feature_transport": "cpu",
    "cuda_graph_backend_prefill": "disabled",
}


class Recorder(pl.Callback):
    """Statistics, versions and memory of every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.staleness: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.staleness += [batch.version - v for v in batch.versions[batch.versions >= 0].unique().tolist()]
        sync = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("time/")}
        self.rows.append({**pl_module.step_statistics, **sync, "wait_s": batch.wait_s})


def make_parts(folder: Path, ray_init: dict[str, Any], **options: Any) -> tuple[AsyncPPOModule, RolloutDataModule]:
    model = write_tiny_model(folder / "model", hidden=256, layers=4)
    data = RolloutDataModule(
        LetterPrompts(512),
        [WeightedReward(share_of_even_digits)],
        str(model),
        batch_size=16,
        group_size=8,
        generation=SamplingParams(max_new_tokens=32),
        engine=SGLangEngine(server_args=SERVER),
        max_head_offpolicyness=2,
        ray_init=ray_init,
        **{"gpus_per_engine": 0.4, "weight_transport": "disk", **options},
    )
    ppo = PPOConfig(n_minibatches=2, group_adv_norm=True, adv_norm=False)
    return AsyncPPOModule(str(model), optimizer=OptimizerConfig(lr=5e-4), ppo=ppo), data


def make_trainer(steps: int, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="gpu", devices=1, max_steps=steps, **quiet, **options)


@pytest.fixture
def ray_init() -> dict[str, Any]:
    return {"address": "local", "num_gpus": 1, "include_dashboard": False, "_temp_dir": tempfile.mkdtemp(dir="/tmp")}


def test_asynchronous_ppo_learns_beside_its_engine_on_one_gpu(tmp_path: Path, ray_init: dict[str, Any]) -> None:
    module, data = make_parts(tmp_path, ray_init)
    recorder = Recorder()
    make_trainer(STEPS, callbacks=[recorder]).fit(module, datamodule=data)
    for row in recorder.rows:
        print({name: round(row[name], 4) for name in SHOWN if name in row})
    assert len(recorder.rows) == STEPS and max(recorder.staleness) <= 2
    same_version = [row["engine_logprob_diff"] for row in recorder.rows if "engine_logprob_diff" in row]
    assert same_version and max(same_version) < 0.05, "bf16 engine against float32 trainer"
    first, last = recorder.rows[0]["task_reward"], recorder.rows[-1]["task_reward"]
    assert last > first + 0.2, (first, last)


def test_the_same_through_ray_strategy_in_bfloat16_autocast(tmp_path: Path, ray_init: dict[str, Any]) -> None:
    module, data = make_parts(tmp_path, ray_init)
    strategy = RayStrategy(num_workers=1, num_gpus_per_worker=0.5, ray_init=ray_init)
    trainer = make_trainer(STEPS, strategy=strategy, precision="bf16-mixed")
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print({name: round(metrics[name], 4) for name in SHOWN if name in metrics})
    assert trainer.global_step == STEPS and metrics["head_offpolicyness_max"] <= 2
    assert metrics["task_reward"] > 0.4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_weights_reach_an_engine_on_another_gpu_by_nccl(tmp_path: Path, ray_init: dict[str, Any]) -> None:
    ray_init["num_gpus"] = 2
    module, data = make_parts(tmp_path, ray_init, gpus_per_engine=1, weight_transport="distributed")
    strategy = RayStrategy(num_workers=1, num_gpus_per_worker=1, ray_init=ray_init)
    trainer = make_trainer(STEPS, strategy=strategy)
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print({name: round(metrics[name], 4) for name in (*SHOWN, "time/weight_sync", "time/generation_paused") if name in metrics})
    assert trainer.global_step == STEPS and metrics["head_offpolicyness_max"] <= 2
    assert metrics["task_reward"] > 0.4
