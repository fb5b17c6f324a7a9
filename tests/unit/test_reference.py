"""The reference: KL in the reward, a weight that adapts, weights that follow; no copy where it is not asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_samples import Alone, Batches, fit, make_batch, make_trainer, norm_in_float64, padded_logprobs, write_model

from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.types import Batch

EXACT: dict[str, Any] = {"dtype": "float64", "optimizer": OptimizerConfig(lr=1e-2)}
ADAPTIVE: dict[str, Any] = {"use_adaptive_kl_ctl": True, "adaptive_kl_target": 2.0, "adaptive_kl_horizon": 50.0}


class WithReference(Alone):
    """Its reference is of float64 to the last digit too."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.reference is not None:
            norm_in_float64(self.reference.model)

    def configure_model(self) -> None:
        super().configure_model()
        if self.critic is not None:
            norm_in_float64(self.critic)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an actor and of another model."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("actor", "other"))
    return [write_model(first, num_hidden_layers=1), write_model(second, num_hidden_layers=1, intermediate_size=40)]


def kl_of(batch: Batch, folder: str, estimator: str = "k1", temperature: float = 1.0) -> Tensor:
    """(T,) by an ordinary padded pass."""
    plain = Alone(folder, dtype="float64")
    plain.configure_model()
    with torch.no_grad():
        gap = batch.behav_logprobs.double() - padded_logprobs(plain.model, batch, temperature)
    return {"k1": gap, "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_enters_the_reward_token_by_token(folders: list[str], estimator: Any) -> None:
    batch = make_batch(seed=51)
    ppo = PPOConfig(n_minibatches=1, kl_ctl=0.3, kl_estimator=estimator, discount=0.9, gae_lambda=0.8, adv_norm=False)
    seen = []

    class Watched(WithReference):
        def compute_advantages(self, batch: Batch) -> Tensor:
            seen.append(super().compute_advantages(batch))
            return seen[-1]

    module = Watched(folders[0], ppo=ppo, ref_path=folders[1], max_tokens_per_mb=40, **EXACT)
    fit(module, [batch])
    kl, mask = kl_of(batch, folders[1], estimator), batch.loss_mask
    want = torch.zeros(len(mask), dtype=torch.float64)
    for i, (a, b) in enumerate(zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist(), strict=False)):
        tokens, ahead = [t for t in range(a, b) if mask[t]], 0.0
        for t in reversed(tokens):
            ahead = -0.3 * float(kl[t]) + (5 * float(batch.rewards[i]) if t == tokens[-1] else 0.0) + 0.72 * ahead
            want[t] = ahead
    torch.testing.assert_close(seen[0][mask].double(), want[mask], rtol=1e-6, atol=1e-6)
    stats, n_tokens = module.step_statistics, int(mask.sum())
    assert stats["kl_reward"] == pytest.approx(-0.3 * float(kl[mask].mean()), rel=1e-9)
    assert stats["ref_kl"] == pytest.approx(float(kl[mask].sum()) / batch.n_seqs, rel=1e-9)
    assert stats["final_reward"] == pytest.approx(stats["kl_reward"] + 5 * float(batch.rewards.sum()) / n_tokens, rel=1e-9)
    assert stats["kl_ctl"] == 0.3


def test_group_estimators_leave_the_kl_alone(folders: list[str]) -> None:
    batch = make_batch(seed=52)
    modules = [Alone(folders[0], ppo=PPOConfig(n_minibatches=1, advantage="grpo", kl_ctl=kl)) for kl in (0.0, 0.1)]
    fit(modules[1], [batch])
    scored = modules[1]._ask_others(batch)
    difference = (modules[1].compute_advantages(scored) - modules[0].compute_advantages(batch))[batch.loss_mask]
    penalties = modules[1].spread(torch.zeros(batch.n_seqs), scored)[batch.loss_mask]
    torch.testing.assert_close(difference, penalties, atol=1e-5, rtol=1e-5)
    assert float(penalties.abs().min()) > 0


def test_the_reference_is_scored_at_the_sampling_temperature(folders: list[str]) -> None:
    module, batch = WithReference(folders[0], ppo=PPOConfig(n_minibatches=1, kl_ctl=0.1), **EXACT), make_batch(seed=53)
    module.temperature = 0.6
    fit(module, [batch])
    kl = kl_of(batch, folders[0], temperature=0.6)[batch.loss_mask]
    assert module.step_statistics["ref_kl"] == pytest.approx(float(kl.sum()) / batch.n_seqs, rel=1e-9)


