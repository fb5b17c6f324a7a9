"""NonFiniteGuard: stops a run whose gradients are not finite any more, and keeps what is needed to see why."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from rl_lightning.callbacks.share import share_number
from rl_lightning.failure import NonFiniteError
from rl_lightning.rollout.replay import ReplayDataModule
from rl_lightning.rollout.saved_step import SavedStep
from rl_lightning.types import Batch

logger = logging.getLogger(__name__)

CHECKPOINT, CONFIG = "step.ckpt", "config.yaml"


class NonFiniteGuard(Callback):
    """Ends the run after `max_in_a_row` steps in a row with a loss or gradient that is not finite.

    The modules skip the update of such a minibatch and go on, so that one bad batch costs nothing. What comes again and again
    is an error in model, loss or options. Then the last of these steps is kept as

        folder/nonfinite_globalstep{N}/
            batch_rank{r}.pt   each rank's batch
            step.ckpt          checkpoint of the state before the step
            config.yaml        `rl-lightning fit --config THIS` trains that step again, on one device and without an engine

    The state is saved before a step that may be the last one, because some of its minibatches may be updated on. The folder
    appears under its name only when it is complete.

    Args:
        folder: where dumps go.
        max_in_a_row: steps until the run ends; from the one before on, the start of each step is saved. 1 therefore saves
            before every step of the run.
    """

    def __init__(self, folder: str | os.PathLike[str], max_in_a_row: int = 3) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"NonFiniteGuard needs max_in_a_row of at least 1 step, got {max_in_a_row}")
        self.folder = Path(folder)
        self.max_in_a_row = max_in_a_row
        self._in_a_row = 0
        self._part: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing has happened yet."""
        self._in_a_row = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps what this step starts from if it may be the last. Collective: all ranks have counted the same."""
        is_replay = isinstance(getattr(trainer, "datamodule", None), ReplayDataModule)
        if self._in_a_row + 1 >= self.max_in_a_row and isinstance(batch, Batch) and not is_replay:
            self._save(trainer, batch, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts.

        Raises:
            NonFiniteError: this was one too many.
        """
        self._in_a_row = self._in_a_row + 1 if is_nonfinite(getattr(pl_module, "step_statistics", {})) else 0
        if self._part is not None and self._in_a_row >= self.max_in_a_row:
            raise NonFiniteError(self._report(trainer, self._publish(trainer)))
        self._discard(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves no half-written dump."""
        self._discard(trainer)

    # -- inside

    def _save(self, trainer: Trainer, batch: Batch, batch_idx: int) -> None:
        name = f".nonfinite_globalstep{trainer.global_step + 1}.part"
        self._part = part = Path(trainer.strategy.broadcast(str(self.folder / name)))  # rank 0's folder holds all ranks' batches
        if trainer.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        trainer.strategy.barrier("folder of the dump")
        generation = getattr(getattr(trainer, "datamodule", None), "generation", None)
        step = SavedStep(batch.to("cpu"), batch_idx, trainer.num_training_batches, generation)
        if (share := share_number(trainer)) is not None:
            step.save(part / f"batch_rank{share}.pt")
        with _one_file(trainer.strategy):
            trainer.save_checkpoint(part / CHECKPOINT, weights_only=False)

    def _publish(self, trainer: Trainer) -> Path:
        """Gives the dump its name."""
        assert self._part is not None
        part, self._part = self._part, None
        dump = part.with_name(part.name.removeprefix(".").removesuffix(".part"))
        if trainer.is_global_zero:
            _write_config(Path(trainer.default_root_dir) / CONFIG, dump, part)
            shutil.rmtree(dump, ignore_errors=True)
            part.replace(dump)
        trainer.strategy.barrier("dump")
        return dump

    def _discard(self, trainer: Trainer) -> None:
        if self._part is not None and trainer.is_global_zero:
            shutil.rmtree(self._part, ignore_errors=True)
        self._part = None

    def _report(self, trainer: Trainer, dump: Path) -> str:
        command = f"`rl-lightning fit --config {dump / CONFIG}`"
        if not (dump / CONFIG).exists():
            command = f"`trainer.fit(module, ReplayDataModule({str(dump)!r}), ckpt_path={str(dump / CHECKPOINT)!r})`"
        return (
            f"loss or gradient were not finite in {self._in_a_row} training steps in a row, the last of them global step "
            f"{trainer.global_step}; {dump} holds that step, and {command} trains it again without an engine"
        )


@contextmanager
def _one_file(strategy: Any) -> Iterator[None]:
    """Inside, a model in pieces is saved whole: the step is to be seen again on one device."""
    in_pieces = getattr(strategy, "_save_distributed_checkpoint", None)
    if in_pieces is None:
        yield
        return
    strategy._save_distributed_checkpoint = False
    try:
        yield
    finally:
        strategy._save_distributed_checkpoint = in_pieces


def is_nonfinite(statistics: Mapping[str, float]) -> bool:
    """Whether a step with these `step_statistics` had a minibatch whose gradient, or a loss that was not finite."""
    losses = (value for name, value in statistics.items() if name.endswith("loss"))
    return statistics.get("nonfinite_gradients", 0.0) > 0 or not all(math.isfinite(loss) for loss in losses)


def replay_config(config: Mapping[str, Any], dump: Path) -> dict[str, Any]:
    """The run's resolved options, changed so that they train the step in `dump` alone, on one device, and write below it."""
    data = {"class_path": f"{ReplayDataModule.__module__}.{ReplayDataModule.__name__}", "init_args": {"path": str(dump)}}
    one_device = {"strategy": "auto", "accelerator": "auto", "devices": 1, "num_nodes": 1, "limit_val_batches": 0}
    run = {
        "fileroot": str(dump / "replay"),
        "allocation_mode": None,
        "recover_mode": "disabled",
        "wandb_mode": "disabled",
        "tensorboard_path": None,
        **{f"ckpt_freq_{unit}": None for unit in ("epochs", "steps", "secs")},
    }
    return {
        **config,
        "data": data,
        "trainer": {**config.get("trainer", {}), **one_device},
        "run": {**config.get("run", {}), **run},
        "ckpt_path": str(dump / CHECKPOINT),
    }


def _write_config(source: Path, dump: Path, folder: Path) -> None:
    """The command line saves its options where the run's logs are; a run by hand has none."""
    if source.exists():
        config = replay_config(yaml.safe_load(source.read_text(encoding="utf-8")), dump)
        (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
