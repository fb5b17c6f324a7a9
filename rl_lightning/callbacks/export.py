"""Hugging Face folders of the trained model, which `transformers` and inference servers load as they are."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rl_lightning.callbacks.frequency import Frequency, is_due
from rl_lightning.models.lora import has_lora, merged_weights, save_adapter
from rl_lightning.models.sharding import whole

logger = logging.getLogger(__name__)


class Export(Callback):
    """Saves model and tokenizer as `epoch{E}epochstep{S}globalstep{G}` (all counted from 1), and once more at the end.

    Works with any module that has a Hugging Face `model`, and a `tokenizer` or the `path` that it was loaded from.
    A folder appears under its name only when it is complete. Of a model that is trained by adapters it holds the merged
    weights, and the adapter alone in `adapter`.

    Args:
        folder: where the folders go.
        epochs: save after every so many epochs; null never.
        steps: save after every so many training steps; null never.
        secs: save when so many seconds passed; null never.
    """

    def __init__(
        self, folder: str | os.PathLike[str], epochs: int | None = 1, steps: int | None = None, secs: float | None = None
    ) -> None:
        self.folder = Path(folder)
        self.frequency = Frequency(epochs, steps, secs)
        self._name: str | None = None
        self._exported: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seconds count from the start of training."""
        self.frequency.restart_clock()
        if not hasattr(getattr(pl_module, "model", None), "save_pretrained"):
            logger.warning("%s has no Hugging Face `model`: nothing will be exported", type(pl_module).__name__)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Exports when due."""
        self._name = f"epoch{trainer.current_epoch + 1}epochstep{batch_idx + 1}globalstep{trainer.global_step}"
        if is_due(self.frequency, trainer, batch_idx):
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports the last weights unless that was just done."""
        self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = getattr(pl_module, "model", None)
        if self._name in (None, self._exported) or not hasattr(model, "save_pretrained"):
            return
        self._exported = self._name
        options: dict[str, Any] = {}
        if getattr(pl_module, "sharding", None) is not None:
            options["state_dict"] = put_together(model, keep=trainer.is_global_zero)
        elif has_lora(model):
            options["state_dict"] = dict(merged_weights(model))
        if trainer.is_global_zero:
            self._write(model, pl_module, options)

    def _write(self, model: Any, pl_module: LightningModule, options: dict[str, Any]) -> None:
        target = self.folder / str(self._name)
        part = self.folder / f".{self._name}.part"
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, **options)
        if has_lora(model):
            save_adapter(model, part / "adapter", base=str(getattr(pl_module, "path", "")))
        _tokenizer(pl_module).save_pretrained(part)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
        logger.info("Saved the model to %s", target)

    def state_dict(self) -> dict[str, Any]:
        """The counters of the frequency, the last step's name, and the last name under which something was exported."""
        return {**self.frequency.state_dict(), "name": self._name, "exported": self._exported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting; a run that failed behind its last step still exports it."""
        self.frequency.load_state_dict(state_dict)
        self._name, self._exported = state_dict.get("name"), state_dict.get("exported")


def put_together(model: Any, *, keep: bool) -> dict[str, Tensor]:
    """(Hugging Face name, CPU tensor) of every weight of a model that is cut over ranks, where wanted. A collective."""
    kept = {}
    for name, piece in merged_weights(model):
        tensor = whole(piece)
        if keep:
            kept[name] = tensor.cpu()
    return kept


def _tokenizer(pl_module: LightningModule) -> Any:
    tokenizer = getattr(pl_module, "tokenizer", None)
    if tokenizer is not None:
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pl_module.path)
