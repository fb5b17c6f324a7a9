"""Where an epoch goes on after a restart, with the loaders of real runs."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from run_samples import SmallModule, make_batch
from test_sft import write_tokenizer

from rl_lightning.callbacks.recovery import RecoveryCheckpoint
from rl_lightning.prompts.sft_datamodule import SFTDataModule
from rl_lightning.rollout.loader import RolloutLoader
from rl_lightning.types import Batch


class Answered(RolloutLoader):
    """Batches without a fleet."""

    def _next(self) -> Batch:
        return make_batch(0)


class Rollouts(LightningDataModule):
    """`n_steps` batches an epoch."""

    def __init__(self, n_steps: int) -> None:
        super().__init__()
        self.n_steps = n_steps

    def train_dataloader(self) -> RolloutLoader:
        nothing: Any = None
        return Answered(nothing, lambda: self.trainer.global_step, self.n_steps, 0, 1, nothing)


class Steps(Callback):
    """Counts steps by epoch, the first of which is 0."""

    def __init__(self) -> None:
        self.by_epoch: Counter[int] = Counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.by_epoch[trainer.current_epoch] += 1


def fit(folder: Path, n_steps: int, **options: Any) -> list[int]:
    torch.manual_seed(0)
    steps = Steps()
    ckpt_path = "last" if (folder / "last.ckpt").exists() else None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=3, callbacks=[RecoveryCheckpoint(folder), steps], **quiet, **options)
    trainer.fit(SmallModule(), datamodule=Rollouts(n_steps), ckpt_path=ckpt_path)
    return [steps.by_epoch[epoch] for epoch in range(3)]


@pytest.mark.parametrize("limit", [3, 1.0])
@pytest.mark.parametrize("stop_after", range(1, 9))
def test_every_epoch_has_all_its_steps(tmp_path: Path, stop_after: int, limit: float):
    n_steps = 4 if limit == 3 else 3
    before = fit(tmp_path, n_steps, limit_train_batches=limit, max_steps=stop_after)
    after = fit(tmp_path, n_steps, limit_train_batches=limit)
    assert [a + b for a, b in zip(before, after, strict=True)] == [3, 3, 3]


@pytest.mark.parametrize(("n_before", "n_now", "by_epoch"), [(4, 8, [0, 5, 8]), (8, 4, [0, 4, 4])])
def test_epochs_of_another_length_are_full_from_the_next_one_on(tmp_path: Path, n_before: int, n_now: int, by_epoch: list[int]):
    fit(tmp_path, n_before, max_steps=n_before + 3 if n_now > n_before else 2 * n_before - 1)
    assert fit(tmp_path, n_now) == by_epoch


class Notes(SmallModule):
    """Writes down the examples of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model.weight.sum())
        optimizer.step()
        self.examples.append(batch.group_ids.tolist())


class HeldBack(Callback):
    """Is asked to stop when the batch after `at` steps has been fetched, which then is not trained on."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise SIGTERMException


def fit_examples(folder: Path, *callbacks: Callback, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    prompts = folder / "examples.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": "2"}) + "\n" for i in range(10)))
    write_tokenizer(folder)
    ckpt_path = "last" if (folder / "last.ckpt").exists() else None
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=[*callbacks, RecoveryCheckpoint(folder)], **quiet, **options)
    module = Notes()
    with contextlib.suppress(SIGTERMException):
        trainer.fit(module, datamodule=SFTDataModule(str(prompts), str(folder), batch_size=2), ckpt_path=ckpt_path)
    return module.examples


@pytest.mark.parametrize("limit", [3, 1.0])
@pytest.mark.parametrize("stop_after", range(1, 7))
def test_every_example_is_imitated_as_in_a_run_without_a_stop(tmp_path: Path, stop_after: int, limit: float):
    (tmp_path / "whole").mkdir()
    whole = fit_examples(tmp_path / "whole", limit_train_batches=limit)
    before = fit_examples(tmp_path, limit_train_batches=limit, max_steps=stop_after)
    assert before + fit_examples(tmp_path, limit_train_batches=limit) == whole


@pytest.mark.parametrize("at", [1, 4, 5, 6])
def test_a_batch_that_was_held_back_is_imitated_after_the_restart(tmp_path: Path, at: int):
    (tmp_path / "whole").mkdir()
    whole = fit_examples(tmp_path / "whole")
    before = fit_examples(tmp_path, HeldBack(at))
    assert before + fit_examples(tmp_path) == whole
