"""Job: what goes from the driver to every rank."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from ray import cloudpickle

from rl_lightning.strategies.events import log_levels

logger = logging.getLogger(__name__)

WarningFilter = tuple[str, Any, Any, Any, int]

LARGE_JOB_BYTES = 200 * 2**20
CARRIED_ENV = ("PL_", "WANDB_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "RL_LIGHTNING_", "MLFLOW_", "COMET_", "NEPTUNE_")
"""Prefixes of environment variables that the workers get from the driver, among them Lightning's global seed."""


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """Settings that torch keeps per process."""

    deterministic: bool
    warn_only: bool
    cudnn_benchmark: bool
    matmul_precision: str

    @classmethod
    def capture(cls) -> TorchSettings:
        """Those of this process."""
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.get_float32_matmul_precision(),
        )

    def apply(self) -> None:
        """Makes them this process's, with the thread count that its environment names."""
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))


@dataclass(frozen=True)
class Job:
    """What every rank gets.

    Attributes:
        blob: cloudpickle of (trainer, function, args, kwargs), in one piece so that they share what they share here.
        weights: names of the parameters and buffers wanted back.
        env: environment variables of the driver.
        folder: the driver's working directory.
        log_levels: the driver's, see `log_levels`.
        warning_filters: the driver's `warnings.filters`.
        torch: see `TorchSettings`.
        shared: for the data module, see `Companion`.
    """

    blob: bytes
    weights: frozenset[str]
    env: Mapping[str, str]
    folder: str
    log_levels: Mapping[str, int]
    warning_filters: Sequence[WarningFilter]
    torch: TorchSettings
    shared: Any = None

    def prepare_process(self) -> None:
        """Makes the worker's process like the driver's."""
        os.environ.update(self.env)
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        self.torch.apply()
        for action, message, category, module, line in reversed(self.warning_filters):
            texts = (getattr(message, "pattern", message) or "", getattr(module, "pattern", module) or "")
            warnings.filterwarnings(action, texts[0], category, texts[1], line)  # type: ignore[arg-type]


def make_job(trainer: Trainer, call: tuple[Callable[..., Any], Any, Any], return_weights: bool) -> Job:
    """Everything that a worker needs, pickled.

    Args:
        trainer: the driver's.
        call: (function, positional arguments, keyword arguments) to run.
        return_weights: whether the weights that the driver's module has are wanted back.

    Raises:
        TypeError: something that the trainer holds cannot be sent to another process.
    """
    for trainer_logger in trainer.loggers:
        _ = trainer_logger.version  # decided here, so that driver and workers agree on the folder
    try:
        blob = cloudpickle.dumps((trainer, *call))
    except (TypeError, AttributeError, ValueError) as error:
        raise TypeError(
            f"RayStrategy cannot send the trainer, its callbacks, the module or the data module to the workers: {error}; create "
            f"what does not pickle (locks, sockets, open files) in setup() or configure_model()"
        ) from error
    if len(blob) > LARGE_JOB_BYTES:
        logger.warning("%.1f GB go to every worker: build the model in configure_model() instead of __init__()", len(blob) / 1e9)
    return Job(
        blob,
        frozenset(trainer.lightning_module.state_dict()) if return_weights else frozenset(),
        {name: value for name, value in os.environ.items() if name.startswith(CARRIED_ENV)},
        os.getcwd(),
        log_levels(),
        tuple(warnings.filters),
        TorchSettings.capture(),
    )


def worker_environment() -> dict[str, str]:
    """Variables that must be there before a worker's Python starts."""
    schemes = ("stdlib", "platstdlib", "purelib", "platlib")
    own = tuple(os.path.realpath(path) for name, path in sysconfig.get_paths().items() if name in schemes)
    folders = dict.fromkeys(os.path.abspath(path) for path in sys.path if os.path.isdir(path or "."))
    return {
        "OMP_NUM_THREADS": "1",
        "NCCL_CUMEM_ENABLE": "0",  # else NCCL keeps memory that engines on the same GPU need
        "PYTHONPATH": os.pathsep.join(folder for folder in folders if not os.path.realpath(folder).startswith(own)),
    }
