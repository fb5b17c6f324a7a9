"""RunResult: what comes back from rank 0, so that the driver's trainer can be asked as if it had run itself."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from lightning_utilities.core.apply_func import apply_to_collection


@dataclass(frozen=True)
class RunResult:
    """What rank 0 sends back; other ranks send only `stopped`.

    Attributes:
        stopped: the run ended early because the driver asked for it.
        state: the trainer's state.
        results: what the trainer's method returned.
        weights: the parameters and buffers that were wanted, written by `torch.save`.
        callback_metrics, logged_metrics: of the trainer.
        callbacks: (dirpath if it has one, state) of the callbacks, by state key.
        fit_loop: progress of the fit loop, None if nothing was fitted.
    """

    stopped: bool
    state: TrainerState | None = None
    results: Any = None
    weights: bytes | None = None
    callback_metrics: Mapping[str, Any] | None = None
    logged_metrics: Mapping[str, Any] | None = None
    callbacks: Mapping[str, tuple[str | None, dict[str, Any]]] | None = None
    fit_loop: dict[str, Any] | None = None


def collect(trainer: Trainer, results: Any, weights: frozenset[str], stopped: bool) -> RunResult:
    """What the driver needs to know of a finished run."""
    if not trainer.is_global_zero:
        return RunResult(stopped)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    fitted = trainer.state.fn == TrainerFn.FITTING
    return RunResult(
        stopped,
        trainer.state,
        to_cpu(results),
        _saved_weights(trainer, weights) if fitted and weights else None,
        to_cpu(dict(trainer.callback_metrics)),
        to_cpu(dict(trainer.logged_metrics)),
        {c.state_key: (getattr(c, "dirpath", None), to_cpu(state)) for c in callbacks if (state := c.state_dict())},
        # the loader's state stays: the driver has no loader
        {**trainer.fit_loop.state_dict(), "state_dict": {}} if fitted else None,
    )


def to_cpu(data: Any) -> Any:
    """The same collection with its tensors on the CPU and out of the graph."""
    return apply_to_collection(data, torch.Tensor, lambda tensor: tensor.detach().cpu())


def _saved_weights(trainer: Trainer, names: frozenset[str]) -> bytes:
    state = {name: value for name, value in trainer.lightning_module.state_dict().items() if name in names}
    buffer = io.BytesIO()
    torch.save(to_cpu(state), buffer)
    return buffer.getvalue()


def restore(trainer: Trainer, result: RunResult) -> None:
    """Makes the driver's trainer look as if the run had taken place in it."""
    assert result.state is not None
    trainer.state = result.state
    if result.weights is not None:
        weights = torch.load(io.BytesIO(result.weights), map_location="cpu", weights_only=True)
        trainer.lightning_module.load_state_dict(weights, strict=False)
    trainer.callback_metrics.update(result.callback_metrics or {})
    trainer._logger_connector._logged_metrics.update(result.logged_metrics or {})
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        folder, state = (result.callbacks or {}).get(callback.state_key, (None, None))
        if state is None:
            continue
        if folder is not None and hasattr(callback, "dirpath"):
            callback.dirpath = folder  # first: ModelCheckpoint drops the state of another folder
        callback.load_state_dict(state)
    if result.fit_loop is not None:
        trainer.fit_loop.load_state_dict(result.fit_loop)
