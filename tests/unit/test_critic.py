"""The critic: values by packed passes, GAE with them, clipped and normalised learning, saved with everything else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_samples import Alone, Batches, fit, make_batch, make_trainer, norm_in_float64, write_model

from rl_lightning.callbacks.weight_publisher import named_weights
from rl_lightning.models.value_model import ValueModel
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.modules.scored_batch import with_end_tokens
from rl_lightning.types import Batch

PPO: dict[str, Any] = {"n_minibatches": 1, "disable_value": False, "discount": 0.9, "gae_lambda": 0.8}


class WithCritic(Alone):
    """Its critic has a random head, so that it says something from the start; float64 to the last digit."""

    def configure_model(self) -> None:
        is_new = self.critic is None
        super().configure_model()
        if is_new:
            norm_in_float64(self.critic)
            generator = torch.Generator().manual_seed(3)
            head = self.critic.model.model.score
            with torch.no_grad():
                head.weight.copy_(torch.randn(head.weight.shape, generator=generator))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients = {name: p.grad.detach().clone() for name, p in self.critic.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def make_module(folder: str, ppo: dict[str, Any] | None = None, **options: Any) -> WithCritic:
    defaults: dict[str, Any] = {"dtype": "float64", "init_critic_from_actor": True, "optimizer": OptimizerConfig(lr=1e-3)}
    defaults["critic_optimizer"] = OptimizerConfig(lr=1e-2, gradient_clipping=0.0)
    return WithCritic(folder, ppo=PPOConfig(**{**PPO, **(ppo or {})}), **{**defaults, **options})


def padded_values(critic: Any, batch: Batch) -> list[Tensor]:
    """For each sequence the head's output at every token, by an ordinary padded forward pass."""
    starts = batch.cu_seqlens.tolist()
    rows = [batch.token_ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    output = critic.model.model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
    return [values[: len(row)] for values, row in zip(output, rows, strict=True)]


def slow_gae(values: list[Tensor], batch: Batch, scores: list[float]) -> tuple[Tensor, Tensor]:
    """(T,) advantages and returns, last token first; the value of a state is that of the token before the one chosen in it."""
    advantages, returns = (torch.zeros(len(batch.loss_mask), dtype=torch.float64) for _ in range(2))
    for i, start in enumerate(batch.cu_seqlens.tolist()[:-1]):
        tokens = [t for t in range(len(values[i])) if batch.loss_mask[start + t]]
        following, ahead = (float(values[i][-1]) if batch.truncated[i] else 0.0), 0.0
        for t in reversed(tokens):
            reward, value = (scores[i] if t == tokens[-1] else 0.0), float(values[i][t - 1])
            ahead = reward + 0.9 * following - value + 0.72 * ahead
            following = value
            advantages[start + t], returns[start + t] = ahead, ahead + value
    return advantages, returns


def test_gradients_and_statistics_are_those_of_the_formulas(folder: str) -> None:
    batch, module = make_batch(seed=31), make_module(folder)
    start = make_module(folder)
    start.configure_model()
    values = padded_values(start.critic, batch)
    advantages, returns = slow_gae(values, batch, (5 * batch.rewards).tolist())
    fit(module, [batch])

    mask, starts = batch.loss_mask, batch.cu_seqlens.tolist()
    chosen = [values[i][t - starts[i] - 1] for i in range(batch.n_seqs) for t in range(starts[i], starts[i + 1]) if mask[t]]
    said, wanted = torch.stack(chosen), returns[mask]
    spread = max(1e-2, float(wanted.square().mean() - wanted.mean() ** 2)) ** 0.5
    loss = 0.5 * (said - (wanted - wanted.mean()) / spread).square().mean()  # nothing has moved: no clipping
    loss.backward()
    for name, parameter in start.critic.named_parameters():
        torch.testing.assert_close(module.gradients[name], parameter.grad, rtol=1e-7, atol=1e-9)
    a = advantages[mask]
    stats = module.step_statistics
    expected = {
        "value_loss": float(loss),
        "values": float(said.mean()),
        "returns": float(wanted.mean()),
        "explained_variance": 1 - float((wanted - said).var() / wanted.var()),
        "value_clip_ratio": 0.0,
        "critic_grad_norm": float(torch.cat([g.flatten() for g in module.gradients.values()]).norm()),
        "advantages": float(((a - a.mean()) / (a.std(correction=0) + 1e-5)).mean()),
    }
    for name, value in expected.items():
        assert stats[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert {"return_square", "surprise_square"}.isdisjoint(stats)


def test_advantages_use_the_values(folder: str) -> None:
    batch, module = make_batch(seed=32), make_module(folder, {"adv_norm": False})
    module.configure_model()
    scored = module._ask_others(batch)
    with torch.no_grad():
        advantages, _ = slow_gae(padded_values(module.critic, batch), batch, (5 * batch.rewards).tolist())
    torch.testing.assert_close(module.compute_advantages(scored)[batch.loss_mask].double(), advantages[batch.loss_mask])
    assert bool(batch.truncated.any()) and not bool(batch.truncated.all())


@pytest.mark.parametrize("max_tokens", [22, 60])
@pytest.mark.parametrize("share", [False, True])
def test_the_critic_does_not_depend_on_micro_batches(folder: str, max_tokens: int, share: bool) -> None:
    batches = [make_batch(seed=33), make_batch(seed=34)]
    options: dict[str, Any] = {"critic_max_tokens_per_mb": max_tokens, "share_prompts": share, "gradient_checkpointing": share}
    whole, cut = make_module(folder, {"n_minibatches": 2}), make_module(folder, {"n_minibatches": 2}, **options)
    for module in (whole, cut):
        fit(module, batches)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(cut.gradients[name], gradient, rtol=1e-8, atol=1e-10)
    for name in ("value_loss", "value_clip_ratio", "explained_variance", "critic_grad_norm", "grad_norm"):
        assert cut.step_statistics[name] == pytest.approx(whole.step_statistics[name], rel=1e-8, abs=1e-12)


def test_a_second_minibatch_clips_around_the_values_before_the_step(folder: str) -> None:
    module = make_module(
        folder, {"n_minibatches": 4, "value_eps_clip": 1e-3}, critic_optimizer=OptimizerConfig(lr=0.1, gradient_clipping=0.0)
    )
    fit(module, [make_batch(seed=35, group_size=4)])
    assert 0.2 < module.step_statistics["value_clip_ratio"] < 1


def test_without_a_norm_the_output_is_the_value(folder: str) -> None:
    batch, module = make_batch(seed=36), make_module(folder, {"value_norm": False})
    fit(module, [batch])
    returns, values = module.step_statistics["returns"], module.step_statistics["values"]
    assert module.critic.norm is None
    assert module.step_statistics["value_error"] == pytest.approx(2 * module.step_statistics["value_loss"], rel=1e-9)
    assert module.step_statistics["value_error"] >= (returns - values) ** 2


def test_a_new_head_says_nothing_and_a_saved_one_is_kept(folder: str, tmp_path: Path) -> None:
    new = ValueModel(folder, torch.float32)
    assert all(not bool(p.any()) for p in new.model.score.parameters())
    with torch.no_grad():
        new.model.score.weight.fill_(0.5)
    new.model.save_pretrained(tmp_path)
    assert bool((ValueModel(str(tmp_path), torch.float32).model.score.weight == 0.5).all())


def test_the_critic_learns_what_answers_earn(folder: str) -> None:
    batch = make_batch(seed=37)
    module = make_module(folder, {"n_minibatches": 2, "discount": 1.0, "gae_lambda": 1.0}, optimizer=OptimizerConfig(lr=0.0))
    explained = []

    class Watched(Batches):
        def __iter__(self) -> Any:
            for _ in range(12):
                yield batch
                explained.append(module.step_statistics["explained_variance"])

        def __len__(self) -> int:
            return 12

    make_trainer().fit(module, Watched([]))
    assert explained[0] < 0.2 and explained[-1] > 0.6


def test_the_end_of_a_truncated_answer_is_run() -> None:
    batch = make_batch(seed=38)
    batch = replace(batch, loss_mask=batch.loss_mask & ~torch.repeat_interleave(batch.group_ids == 2, batch.cu_seqlens.diff()))
    longer, tokens, ends = with_end_tokens(batch)
    assert torch.equal(longer.token_ids[tokens], batch.token_ids) and torch.equal(longer.loss_mask[tokens], batch.loss_mask)
    for i in range(batch.n_seqs):
        has_end = bool(batch.truncated[i]) and int(batch.group_ids[i]) != 2
        assert int(ends[i]) == (int(longer.cu_seqlens[i + 1]) - 1 if has_end else -1)
        assert int(longer.cu_seqlens.diff()[i]) == int(batch.cu_seqlens.diff()[i]) + has_end
    assert bool((batch.truncated & (batch.group_ids == 2)).any())


def test_engines_see_the_actor_alone_and_one_step_is_counted(folder: str) -> None:
    module = make_module(folder, {"n_minibatches": 2}, critic_optimizer=OptimizerConfig(lr=1e-2, schedule="linear"))
    trainer = fit(module, [make_batch(seed=s) for s in (40, 41)])
    assert trainer.global_step == 2
    actor, critic = module.optimizers()  # type: ignore[misc]
    assert actor.param_groups[0]["lr"] == 1e-3 and critic.param_groups[0]["lr"] == 0.0
    assert [name for name, _ in named_weights(module)] == [name for name, _ in module.model.named_parameters()]


def test_a_gradient_of_the_critic_that_is_not_finite_leaves_it_and_its_norm(folder: str) -> None:
    module, batch = make_module(folder), make_batch(seed=42)
    module.configure_model()
    before = [p.detach().clone() for p in module.critic.parameters()]
    fit(module, [replace(batch, rewards=batch.rewards.index_fill(0, torch.tensor([0]), torch.nan))])
    assert module.step_statistics["nonfinite_gradients"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, module.critic.parameters(), strict=True))
    assert float(module.critic.norm.debias) == 0


def test_critic_its_optimiser_and_its_norm_are_in_the_checkpoint(folder: str, tmp_path: Path) -> None:
    module = make_module(folder, {"n_minibatches": 2})
    trainer = fit(module, [make_batch(seed=43)])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert len(stored["optimizer_states"]) == len(stored["lr_schedulers"]) == 2
    again = WithCritic.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert float(again.critic.norm.debias) > 0
