"""A module and a data module as small as can be, for tests of runs, callbacks and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule

from rl_lightning.types import Batch, Completion, Prompt, Rollout, RolloutGroup


class SavedModel(torch.nn.Linear):
    """Something with Hugging Face's `save_pretrained`."""

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.json").write_text(json.dumps(self.weight.tolist()))


class SavedTokenizer:
    """Something with a tokenizer's `save_pretrained`."""

    def save_pretrained(self, folder: str | Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


class SmallModule(LightningModule):
    """Manual optimisation, one counted step a batch, statistics as the real modules give them.

    Args:
        path: stands for a model folder.
        lr: learning rate.
        fail_at: global step whose training fails, once per process; see `failures`.
        error: what it fails with.
    """

    failures: list[str] = []

    def __init__(
        self, path: str = "models/none", lr: float = 0.1, fail_at: int | None = None, error: str = "RuntimeError"
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr={lr} must be above 0")
        self.save_hyperparameters(logger=False)
        self.automatic_optimization = False
        self.path, self.lr, self.fail_at, self.error = path, lr, fail_at, error
        self.model = SavedModel(2, 1, bias=False)
        self.tokenizer = SavedTokenizer()
        self.step_statistics: dict[str, float] = {}
        self.step_histograms: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self.global_step == self.fail_at and not self.failures:
            self.failures.append(self.error)
            raise {"RuntimeError": RuntimeError, "ValueError": ValueError, "KeyboardInterrupt": KeyboardInterrupt}[self.error](
                "it broke"
            )
        optimizer = self.optimizers()
        loss = (self.model(batch.rewards.view(-1, 2)) - 1).pow(2).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.losses.append(loss.item())
        self.step_statistics = {"actor_loss": loss.item(), "task_reward": float(batch.rewards.mean()), "n_tokens": 40.0}
        self.step_histograms = {"reward": batch.rewards}
        self.log("loss", loss, prog_bar=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_reward", batch.rewards.mean(), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class SmallData(LightningDataModule):
    """`n_steps` batches an epoch, each a pure function of its position, and a count of generated tokens.

    Args:
        n_steps: batches of an epoch.
        model_path: linked to the module's `path`.
        seed: linked to `seed_everything`.
        fail_check: `check_inputs` finds bad data.
    """

    def __init__(self, n_steps: int = 4, model_path: str = "", seed: int = 0, fail_check: bool = False) -> None:
        super().__init__()
        self.n_steps, self.model_path, self.seed, self.fail_check = n_steps, model_path, seed, fail_check
        self.given = 0

    def check_inputs(self) -> None:
        if self.fail_check:
            raise ValueError("prompts.jsonl line 3: no field `prompt`")

    def before_batch(self, position: int) -> None:
        """For tests that do something while the trainer waits."""

    def train_dataloader(self) -> SmallLoader:
        return SmallLoader(self)

    def val_dataloader(self) -> SmallLoader:
        return SmallLoader(SmallData(1))

    def statistics(self) -> dict[str, float]:
        self.given += 60
        return {"generated_tokens": float(self.given), "groups_running": 2.0}


class SmallLoader:
    """Has a length, and starts where the trainer's finished steps say."""

    def __init__(self, data: SmallData) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.n_steps

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.data.trainer
        for position in range(trainer.global_step % len(self) if trainer is not None else 0, len(self)):
            self.data.before_batch(position)
            yield make_batch(position)


def make_group(index: int, texts: tuple[str, ...] = ("4", "5")) -> RolloutGroup:
    """One prompt with an answer per text, of 3 tokens each: the first is right, the others are wrong."""
    rollouts = tuple(
        Rollout(
            Completion(
                np.arange(3, dtype=np.int32), np.full(3, -0.5, np.float32), np.array([index, index, index + 1], np.int32), "stop"
            ),
            text,
            1.0 if i == 0 else -1.0,
            {"exact": 1.0 if i == 0 else -1.0},
            np.ones(3, bool),
        )
        for i, text in enumerate(texts)
    )
    return RolloutGroup(index, Prompt(f"q{index}", f"{index}+2=", (1, 2)), rollouts)


def make_batch(index: int) -> Batch:
    """Two sequences of 5 tokens."""
    group = make_group(index)
    return Batch(
        token_ids=torch.zeros(10, dtype=torch.long),
        cu_seqlens=torch.tensor([0, 5, 10], dtype=torch.int32),
        prompt_lens=torch.tensor([2, 2], dtype=torch.int32),
        group_ids=torch.tensor([index, index]),
        loss_mask=torch.tensor([False, False, True, True, True] * 2),
        behav_logprobs=torch.full((10,), -0.5),
        versions=torch.zeros(10, dtype=torch.int32),
        rewards=torch.tensor([r.reward + index / 10 for r in group.rollouts]),
        truncated=torch.zeros(2, dtype=torch.bool),
        groups=(group,),
        wait_s=0.0,
    )
