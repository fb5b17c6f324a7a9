"""ReplayDataModule: one saved training step again, without engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from rl_lightning.rollout.saved_step import SavedStep, merge
from rl_lightning.types import Batch, SamplingParams


class ReplayDataModule(LightningDataModule):
    """Gives the batch of a dump of `NonFiniteGuard` once, then ends training. Needs neither Ray nor an engine.

    Fit with the dump's checkpoint, it trains exactly that step. On as many ranks as the dump was written by, each gets its own
    batch again; on one rank, that rank gets the sequences of all.

    Args:
        path: the dump's folder.

    Attributes:
        generation: how the answers were sampled; None where nothing was.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.generation: SamplingParams | None = None
        self._steps: list[SavedStep] = []

    def check_inputs(self) -> None:
        """Reads the dump. Idempotent.

        Raises:
            FileNotFoundError: there is none.
        """
        if self._steps:
            return
        files = sorted(Path(self.path).glob("batch_rank*.pt"))
        if not files:
            raise FileNotFoundError(f"data.path={self.path} holds no batch_rank0.pt: give the folder that NonFiniteError names")
        self._steps = [SavedStep.load(file) for file in files]
        self.generation = self._steps[0].generation

    def setup(self, stage: str) -> None:
        """Reads the dump.

        Raises:
            ValueError: it cannot be shared by so many ranks.
        """
        self.check_inputs()
        assert self.trainer is not None
        if self.trainer.world_size not in (1, len(self._steps)):
            raise ValueError(
                f"{self.trainer.world_size} ranks cannot replay a step that {len(self._steps)} ranks trained: "
                f"set trainer.devices to 1 or {len(self._steps)}"
            )

    def train_dataloader(self) -> ReplayLoader:
        """The one batch."""
        assert self.trainer is not None
        if self.trainer.world_size > 1:
            return ReplayLoader(self._steps[self.trainer.global_rank], self.trainer)
        whole = replace(self._steps[0], batch=merge([step.batch for step in self._steps]))
        return ReplayLoader(whole, self.trainer)


class ReplayLoader:
    """An epoch of which one step is trained: as long as the epoch that the step comes from, so that all counts agree."""

    def __init__(self, step: SavedStep, trainer: Trainer) -> None:
        self._step, self._trainer = step, trainer

    def __len__(self) -> int:
        n_batches = self._step.n_batches
        return int(n_batches) if n_batches < float("inf") else self._step.batch_idx + 1

    def __iter__(self) -> Iterator[Batch]:
        self._trainer.should_stop = True  # after the batch that the trainer asks for now
        yield self._step.batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the checkpoint's position belongs to the loader of the run."""
