"""The asynchronous loop end to end with the embedded engine: staleness, equivalence, evaluation, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from rl_lightning.engines.torch import TorchEngine
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.rollout.datamodule import RolloutDataModule
from rl_lightning.rollout.errors import RolloutError
from rl_lightning.types import Batch, SamplingParams
from tests.samples import LetterPrompts, always_wrong, share_of_even_digits

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Recorder(pl.Callback):
    """Keeps what a run trained on and what it reported."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.statistics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch)
        self.statistics.append(pl_module.step_statistics)

    @property
    def trained(self) -> list[int]:
        return [group.index for batch in self.batches for group in batch.groups]


def make_data(
    model: Path, *, eta: int = 1, n_prompts: int = 32, reward: Any = share_of_even_digits, **options: Any
) -> RolloutDataModule:
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "group_size": 4,
        "generation": SamplingParams(max_new_tokens=8),
        "engine": TorchEngine(),
        "cpus_per_engine": 1,
        "batch_timeout_s": 90,
    }
    return RolloutDataModule(
        LetterPrompts(n_prompts), [WeightedReward(reward)], str(model), max_head_offpolicyness=eta, **(defaults | options)
    )


def make_module(model: Path, **ppo: Any) -> AsyncPPOModule:
    config = {"n_minibatches": 1, "group_adv_norm": True, "adv_norm": False} | ppo
    return AsyncPPOModule(str(model), optimizer=OptimizerConfig(lr=1e-3), ppo=PPOConfig(**config))


def fit(module: Any, data: RolloutDataModule, *, max_steps: int, ckpt_path: str | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = make_trainer(max_steps, callbacks=[recorder, *options.pop("callbacks", [])], **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    recorder.trainer = trainer
    return recorder


def make_trainer(max_steps: int, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 100, "max_steps": max_steps, **quiet, **options})


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_staleness_never_exceeds_eta(tiny_model: Path, eta: int) -> None:
    run = fit(make_module(tiny_model), make_data(tiny_model, eta=eta), max_steps=8)
    assert [batch.version for batch in run.batches] == list(range(8))
    assert len(set(run.trained)) == 32
    staleness = [batch.version - v for batch in run.batches for v in batch.versions[batch.versions >= 0].unique().tolist()]
    assert min(staleness) >= 0 and max(staleness) <= eta
    if eta == 4:
        assert max(staleness) > 0, "nothing ran ahead: this was not asynchronous"


def test_eta_0_is_the_plain_synchronous_loop(tiny_model: Path) -> None:
    """Each batch was sampled by the weights that a ten-line loop arrives at, and its losses are the same."""
    run = fit(make_module(tiny_model), make_data(tiny_model, eta=0), max_steps=5)
    for version, batch in enumerate(run.batches):
        assert set(batch.versions[batch.versions >= 0].tolist()) == {version}
    losses = plain_loop(tiny_model, run.batches)
    np.testing.assert_allclose([s["actor_loss"] for s in run.statistics], losses, atol=1e-4)


def plain_loop(model_path: Path, batches: list[Batch]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.05)
    losses = []
    for batch in batches:
        loss, count = torch.zeros(()), int(batch.loss_mask.sum())
        for group in batch.groups:
            rewards = torch.tensor([r.reward for r in group.rollouts]) * 5
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-5)
            for rollout, advantage in zip(group.rollouts, advantages, strict=True):
                prompt, answer = list(group.prompt.token_ids), torch.tensor(rollout.completion.token_ids).long()
                logits = model(torch.tensor([prompt + answer.tolist()])).logits[0, len(prompt) - 1 : -1]
                logprobs = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
                behaviour = torch.tensor(rollout.completion.logprobs)
                torch.testing.assert_close(logprobs.detach(), behaviour, atol=2e-3, rtol=0)
                weight = (logprobs.detach() - behaviour).exp()
                loss = loss - (weight * advantage * (logprobs - logprobs.detach()).exp()).sum() / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_two_engines_share_the_work(tiny_model: Path) -> None:
    run = fit(make_module(tiny_model), make_data(tiny_model, eta=2, num_engines=2, n_prompts=64), max_steps=8)
    workers = {group.worker for batch in run.batches for group in batch.groups}
    assert workers == {"worker 0", "worker 1"}


