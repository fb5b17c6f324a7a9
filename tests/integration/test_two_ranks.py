"""Two ranks over gloo make the same update as one."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from rl_lightning.batching.balance import balance
from rl_lightning.batching.collate import collate
from rl_lightning.modules import data_parallel
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.types import RolloutGroup

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from training_samples import Alone, fit, make_groups, norm_in_float64, write_model  # noqa: E402


class Rank(LightningEnvironment):
    """One of two processes that the test started."""

    def __init__(self, rank: int, port: int) -> None:
        super().__init__()
        self._rank, self._main_port = rank, port

    creates_processes_externally = True

    @property
    def main_port(self) -> int:
        return self._main_port

    def local_rank(self) -> int:
        return self._rank

    def global_rank(self) -> int:
        return self._rank

    def world_size(self) -> int:
        return 2

    def set_global_rank(self, rank: int) -> None: ...

    def set_world_size(self, size: int) -> None: ...


class Exact(Alone):
    """Critic and reference are of float64 to the last digit too."""

    def configure_model(self) -> None:
        super().configure_model()
        if self.critic is not None:
            norm_in_float64(self.critic)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.reference is not None:
            norm_in_float64(self.reference.model)


def train(folder: str, out: str, batches: Sequence[Sequence[RolloutGroup]], ppo: dict[str, Any], **options: Any) -> None:
    """Trains on `batches` and saves what rank 0 knows afterwards."""
    torch.set_num_threads(1)
    data_parallel.BUCKET_BYTES = 1 << 13  # gradients travel in several messages
    model: dict[str, Any] = {"dtype": "float64", "optimizer": OptimizerConfig(lr=1e-3), "max_tokens_per_mb": 40}
    if not ppo.get("disable_value", True):
        model |= {"init_critic_from_actor": True, "critic_optimizer": OptimizerConfig(lr=1e-2)}
    module = Exact(folder, ppo=PPOConfig(**ppo), **model)
    trainer = fit(module, [collate(groups, version=step) for step, groups in enumerate(batches)], **options)
    if trainer.is_global_zero:
        of_cutting = ("time/", "packing_efficiency")  # depend on how many ranks there are
        statistics = {k: v for k, v in module.step_statistics.items() if not k.startswith(of_cutting)}
        reference = {} if module.reference is None else module.reference.state_dict()
        weights = module.state_dict() | {f"reference.{name}": weight for name, weight in reference.items()}
        torch.save((weights, statistics, module.step_histograms, trainer.global_step), out)


def train_rank(rank: int, port: int, folder: str, out: str, shares: list[list[list[RolloutGroup]]], ppo: dict[str, Any]) -> None:
    """What each of the two processes runs."""
    strategy = DDPStrategy(cluster_environment=Rank(rank, port), process_group_backend="gloo")
    train(folder, out, shares[rank], ppo, strategy=strategy, devices=2)


OBJECTIVES: dict[str, dict[str, Any]] = {
    "actor alone": {"mask_too_long": True, "discount": 0.9},
    "critic and moving reference": {
        "disable_value": False, "discount": 0.9, "gae_lambda": 0.8, "kl_ctl": 0.1, "ref_ema_eta": 0.2,
        "use_adaptive_kl_ctl": True, "adaptive_kl_target": 2.0, "adaptive_kl_horizon": 50.0,
    },
    "answers and drift": {
        "surrogate": "gspo", "correction": "m2po", "m2_threshold": 0.5, "aggregation": "sequence-mean-token-mean",
        "advantage": "reinforce++-baseline",
    },
}  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_train_as_one(tmp_path: Path, objective: str) -> None:
    ppo = {"n_minibatches": 1, **OBJECTIVES[objective]}
    folder = write_model(tmp_path / "model")
    steps = [make_groups(seed, n_groups=4, version=seed) for seed in range(2)]
    longer = [replace(g, index=g.index + 2) for g in make_groups(5, n_groups=2, answer_lens=(25, 30))]
    steps[1] = [*steps[1][:2], *longer]  # one rank has more micro-batches than the other
    train(folder, str(tmp_path / "one.pt"), steps, ppo)
    parts = [balance([g.n_tokens for g in groups], 2) for groups in steps]
    parts[1] = [[0, 1], [2, 3]]
    shares = [[[groups[i] for i in part[rank]] for groups, part in zip(steps, parts, strict=True)] for rank in range(2)]
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    mp.spawn(train_rank, (port, folder, str(tmp_path / "two.pt"), shares, ppo), nprocs=2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for name, weight in one[0].items():
        torch.testing.assert_close(two[0][name], weight, rtol=1e-7, atol=1e-9)
    assert one[0].keys() == two[0].keys()
    assert two[1] == pytest.approx(one[1], rel=1e-6, abs=1e-9)
    assert sorted(two[2]["reward"].tolist()) == sorted(one[2]["reward"].tolist())
    assert one[3] == two[3] == 2
