"""quiet_trainer: a Lightning Trainer that shows, logs and keeps nothing, as a benchmark wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl


class QuickEnd(pl.Callback):
    """Lets go of the optimisers when all is measured: Lightning would copy their state to the CPU, ten seconds for 1.7B."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Their memory is free as soon as the module is."""
        trainer.strategy.optimizers = []


def quiet_trainer(cpu: bool, callbacks: Sequence[pl.Callback], autocast: bool = True, **options: Any) -> pl.Trainer:
    """On one device, for as many epochs as `options` do not limit.

    Args:
        cpu: on the CPU in float32.
        callbacks: that measure.
        autocast: bfloat16 autocast on a GPU; else the types that the module has.
        **options: of the Trainer.
    """
    options = {"devices": 1, "max_epochs": -1, **options}
    return pl.Trainer(
        accelerator="cpu" if cpu else "gpu",
        precision="bf16-mixed" if autocast and not cpu else "32-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks, QuickEnd()],
        **options,
    )
