"""Options of the objective: which go together, what each name does, and where the data must play along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from training_samples import Alone, fit, make_batch, write_model

from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import MATTERS_WITH, Advantage, PPOConfig
from rl_lightning.objectives.estimators import ESTIMATORS

PLAIN: dict[str, Any] = {"use_decoupled_loss": False}
A3PO: dict[str, Any] = {"prox": "a3po", "recompute_logprob": False}
BOUNDS: dict[str, Any] = {"behav_imp_weight_cap": 2.0, "behav_imp_weight_floor": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "trpo"}, "ppo.surrogate=trpo is unknown: choose one of ppo, gspo, cispo"),
        ({"correction": "vtrace"}, "correction=vtrace is unknown"),
        ({"recompute_logprob": False}, "use_decoupled_loss=true needs .*recompute_logprob=true or ppo.prox=a3po"),
        ({"prox": "a3po"}, "ppo.prox=a3po approximates what ppo.recompute_logprob=true computes"),
        ({**PLAIN, **A3PO}, "ppo.prox=a3po does nothing without ppo.use_decoupled_loss=true"),
        ({**PLAIN, "correction": "m2po"}, "ppo.correction=m2po does nothing without ppo.use_decoupled_loss=true"),
        ({**A3PO, "correction": "m2po"}, "ppo.correction=m2po .*ppo.prox=a3po"),
        ({"correction": "tis"}, "correction=tis needs behav_imp_weight_cap"),
        ({"correction": "icepop", "behav_imp_weight_cap": 2.0}, "correction=icepop needs behav_imp_weight_floor"),
        ({"correction": "sequence-mask", "behav_imp_weight_floor": 0.5}, "correction=sequence-mask needs behav_imp_weight_cap"),
        ({"correction": "m2po", "behav_imp_weight_cap": 2.0}, "correction=m2po makes no use of behav_imp_weight_cap"),
        ({"behav_imp_weight_floor": 0.5}, "correction=decoupled makes no use of behav_imp_weight_floor"),
        ({"m2_threshold": 0.1}, "ppo.m2_threshold=0.1 does nothing without ppo.correction=m2po"),
        ({"token_sum_norm": 100.0}, "ppo.token_sum_norm=100.0 does nothing without ppo.aggregation=token-sum-norm"),
        ({"surrogate": "cispo", "c_clip": 3.0}, "ppo.c_clip=3.0 .*ppo.surrogate=cispo"),
        ({"overlong_penalty": 0.5}, "ppo.overlong_penalty=0.5 does nothing without ppo.overlong_buffer"),
        ({"overlong_buffer": 4, "mask_no_eos_with_zero": True}, "mask_no_eos_with_zero=true .*overlong_buffer=4"),
        ({"advantage": "rloo", "group_adv_norm": True}, "group_adv_norm=true means ppo.advantage=grpo, but that is rloo"),
        ({"advantage": "grpo", "disable_value": False}, "ppo.advantage=grpo .*ppo.disable_value=false"),
        ({"group_adv_norm": True, "disable_value": False}, "ppo.group_adv_norm=true .*ppo.disable_value=false"),
        ({"advantage": "reinforce++", "adv_norm": False}, "ppo.advantage=reinforce.. .*ppo.adv_norm=false"),
        ({"value_eps_clip": 0.5}, "ppo.value_eps_clip=0.5 does nothing without ppo.disable_value=false"),
        ({"use_adaptive_kl_ctl": True}, "ppo.use_adaptive_kl_ctl=true does nothing without ppo.kl_ctl"),
        ({"kl_ctl": 0.1, "adaptive_kl_target": 3.0}, "adaptive_kl_target=3.0 does nothing without ppo.use_adaptive_kl_ctl=true"),
        ({"ref_ema_eta": 0.5}, "ppo.ref_ema_eta=0.5 does nothing without ppo.kl_ctl: .* leave ref_ema_eta at null"),
        ({"kl_estimator": "k3"}, "ppo.kl_estimator=k3 does nothing without ppo.kl_ctl"),
        ({"kl_ctl": -1.0}, "ppo.kl_ctl=-1.0 must not be negative"),
        ({"kl_ctl": 1.0, "ref_ema_eta": 1.5}, "ppo.ref_ema_eta=1.5 above 1"),
        ({"m2_threshold": 0.0, "correction": "m2po"}, "ppo.m2_threshold=0.0 must be positive"),
    ],
)
def test_contradictions_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_names_in_the_tables_are_options() -> None:
    config = PPOConfig()
    for name, partner in MATTERS_WITH.items():
        assert hasattr(config, name) and hasattr(config, partner.partition("=")[0])
    assert get_args(Advantage) == tuple(ESTIMATORS)


CRITIC: dict[str, Any] = {"disable_value": False}


@pytest.mark.parametrize(
    ("ppo", "options", "message"),
    [
        ({}, {"critic_path": "x"}, "critic_path=x is about a critic, which ppo.disable_value=true leaves out"),
        ({}, {"init_critic_from_actor": True}, "init_critic_from_actor=true .*ppo.disable_value=true"),
        ({}, {"critic_optimizer": OptimizerConfig(lr=1.0)}, "critic_optimizer.lr=1.0 .*ppo.disable_value=true"),
        ({}, {"critic_max_tokens_per_mb": 9}, "critic_max_tokens_per_mb=9 .*ppo.disable_value=true"),
        (CRITIC, {}, "ppo.disable_value=false needs a critic .*critic_path, or init_critic_from_actor=true"),
        (CRITIC, {"critic_path": "x", "init_critic_from_actor": True}, "critic_path=x and init_critic_from_actor=true"),
        (CRITIC, {"critic_path": "x", "critic_max_tokens_per_mb": 1}, "critic_max_tokens_per_mb=1 must hold"),
        ({}, {"ref_path": "x"}, "ref_path=x is about a reference, which ppo.kl_ctl=0 makes no use of"),
        ({}, {"ref_max_tokens_per_mb": 9}, "ref_max_tokens_per_mb=9 .*ppo.kl_ctl=0"),
    ],
)
def test_models_and_their_use_come_together(ppo: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncPPOModule("model", ppo=PPOConfig(**ppo), **options)


def data(max_new_tokens: int | None = 20, group_size: int = 4) -> Any:
    generation = None if max_new_tokens is None else SimpleNamespace(max_new_tokens=max_new_tokens)
    return SimpleNamespace(group_size=group_size, batch_size=4, generation=generation)


@pytest.mark.parametrize(
    ("ppo", "options", "given", "message"),
    [
        ({"advantage": "rloo"}, {}, data(group_size=1), "ppo.advantage=rloo .*group_size=1"),
        ({"aggregation": "token-sum-norm"}, {}, data(None), "token-sum-norm .*max_new_tokens.*: set ppo.token_sum_norm"),
        ({"overlong_buffer": 30}, {}, data(), "ppo.overlong_buffer=30 .*max_new_tokens=20"),
        ({"kl_ctl": 0.1}, {"ref_max_tokens_per_mb": 20}, data(), "max_new_tokens=20 .*ref_max_tokens_per_mb=20"),
        (
            {"disable_value": False},
            {"critic_path": "x", "critic_max_tokens_per_mb": 20},
            data(),
            "max_new_tokens=20 .*critic_max_tokens_per_mb=20: raise that to at least 21",
        ),
    ],
)
def test_data_must_play_along(ppo: dict[str, Any], options: dict[str, Any], given: Any, message: str) -> None:
    module = AsyncPPOModule("model", ppo=PPOConfig(n_minibatches=1, **ppo), **options)
    with pytest.raises(ValueError, match=message):
        module.check_data(given, world_size=1)
    AsyncPPOModule("model", ppo=PPOConfig(n_minibatches=1)).check_data(data(), world_size=1)


def slow_advantages(batch: Any, name: str) -> list[float]:
    """The score of each answer as the estimator `name` sees it, before it is spread over tokens."""
    scores = [5 * float(r) for r in batch.rewards]
    ids = batch.group_ids.tolist()
    out = []
    for i, score in enumerate(scores):
        peers = [s for s, g in zip(scores, ids, strict=True) if g == ids[i]]
        mean = sum(peers) / len(peers)
        others = (sum(peers) - score) / (len(peers) - 1)
        spread = (sum((p - mean) ** 2 for p in peers) / (len(peers) - 1)) ** 0.5 + 1e-5
        baseline = {"grpo": mean, "dr_grpo": mean, "rloo": others, "reinforce++-baseline": mean}.get(name, 0.0)
        out.append((score - baseline) / (spread if name == "grpo" else 1.0))
    return out


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"])
def test_advantages_are_those_of_the_named_estimator(name: str) -> None:
    batch = make_batch(seed=11, n_groups=4)
    module = Alone("model", ppo=PPOConfig(advantage=name, discount=0.9, gae_lambda=0.8))  # type: ignore[arg-type]
    got = module.compute_advantages(batch)
    scores, want = slow_advantages(batch, name), torch.zeros(len(batch.loss_mask), dtype=torch.float64)
    for i, (a, b) in enumerate(zip(batch.cu_seqlens.tolist(), batch.cu_seqlens[1:].tolist(), strict=False)):
        tokens = [t for t in range(a, b) if batch.loss_mask[t]]
        for k, t in enumerate(reversed(tokens)):
            want[t] = scores[i] * 0.72**k
    chosen = want[batch.loss_mask]
    if name.startswith("reinforce"):
        chosen = (chosen - chosen.mean()) / (chosen.std(correction=0) + 1e-5)
    torch.testing.assert_close(got[batch.loss_mask].double(), chosen, rtol=1e-5, atol=1e-6)


def test_group_normalisation_is_grpo() -> None:
    batch = make_batch(seed=12)
    named, old = (Alone("model", ppo=PPOConfig(**o)) for o in ({"advantage": "grpo"}, {"group_adv_norm": True}))  # type: ignore[arg-type]
    assert torch.equal(named.compute_advantages(batch), old.compute_advantages(batch))


def test_overlong_answers_pay_before_scaling() -> None:
    batch = make_batch(seed=13)
    module = Alone("model", ppo=PPOConfig(overlong_buffer=4, overlong_penalty=0.5))
    module.max_new_tokens = 10
    lengths = (batch.cu_seqlens.diff() - batch.prompt_lens).tolist()
    want = [5 * (r + 0.5 * max(-1.0, min(0.0, (6 - n) / 4))) for r, n in zip(batch.rewards.tolist(), lengths, strict=True)]
    torch.testing.assert_close(module.scores(batch), torch.tensor(want))
    assert min(lengths) < 6 < 10 < max(lengths)


def test_a3po_approximates_by_age_and_runs_no_pass(folder: str) -> None:
    batch = make_batch(seed=14, version=2)
    batch = replace(batch, version=5)
    seen = []

    class Watched(Alone):
        def batch_logprobs(self, batch: Any, sequences: Any, max_tokens: int | None = None) -> torch.Tensor:
            seen.extend(sequences)
            return super().batch_logprobs(batch, sequences, max_tokens)

    options: dict[str, Any] = {"dtype": "float64", "optimizer": OptimizerConfig(lr=0.0)}
    module = Watched(folder, ppo=PPOConfig(n_minibatches=2, early_stop_imp_ratio=None, **A3PO), **options)
    fit(module, [batch])
    exact = Alone(folder, ppo=PPOConfig(n_minibatches=2, early_stop_imp_ratio=None), **options)
    fit(exact, [batch])
    assert seen == []
    gap = exact.step_statistics["behave_approx_kl"]  # n = p where nothing is learnt
    assert module.step_statistics["behave_approx_kl"] == pytest.approx(0.75 * gap, rel=1e-6)
    assert module.step_statistics["approx_kl"] == pytest.approx(0.25 * gap, rel=1e-6)


def test_options_survive_a_checkpoint(folder: str, tmp_path: Path) -> None:
    ppo = PPOConfig(n_minibatches=1, correction="icepop", surrogate="gspo", aggregation="sequence-mean-token-mean", **BOUNDS)
    module = Alone(folder, ppo=ppo)
    fit(module, [make_batch()]).save_checkpoint(tmp_path / "run.ckpt")
    assert Alone.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True).ppo == ppo


def test_a_minibatch_is_counted_over_answers_with_a_loss_token(folder: str) -> None:
    batch = make_batch(seed=15)
    options = {"n_minibatches": 1, "mask_too_long": True, "use_decoupled_loss": False, "adv_norm": False}
    losses = {}
    for aggregation in ("sequence-mean-token-sum", "token-sum-norm", "token-mean"):
        norm = 7.0 if aggregation == "token-sum-norm" else None
        ppo = PPOConfig(aggregation=aggregation, token_sum_norm=norm, **options)  # type: ignore[arg-type]
        module = Alone(folder, ppo=ppo, dtype="float64")
        fit(module, [batch])
        losses[aggregation] = module.step_statistics["actor_loss"]
    n_tokens, n_answers = module.step_statistics["n_valid_tokens"], int((~batch.truncated).sum())
    assert 0 < n_answers < batch.n_seqs
    assert losses["sequence-mean-token-sum"] * n_answers == pytest.approx(losses["token-mean"] * n_tokens, rel=1e-9)
    assert losses["token-sum-norm"] * 7 == pytest.approx(losses["sequence-mean-token-sum"], rel=1e-9)