def test_there_is_no_copy_without_kl_and_none_in_checkpoints(folders: list[str], tmp_path: Path) -> None:
    stored = []
    for kl_ctl in (0.0, 0.1):
        module = Alone(folders[0], ppo=PPOConfig(n_minibatches=1, kl_ctl=kl_ctl))
        trainer = fit(module, [make_batch()])
        assert (module.reference is None) == (kl_ctl == 0) and ("kl_ctl" in module.step_statistics) == (kl_ctl > 0)
        assert len(list(module.parameters())) == len(list(module.model.parameters()))
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        stored.append(torch.load(tmp_path / "run.ckpt", weights_only=True))
        Alone.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True, strict=True)
    assert stored[0].keys() == stored[1].keys() and stored[0]["state_dict"].keys() == stored[1]["state_dict"].keys()


def test_a_static_reference_stays_where_training_began(folders: list[str]) -> None:
    module = Alone(folders[0], ppo=PPOConfig(n_minibatches=1, kl_ctl=0.1), **EXACT)
    start = Alone(folders[0], dtype="float64")
    start.configure_model()
    fit(module, [make_batch(seed=s) for s in (0, 1)])
    assert module.reference is not None
    for own, first in zip(module.reference.model.parameters(), start.model.parameters(), strict=True):
        assert torch.equal(own, first) and not own.requires_grad and own.grad is None


def test_the_weight_adapts_to_the_kl_of_the_answers(folders: list[str]) -> None:
    batches = [make_batch(seed=s) for s in (54, 55)]
    module = WithReference(folders[0], ppo=PPOConfig(n_minibatches=1, kl_ctl=0.1, **ADAPTIVE), **EXACT)
    fit(module, batches)
    expected, used = 0.1, []
    for batch in batches:
        kl = float(kl_of(batch, folders[0])[batch.loss_mask].sum()) / batch.n_seqs
        used.append(expected)
        expected *= 1 + min(max(kl / 2.0 - 1, -0.2), 0.2) * 12 / 50
    assert module.step_statistics["kl_ctl"] == pytest.approx(used[-1]) and module.kl_ctl == pytest.approx(expected)
    assert expected != pytest.approx(0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_moving_reference_follows_in_small_steps(folders: list[str], dtype: Any) -> None:
    ppo = PPOConfig(n_minibatches=1, kl_ctl=0.1, ref_ema_eta=0.01)
    module = Alone(folders[0], ppo=ppo, dtype=dtype, optimizer=OptimizerConfig(lr=1e-2))
    module.configure_model()
    start = {name: p.detach().float().clone() for name, p in module.model.named_parameters()}
    fit(module, [make_batch()])
    assert module.reference is not None
    moved = module.reference.state_dict()
    for name, parameter in module.model.named_parameters():
        want = start[name] + 0.01 * (parameter.detach().float() - start[name])
        torch.testing.assert_close(moved[name], want)
        torch.testing.assert_close(dict(module.reference.model.named_parameters())[name].detach(), want.to(parameter.dtype))
    assert any(not torch.equal(moved[name], start[name]) for name in start)


def test_a_reference_of_another_shape_cannot_follow(folders: list[str]) -> None:
    module = Alone(folders[0], ppo=PPOConfig(n_minibatches=1, kl_ctl=0.1, ref_ema_eta=0.01), ref_path=folders[1])
    with pytest.raises(ValueError, match="ppo.ref_ema_eta=0.01 moves ref_path towards path, but model.layers.0.mlp"):
        fit(module, [make_batch()])


def test_a_run_with_all_models_resumes_as_if_nothing_had_happened(folders: list[str], tmp_path: Path) -> None:
    ppo = PPOConfig(n_minibatches=2, disable_value=False, kl_ctl=0.1, ref_ema_eta=0.1, **ADAPTIVE)
    batches = [make_batch(seed=s) for s in range(4)]
    straight, first, second = (WithReference(folders[0], ppo=ppo, init_critic_from_actor=True, **EXACT) for _ in range(3))
    fit(straight, batches)
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(first, Batches(batches[:2]))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer(max_epochs=2)
    trainer.fit(second, Batches(batches[2:]), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 4 and second.kl_ctl == straight.kl_ctl != 0.1
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    assert straight.reference is not None and second.reference is not None
    for name, weight in straight.reference.state_dict().items():
        torch.testing.assert_close(second.reference.state_dict()[name], weight)
    for name in ("actor_loss", "value_loss", "ref_kl", "kl_ctl", "explained_variance"):
        assert second.step_statistics[name] == pytest.approx(straight.step_statistics[name], rel=1e-9), name