def test_validation_answers_every_prompt_with_the_current_weights(tiny_model: Path) -> None:
    data = make_data(
        tiny_model,
        eta=2,
        n_prompts=8,
        validation_prompts=LetterPrompts(6),
        validation_group_size=2,
        validation_generation=SamplingParams(max_new_tokens=4, greedy=True),
    )
    seen: list[Batch] = []

    class Spy(AsyncPPOModule):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen.append(batch)
            super().validation_step(batch, batch_idx)

    module = Spy(str(tiny_model), ppo=PPOConfig(n_minibatches=1))
    run = fit(module, data, max_steps=2, num_sanity_val_steps=-1, max_epochs=1)
    assert [batch.version for batch in seen] == [0, 2]
    assert all(batch.n_seqs == 12 and set(batch.versions[batch.versions >= 0].tolist()) == {batch.version} for batch in seen)
    assert [g.prompt.query_id for g in seen[0].groups] == [str(i) for i in range(6)]
    assert 0 <= run.trainer.callback_metrics["val_reward"] <= 1


def test_validate_alone_gives_the_engines_the_weights_first(tiny_model: Path) -> None:
    data = make_data(tiny_model, validation_prompts=LetterPrompts(6), validation_group_size=2)
    [results] = make_trainer(1).validate(make_module(tiny_model), datamodule=data)
    assert set(results) == {"val_reward", "val_accuracy", "val_pass_at_k"}
    assert 0 < results["val_accuracy"] <= results["val_pass_at_k"] <= 1


def test_options_that_contradict_each_other_are_refused_before_an_engine_starts(tiny_model: Path) -> None:
    data = make_data(tiny_model, batch_size=3, group_size=1)
    with pytest.raises(ValueError, match=r"batch_size=3 .*ppo.n_minibatches=2"):
        fit(make_module(tiny_model, n_minibatches=2, group_adv_norm=False), data, max_steps=1)
    assert data.fleet is None
    with pytest.raises(ValueError, match="validation_prompts is null"):
        make_trainer(1).validate(make_module(tiny_model), datamodule=make_data(tiny_model))


def test_a_resumed_run_goes_on_at_the_same_prompt_and_version(tiny_model: Path, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")
                trainer.should_stop = True

    first = fit(make_module(tiny_model), make_data(tiny_model, eta=2), max_steps=7, callbacks=[Save()])
    second = fit(make_module(tiny_model), make_data(tiny_model, eta=2), max_steps=7, ckpt_path=str(tmp_path / "three.ckpt"))
    assert [batch.version for batch in first.batches + second.batches] == [0, 1, 2, 3, 4, 5, 6]
    data = make_data(tiny_model, validation_prompts=LetterPrompts(6))
    [results] = make_trainer(1).validate(make_module(tiny_model), datamodule=data, ckpt_path=str(tmp_path / "three.ckpt"))
    assert 0 <= results["val_reward"] <= 1
    trained = first.trained + second.trained
    assert len(set(trained)) == len(trained) == 28, "no prompt twice"
    assert set(range(20)) <= set(trained), "no prompt lost, however it was in flight"
    versions = [int(b.versions[b.versions >= 0].min()) for b in second.batches]
    assert min(versions) >= 3, "weights from before the resume are gone"


def test_when_every_group_is_rejected_the_run_says_so(tiny_model: Path) -> None:
    data = make_data(tiny_model, reward=always_wrong, success_rate_lb=0.5, max_rejections=12)
    with pytest.raises(RolloutError, match=r"12 prompt groups in a row .*success_rate_lb=0.5"):
        fit(make_module(tiny_model), data, max_steps=2)


def test_a_batch_that_never_comes_is_explained(tiny_model: Path) -> None:
    data = make_data(tiny_model, reward=always_wrong, success_rate_lb=0.5, batch_timeout_s=3)
    with pytest.raises(RolloutError, match=r"no batch for step 1 within 3 s: step 1 needs 4 prompt groups: 0 finished"):
        fit(make_module(tiny_model), data, max_steps=2)
