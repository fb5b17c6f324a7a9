"""A model from scratch that imitates answers until a sampled one is right a quarter of the time, and no longer.

What it half knows then is left to reinforcement learning.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from quiet_trainer import quiet_trainer

from rl_lightning.models.tiny import CHARACTERS, write_tiny_model
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.sft import SFTModule
from rl_lightning.prompts.gym import gym_dataset
from rl_lightning.prompts.sft_datamodule import SFTDataModule
from rl_lightning.types import Batch

TASK = "basic_arithmetic"
TASK_OPTIONS = {
    "operators": ["+"],
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 2,
    "max_digits": 2,
    "allow_parentheses": False,
    "allow_negation": False,
    "whitespace": "no_space",
}
"""`Calculate 37+48.`: imitation suddenly begins to understand it, and is stopped then. With differences and one digit among them
understanding comes so slowly that reinforcement learning adds little in minutes."""

TEMPLATE = "{question} "
VALIDATE_EVERY = 20
SEEDS = {"train": 11, "val": 10**6}
"""So far apart that no item is in both: reasoning-gym's item i of seed s is item 0 of seed s + i."""


class Imitator(SFTModule):
    """Also validates how likely a sampled answer is the right one, as a whole, to its end."""

    def on_validation_epoch_start(self) -> None:
        """Nothing is counted yet."""
        super().on_validation_epoch_start()
        self._right: list[torch.Tensor] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Multiplies the probabilities of each right answer's tokens."""
        batch = batch.to("cpu")
        logprobs = self.batch_logprobs(batch, range(batch.n_seqs))
        sequence = torch.repeat_interleave(torch.arange(batch.n_seqs), batch.cu_seqlens.diff().long())
        sums = torch.zeros(batch.n_seqs, dtype=logprobs.dtype)
        self._right.append(sums.index_add_(0, sequence[batch.loss_mask], logprobs[batch.loss_mask]).exp())

    def on_validation_epoch_end(self) -> None:
        """Logs the mean as `val_accuracy`."""
        self.log("val_accuracy", float(torch.cat(self._right).mean()), batch_size=1)


class StopWhenRight(pl.Callback):
    """Ends imitation at `target` accuracy, or after `seconds`; keeps the curve."""

    def __init__(self, target: float, seconds: float) -> None:
        self.target, self.seconds = target, seconds
        self.curve: list[dict[str, float]] = []
        self.started_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started_s = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        seconds, accuracy = time.monotonic() - self.started_s, float(trainer.callback_metrics["val_accuracy"])
        self.curve.append({"step": trainer.global_step, "seconds": round(seconds, 2), "accuracy": round(accuracy, 4)})
        trainer.should_stop = trainer.should_stop or accuracy >= self.target or seconds > self.seconds


def write_model(folder: Path, *, cpu: bool) -> Path:
    """A random Qwen3 of 3 M parameters with 64 values a head, as FA3 wants it; on a CPU of 0.6 M."""
    size: dict[str, Any] = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 768}
    if cpu:
        size |= {"hidden": 128, "intermediate": 256}
    return write_tiny_model(folder, characters=CHARACTERS + "C", max_positions=256, **size)


def write_examples(folder: Path, n: int) -> tuple[str, str]:
    """Questions with right answers, `n` to imitate and 512 to validate with; where they are."""
    folder.mkdir()
    for name, size in (("train", n), ("val", 512)):
        dataset = gym_dataset(TASK, SEEDS[name], size, TASK_OPTIONS)
        entries = (dataset[i] for i in range(size))
        lines = [json.dumps({"prompt": TEMPLATE.format(question=e["question"]), "answer": e["answer"]}) for e in entries]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "train.jsonl"), str(folder / "val.jsonl")


def imitate(model: Path, out: Path, *, target: float, seconds: float, cpu: bool) -> dict[str, Any]:
    """Trains `model` and writes the imitator to `out`; its curve."""
    examples, batch_size = (20_000, 128) if cpu else (200_000, 512)
    train, val = write_examples(out.parent / "examples", examples)
    module = Imitator(str(model), optimizer=OptimizerConfig(lr=2e-3 if cpu else 1e-3), compile=False)
    data = SFTDataModule(train, str(model), val, batch_size)
    stop = StopWhenRight(target, seconds)
    validation: dict[str, Any] = {
        "val_check_interval": VALIDATE_EVERY,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    trainer = quiet_trainer(cpu, [stop], **validation)
    trainer.fit(module, datamodule=data)
    module.model.save_pretrained(out)
    module.tokenizer.save_pretrained(out)
    n_parameters = sum(p.numel() for p in module.model.parameters())
    return {"parameters": n_parameters, "batch_size": batch_size, "target": target, "curve": stop.curve}
