"""Every answer as a line of JSON, samples as text, and the distributions behind the means."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from rl_lightning.callbacks.share import share_number, tensor_size
from rl_lightning.types import Rollout, RolloutGroup

logger = logging.getLogger(__name__)


class RolloutLog(Callback):
    """Writes `rank{r}.jsonl`, one object an answer; shows samples and histograms in TensorBoard and Weights & Biases.

    Each rank writes the answers that it trained on. A run that goes on from a checkpoint drops the lines of the steps
    that it repeats, so that every step is there once.

    Args:
        folder: where the files go.
        sample_every_n_steps: steps between two samples and histograms; 0 for none.
        n_samples: answers in one sample.
    """

    def __init__(self, folder: str | os.PathLike[str], sample_every_n_steps: int = 10, n_samples: int = 4) -> None:
        if sample_every_n_steps < 0 or n_samples < 0:
            raise ValueError(f"need sample_every_n_steps={sample_every_n_steps} and n_samples={n_samples} to be 0 or more")
        self.folder = Path(folder)
        self.sample_every_n_steps = sample_every_n_steps
        self.n_samples = n_samples
        self._file: TextIO | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens this rank's file behind the last step that counts."""
        share = share_number(trainer)
        if share is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        n_shares = trainer.world_size // tensor_size(pl_module)
        if trainer.is_global_zero:  # there were more ranks before
            for other in set(self.folder.glob("rank*.jsonl")) - {self.folder / f"rank{rank}.jsonl" for rank in range(n_shares)}:
                _drop_later_steps(other, trainer.global_step)
        path = self.folder / f"rank{share}.jsonl"
        _drop_later_steps(path, trainer.global_step)
        self._file = path.open("a", encoding="utf-8")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes this batch's answers."""
        groups: Sequence[RolloutGroup] = getattr(batch, "groups", ())
        if self._file is None:
            return
        for record in records(groups, trainer.global_step):
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        if trainer.is_global_zero and self.sample_every_n_steps and (trainer.global_step - 1) % self.sample_every_n_steps == 0:
            self._show(trainer.loggers, groups, getattr(pl_module, "step_histograms", {}), trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _show(
        self, loggers: Sequence[Logger], groups: Sequence[RolloutGroup], histograms: dict[str, torch.Tensor], step: int
    ) -> None:
        sample = list(records(groups, step))[: self.n_samples]
        for target in loggers:
            if isinstance(target, TensorBoardLogger):
                _show_in_tensorboard(target, sample, histograms, step)
            elif isinstance(target, WandbLogger):
                _show_in_wandb(target, sample, histograms, step)


def records(groups: Sequence[RolloutGroup], step: int) -> Iterator[dict[str, Any]]:
    """One JSON object per answer: what was asked, what was answered, what it got, and which weights made it."""
    for group in groups:
        for sample, rollout in enumerate(group.rollouts):
            yield {
                "step": step,
                "index": group.index,
                "query_id": group.prompt.query_id,
                "task": group.prompt.task,
                "sample": sample,
                "prompt": group.prompt.text,
                "answer": rollout.text,
                "worker": group.worker,
                **_scores(rollout),
            }


def _scores(rollout: Rollout) -> dict[str, Any]:
    versions = rollout.completion.versions
    return {
        "reward": float(rollout.reward),
        "reward_parts": {name: float(score) for name, score in rollout.reward_parts.items()},
        "reward_failure": rollout.reward_failure,
        "head_version": int(versions[0]) if len(versions) else None,
        "tail_version": int(versions[-1]) if len(versions) else None,
        "n_tokens": len(rollout.completion),
        "truncated": rollout.completion.finish_reason == "length",
    }


def _drop_later_steps(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`; a line that was torn by a crash goes as well."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        kept = sum(map(len, takewhile(lambda line: _step_of(line) <= step, lines)))
    os.truncate(path, kept)


def _step_of(line: bytes) -> float:
    """Infinite where the line is not whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except ValueError:  # torn within a letter, or never written to the disk
        return math.inf


def _show_in_tensorboard(
    target: TensorBoardLogger, sample: list[dict[str, Any]], histograms: dict[str, torch.Tensor], step: int
) -> None:
    if sample:
        target.experiment.add_text("rollouts", "\n\n---\n\n".join(map(_as_markdown, sample)), step)
    for name, values in histograms.items():
        if values.numel():
            target.experiment.add_histogram(name, values.detach().float().cpu(), step)


def _show_in_wandb(target: WandbLogger, sample: list[dict[str, Any]], histograms: dict[str, torch.Tensor], step: int) -> None:
    import wandb

    shown = {
        f"{name}_histogram": wandb.Histogram(values.detach().float().cpu().numpy())
        for name, values in histograms.items()
        if values.numel()
    }
    target.experiment.log({**shown, "trainer/global_step": step})
    if sample:
        columns = ["step", "query_id", "prompt", "answer", "reward", "head_version", "tail_version", "truncated"]
        target.log_text("rollouts", columns=columns, data=[[record[c] for c in columns] for record in sample], step=step)


def _as_markdown(record: dict[str, Any]) -> str:
    """Prompt and answer as indented blocks, which TensorBoard shows letter by letter."""
    head = (
        f"**{record['query_id']}** reward {record['reward']:.3g}, versions {record['head_version']} to {record['tail_version']}"
        f"{', truncated' if record['truncated'] else ''}"
    )
    return f"{head}\n\n{_indented(record['prompt'])}\n\nanswer:\n\n{_indented(record['answer'])}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
