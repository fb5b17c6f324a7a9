"""AsyncPPOModule: one gradient however a batch is cut, one step a batch, and rewarded answers become likelier."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from training_samples import Alone, Batches, fit, make_batch, make_trainer, padded_logprobs, write_model

from rl_lightning.batching.collate import collate
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.policy_batch import LossTokens
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.types import Completion, Prompt, Rollout, RolloutGroup, SamplingParams

ONE = PPOConfig(n_minibatches=1)
EXACT: dict[str, Any] = {"dtype": "float64", "optimizer": OptimizerConfig(lr=1e-3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("max_tokens", [22, 60])
@pytest.mark.parametrize("share", [False, True])
def test_gradient_does_not_depend_on_micro_batches(folder: str, max_tokens: int, share: bool) -> None:
    whole, cut = (
        Alone(folder, ppo=ONE, **EXACT),
        Alone(folder, ppo=ONE, max_tokens_per_mb=max_tokens, share_prompts=share, **EXACT),
    )
    fit(whole, [make_batch()])
    fit(cut, [make_batch()])
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(cut.gradients[name], gradient, rtol=1e-9, atol=1e-12)
    for name in ("actor_loss", "entropy", "importance_weight", "behave_imp_weight", "grad_norm"):
        assert cut.step_statistics[name] == pytest.approx(whole.step_statistics[name], rel=1e-9)


def test_gradient_is_that_of_the_formula(folder: str) -> None:
    module = Alone(folder, ppo=PPOConfig(n_minibatches=1, discount=0.9, gae_lambda=0.8), **EXACT)
    batch = make_batch(seed=3)
    fit(module, [batch])
    plain = Alone(folder, dtype="float64")
    plain.configure_model()
    n = padded_logprobs(plain.model, batch)[batch.loss_mask]
    advantages = torch.zeros(len(batch.loss_mask), dtype=torch.float64)
    for i in range(batch.n_seqs):
        tokens = torch.nonzero(batch.loss_mask[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]).squeeze(1) + batch.cu_seqlens[i]
        for k, t in enumerate(reversed(tokens.tolist())):
            advantages[t] = 5.0 * batch.rewards[i] * 0.72**k
    a = advantages[batch.loss_mask]
    a = (a - a.mean()) / (a.std(correction=0) + 1e-5)
    weight = (n - batch.behav_logprobs[batch.loss_mask]).exp().detach()
    loss = -((n - n.detach()).exp() * a * weight).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    assert module.step_statistics["actor_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert module.step_statistics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(module.gradients[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_one_counted_step_a_batch_however_many_updates(folder: str) -> None:
    module = Alone(folder, ppo=PPOConfig(n_minibatches=4), optimizer=OptimizerConfig(lr=1e-3, schedule="linear"))
    trainer = fit(module, [make_batch(seed=s) for s in range(3)])
    assert trainer.global_step == 3
    assert module.step_statistics["lr"] == pytest.approx(1e-3 / 3)


def test_prox_is_scored_before_the_first_update(folder: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Alone):
        def policy_loss(self, logprobs: Tensor, tokens: LossTokens) -> tuple[Tensor, dict[str, Tensor]]:
            assert tokens.prox_logprobs is not None
            seen.append((logprobs.detach(), tokens.prox_logprobs))
            return super().policy_loss(logprobs, tokens)

    module = Watched(folder, ppo=PPOConfig(n_minibatches=2), dtype="float64", optimizer=OptimizerConfig(lr=1e-2))
    start = Alone(folder, dtype="float64")
    start.configure_model()
    batch = make_batch()
    before = padded_logprobs(start.model, batch)
    fit(module, [batch])
    torch.testing.assert_close(seen[0][0].float(), seen[0][1].float())
    assert float((seen[1][0] - seen[1][1]).abs().max()) > 1e-3
    expected = before[batch.loss_mask].sort().values.float()
    torch.testing.assert_close(torch.cat([p for _, p in seen]).sort().values.float(), expected, atol=1e-5, rtol=1e-5)


def test_minibatches_are_equal_seeded_and_keep_groups_together(folder: str) -> None:
    module, batch = Alone(folder, ppo=PPOConfig(n_minibatches=3), seed=5), make_batch(n_groups=6, group_size=2)
    orders = []
    for step in (0, 0, 1):
        module.trainer = SimpleNamespace(global_step=step)  # type: ignore[assignment]
        orders.append(module.minibatches(batch))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(s for part in orders[0] for s in part) == list(range(12))
    assert all(len(set(batch.group_ids[part].tolist())) == 2 for part in orders[0])


def test_early_stop_leaves_the_weights_but_counts_the_step(folder: str) -> None:
    module = Alone(folder, ppo=PPOConfig(n_minibatches=2, early_stop_imp_ratio=0.5), optimizer=OptimizerConfig(lr=1e-2))
    module.configure_model()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = fit(module, [make_batch()])
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert module.step_statistics["skipped_minibatches"] == 2 and trainer.global_step == 1
    assert "grad_norm" not in module.step_statistics


def test_a_gradient_that_is_not_finite_leaves_the_weights(folder: str) -> None:
    class Broken(Alone):
        def policy_loss(self, logprobs: Tensor, tokens: LossTokens) -> tuple[Tensor, dict[str, Tensor]]:
            return logprobs.sum() * math.inf, {}

    module = Broken(folder, ppo=ONE)
    fit(module, [make_batch()])
    assert module.step_statistics["nonfinite_gradients"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_statistics_are_those_of_the_batch(folder: str) -> None:
    batch = make_batch(seed=8, n_groups=5, version=2)
    groups = [replace(g, prompt=replace(g.prompt, task="code" if g.index else "math")) for g in batch.groups]
    batch = replace(collate(groups, version=3), wait_s=1.0)
    module = Alone(folder, ppo=PPOConfig(n_minibatches=1, reward_output_bias=0.5, max_reward_clip=4.0))
    fit(module, [batch])
    stats, rollouts = module.step_statistics, [r for g in groups for r in g.rollouts]
    rewards = np.array([r.reward for r in rollouts])
    lengths = batch.cu_seqlens.diff().numpy()
    expected = {
        "task_reward": rewards.mean(),
        "scaled_reward": np.clip((rewards - 0.5) * 5, -4, 4).mean(),
        "reward_std": rewards.std(),
        "math_reward": rewards[:4].mean(),
        "code_reward": rewards[4:].mean(),
        "avg_seq_len": lengths.mean(),
        "correct_seq_len": lengths[rewards > 0].mean(),
        "incorrect_seq_len": lengths[rewards < 0].mean(),
        "no_eos_ratio": np.mean([r.completion.finish_reason == "length" for r in rollouts]),
        "pass_at_k": np.mean([any(r.reward > 0 for r in g.rollouts) for g in groups]),
        "groups_without_spread": np.mean([len({r.reward for r in g.rollouts}) == 1 for g in groups]),
        "n_seqs": 20, "n_tokens": lengths.sum(), "n_valid_tokens": sum(r.loss_mask.sum() for r in rollouts),
        "head_offpolicyness": 1, "tail_offpolicyness_max": 1, "importance_weight": 1, "kl_reward": 0, "reward_errors": 0,
    }  # fmt: skip
    for name, value in expected.items():
        assert stats[name] == pytest.approx(float(value), abs=1e-6), name
    assert module.step_histograms["reward"].tolist() == rewards.tolist()
    assert "engine_logprob_diff" not in stats  # no token at the trainer's version


def test_engine_and_trainer_are_compared_at_equal_versions(folder: str) -> None:
    module = Alone(folder, ppo=PPOConfig(n_minibatches=2), logprob_diff_limit=1.0)
    module.configure_model()
    batch = make_batch(seed=8)
    expected = (padded_logprobs(module.model, batch) - batch.behav_logprobs)[batch.loss_mask].abs()
    fit(module, [batch])
    assert module.step_statistics["engine_logprob_diff"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert module.step_statistics["engine_logprob_diff_max"] == pytest.approx(float(expected.max()), rel=1e-4)
    assert module.step_statistics["engine_logprob_diff_over_limit"] == pytest.approx(float((expected > 1).float().mean()))


def test_truncated_answers_score_zero_or_leave_the_loss(folder: str) -> None:
    batch = make_batch(seed=9)
    zero = Alone(folder, ppo=PPOConfig(n_minibatches=1, mask_no_eos_with_zero=True))
    assert bool((zero.scores(batch)[batch.truncated] == 0).all()) and bool(
        (zero.scores(batch)[~batch.truncated].abs() == 5).all()
    )
    masked = Alone(folder, ppo=PPOConfig(n_minibatches=1, mask_too_long=True))
    fit(masked, [batch])
    kept = ~torch.repeat_interleave(batch.truncated, batch.cu_seqlens.diff().long())
    assert masked.step_statistics["n_valid_tokens"] == int((batch.loss_mask & kept).sum())
    nothing = replace(batch, truncated=torch.ones_like(batch.truncated))
    trainer = fit(Alone(folder, ppo=PPOConfig(n_minibatches=1, mask_too_long=True)), [nothing])
    assert trainer.global_step == 1


def test_advantages_are_normalised_over_tokens_or_within_groups(folder: str) -> None:
    batch = make_batch(seed=10)
    over_batch = Alone(folder).compute_advantages(batch)[batch.loss_mask]
    assert float(over_batch.mean()) == pytest.approx(0, abs=1e-6) and float(over_batch.std(correction=0)) == pytest.approx(
        1, abs=1e-4
    )
    grouped = Alone(folder, ppo=PPOConfig(group_adv_norm=True)).compute_advantages(batch)
    last = grouped[batch.cu_seqlens[1:].long() - 1].view(3, 4)
    raw = batch.rewards.view(3, 4) * 5
    torch.testing.assert_close(last, (raw - raw.mean(1, keepdim=True)) / (raw.std(1, keepdim=True) + 1e-5))


def test_plain_ppo_needs_no_recomputation(folder: str) -> None:
    module = Alone(
        folder, ppo=PPOConfig(n_minibatches=2, use_decoupled_loss=False, recompute_logprob=False, early_stop_imp_ratio=None)
    )
    fit(module, [make_batch()])
    assert "behave_imp_weight" not in module.step_statistics and module.step_statistics["importance_weight"] != 1


def test_hyper_parameters_reload_without_executing_code(folder: str, tmp_path: Path) -> None:
    module = Alone(folder, ppo=PPOConfig(n_minibatches=2, eps_clip=0.3), optimizer=OptimizerConfig(lr=3e-4, betas=(0.8, 0.9)))
    trainer = fit(module, [make_batch()])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["ppo"]["eps_clip"] == 0.3
    again = Alone.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert (again.ppo, again.optimizer_config) == (module.ppo, module.optimizer_config)
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumed_training_equals_uninterrupted(folder: str, tmp_path: Path) -> None:
    options: dict[str, Any]
    batches, options = [make_batch(seed=s) for s in range(4)], {"ppo": PPOConfig(n_minibatches=2), **EXACT}
    straight, first, second = (Alone(folder, **options) for _ in range(3))
    fit(straight, batches)
    trainer = make_trainer(limit_train_batches=2)
    trainer.fit(first, Batches(batches[:2]))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = make_trainer(max_epochs=2)
    trainer.fit(second, Batches(batches[2:]), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 4
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute_logprob": False}, "use_decoupled_loss=true needs .*recompute_logprob=true"),
        ({"use_decoupled_loss": False, "behav_imp_weight_cap": 2.0}, "behav_imp_weight_cap=2.0 .*use_decoupled_loss"),
        ({"c_clip": 0.9}, "ppo.c_clip=0.9 must be above 1"),
        ({"n_minibatches": 0}, "ppo.n_minibatches=0"),
        ({"eps_clip": -0.1}, "ppo.eps_clip=-0.1 must be positive"),
        ({"discount": 1.5}, "ppo.discount=1.5"),
    ],
)
def test_contradictions_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_limits_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_mb=1 "):
        AsyncPPOModule("model", max_tokens_per_mb=1)
    with pytest.raises(ValueError, match="min_lr_ratio=0.1 needs schedule linear or cosine"):
        OptimizerConfig(min_lr_ratio=0.1)


class GivenBatches(pl.LightningDataModule):
    """A data module with the attributes that the module looks at."""

    def __init__(self, batch_size: int, group_size: int, generation: SamplingParams | None = None) -> None:
        super().__init__()
        self.batch_size, self.group_size, self.generation = batch_size, group_size, generation

    def train_dataloader(self) -> Batches:
        return Batches([make_batch()])


@pytest.mark.parametrize(
    ("data", "ppo", "message"),
    [
        (GivenBatches(3, 1), PPOConfig(group_adv_norm=True), "group_adv_norm=true .*group_size=1"),
        (GivenBatches(3, 4, SamplingParams(max_new_tokens=30720)), PPOConfig(), "max_new_tokens=30720 .*max_tokens_per_mb=30720"),
        (GivenBatches(3, 4), PPOConfig(n_minibatches=5), "batch_size=3 and group_size=4 .*ppo.n_minibatches=5"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_the_first_step(
    folder: str, data: GivenBatches, ppo: PPOConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer().fit(Alone(folder, ppo=ppo), datamodule=data)


def test_temperature_comes_from_the_data(folder: str) -> None:
    module = Alone(folder, ppo=ONE)
    make_trainer().fit(module, datamodule=GivenBatches(3, 4, SamplingParams(temperature=0.6)))
    assert module.temperature == 0.6


def test_a_user_loss_in_a_few_lines(folder: str) -> None:
    class Reinforce(Alone):
        def policy_loss(self, logprobs: Tensor, tokens: LossTokens) -> tuple[Tensor, dict[str, Tensor]]:
            return -(logprobs * tokens.advantages).sum() / tokens.normalizer, {"surprise": -logprobs.detach()}

    module = Reinforce(folder, ppo=PPOConfig(n_minibatches=2), max_tokens_per_mb=40)
    fit(module, [make_batch()])
    assert module.step_statistics["surprise"] > 0 and "importance_weight" not in module.step_statistics


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss, n: loss.sum(), r"Mine\.policy_loss returned a tensor of shape \(\): return \(loss, statistics\)"),
        (lambda loss, n: None, r"Mine\.policy_loss returned None"),
        (lambda loss, n: (loss, {}), r"a loss of shape \(\d+,\): return its sum"),
        (lambda loss, n: (loss.sum().detach(), {}), "a loss without gradient"),
        (lambda loss, n: (loss.sum(), {"mode": "fast"}), "statistics that are no tensors or numbers"),
    ],
)
def test_a_user_loss_that_returns_something_else_is_told_what_to_return(folder: str, returned: Any, message: str) -> None:
    class Mine(Alone):
        def policy_loss(self, logprobs: Tensor, tokens: LossTokens) -> tuple[Tensor, dict[str, Tensor]]:
            found: tuple[Tensor, dict[str, Tensor]] = returned(-logprobs / tokens.normalizer, len(logprobs))
            return found

    with pytest.raises(ValueError, match=message):
        fit(Mine(folder, ppo=ONE), [make_batch()])


def test_statistics_of_a_user_loss_may_be_numbers(folder: str) -> None:
    class Mine(Alone):
        def policy_loss(self, logprobs: Tensor, tokens: LossTokens) -> tuple[Tensor, dict[str, Any]]:
            return -logprobs.sum() / tokens.normalizer, {"beta": 0.5, "longest": torch.tensor(7)}

    module = Mine(folder, ppo=ONE)
    fit(module, [make_batch()])
    assert (module.step_statistics["beta"], module.step_statistics["longest"]) == (0.5, 7.0)


@pytest.mark.parametrize(
    "wrong", [lambda x, b: b.rewards, lambda x, b: x[b.loss_mask], lambda x, b: x.numpy(), lambda x, b: x[:, None]]
)
def test_user_advantages_of_another_shape_are_told_which(folder: str, wrong: Any) -> None:
    class Mine(Alone):
        def compute_advantages(self, batch: Any) -> Tensor:
            found: Tensor = wrong(super().compute_advantages(batch), batch)
            return found

    with pytest.raises(
        ValueError, match=r"Mine\.compute_advantages returned .*: return a tensor of shape \(\d+,\).* for each answer"
    ):
        fit(Mine(folder, ppo=ONE), [make_batch()])


def test_rewarded_answers_become_likelier(folder: str) -> None:
    module = Alone(folder, ppo=PPOConfig(n_minibatches=2, group_adv_norm=True), optimizer=OptimizerConfig(lr=3e-3))
    module.configure_model()
    prompt, rng = Prompt("q", "", (5, 6, 7)), np.random.default_rng(0)
    fit_batches = []

    def sample(version: int) -> RolloutGroup:
        logits = module.model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1].double().log_softmax(0).detach().numpy()
        tokens = rng.choice(len(logits), 64, p=np.exp(logits) / np.exp(logits).sum())
        rollouts = [
            Rollout(
                Completion(np.array([t], np.int32), logits[[t]].astype(np.float32), np.array([version], np.int32), "stop"),
                "", 1.0 if t % 2 == 0 else -1.0, {}, np.ones(1, bool),
            )
            for t in tokens
        ]  # fmt: skip
        return RolloutGroup(0, prompt, tuple(rollouts))

    class Sampled(Batches):
        def __len__(self) -> int:
            return 12

        def __iter__(self):  # type: ignore[no-untyped-def]
            for version in range(12):
                batch = collate([sample(version)], version=version)
                fit_batches.append(float((batch.rewards > 0).float().mean()))
                yield batch

    make_trainer().fit(module, Sampled([]))
    assert np.mean(fit_batches[-3:]) > 0.9 and np.mean(fit_batches[:2]) < 0.75
    assert module.step_statistics["engine_logprob_diff_max"] < 1e-4
