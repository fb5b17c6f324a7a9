"""The driver's module has no weights where only the ranks build the model: nothing may pass for the trained one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from lightning.pytorch import LightningModule

_trained: WeakSet[LightningModule] = WeakSet()


def note_end(module: LightningModule, *, fitted: bool) -> None:
    """A run is over; if it trained a `module` whose weights stayed in the ranks, that is kept in mind."""
    if fitted and not module.state_dict():
        _trained.add(module)


def check_start(module: LightningModule, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Refuses to go on with a trained `module` from the weights that it began with.

    Args:
        module: that the trainer is to run.
        function: of the trainer, with its arguments `args` and `kwargs`.

    Raises:
        ValueError: no checkpoint is named.
    """
    if module in _trained and not inspect.signature(function).bind_partial(*args, **kwargs).arguments.get("ckpt_path"):
        raise ValueError(
            f"this {type(module).__name__} was trained in Ray workers, and its weights ended with them: name the checkpoint to "
            f'go on with, e.g. ckpt_path="best", or make a new module to begin again'
        )


def check_saved(checkpoint: dict[str, Any]) -> None:
    """Refuses a checkpoint without weights.

    Raises:
        ValueError: it is one.
    """
    if not checkpoint.get("state_dict"):
        raise ValueError(
            "the model exists in the Ray workers only: a checkpoint saved here would have no weights; save by a callback, e.g. "
            "ModelCheckpoint, and copy its best_model_path"
        )
