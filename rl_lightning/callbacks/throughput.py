"""How fast a step was, who waited for whom, and every 30 s how fast answers are generated."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from rl_lightning.callbacks.share import tensor_size

logger = logging.getLogger(__name__)


@runtime_checkable
class RolloutStatistics(Protocol):
    """A datamodule that knows how generation goes."""

    def statistics(self) -> dict[str, float]:
        """Counters since the start (`generated_tokens` among them) and gauges of now. Called on rank 0 from two threads."""
        ...


class Throughput(Callback):
    """Adds times, tokens per second, idle shares and MFU to the module's `step_statistics` and to the loggers.

    | statistic | definition |
    |---|---|
    | `time/step` | seconds from the end of the last step to the end of this one |
    | `time/rollout_wait`, `throughput/trainer_idle_share` | seconds of it that rank 0 waited for rollouts, and their share |
    | `throughput/trained_tokens_per_s` | tokens of the batch, all ranks, over `time/step` |
    | `throughput/generated_tokens_per_s` | answer tokens generated meanwhile, over `time/step` |
    | `throughput/mfu` | operations of rank 0, or its share among tensor-parallel ranks, over `time/step` and the peak |
    | `rollout/...` | the datamodule's own counters and gauges |

    Args:
        interval_s: seconds between two `Generation throughput` lines.
        clock: seconds on a clock that only moves forward.
        peak_flops: floating-point operations per second that the device can do; None: of the GPU, where Lightning knows it.
    """

    def __init__(
        self,
        interval_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        peak_flops: float | None = None,
    ) -> None:
        self.interval_s = interval_s
        self._clock = clock
        self._ticker: _Ticker | None = None
        self._last_s = clock()
        self._last_generated = 0.0
        self._last_operations = 0.0
        self.peak_flops = peak_flops

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock and, on rank 0 with a rollout datamodule, the line every `interval_s`."""
        self._last_s = self._clock()
        self.peak_flops = self.peak_flops or _peak_flops(trainer, pl_module)
        datamodule = getattr(trainer, "datamodule", None)
        if trainer.is_global_zero and isinstance(datamodule, RolloutStatistics):
            self._last_generated = datamodule.statistics().get("generated_tokens", 0.0)  # of the attempt before, if one failed
            self._ticker = _Ticker(datamodule, self.interval_s, self._last_generated)
            self._ticker.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Operations of a validation before this step are none of it."""
        self._last_operations = _operations(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures the step that ends."""
        now = self._clock()
        step_s, self._last_s = max(now - self._last_s, 1e-9), now
        if not trainer.is_global_zero:
            return
        measured = self._rollout_statistics(trainer, step_s)
        measured |= self._training_statistics(pl_module, batch, step_s)
        statistics: Any = getattr(pl_module, "step_statistics", None)
        if statistics is not None:
            statistics.update(measured)
        for target in trainer.loggers:
            target.log_metrics(measured, step=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the lines."""
        self._stop(timeout_s=5.0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends them too: Lightning tears nothing down then, and the thread would hold model and data for ever."""
        self._stop(timeout_s=0.0)  # the restart checkpoint is saved after this

    def _stop(self, timeout_s: float) -> None:
        if self._ticker is not None:
            self._ticker.stop(timeout_s)
            self._ticker = None

    def _rollout_statistics(self, trainer: Trainer, step_s: float) -> dict[str, float]:
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, RolloutStatistics):
            return {}
        statistics = datamodule.statistics()
        generated = statistics.get("generated_tokens", 0.0)
        speed = (generated - self._last_generated) / step_s
        self._last_generated = generated
        return {f"rollout/{name}": value for name, value in statistics.items()} | {"throughput/generated_tokens_per_s": speed}

    def _training_statistics(self, pl_module: LightningModule, batch: Any, step_s: float) -> dict[str, float]:
        n_tokens = len(getattr(batch, "token_ids", ()))
        wait_s = float(getattr(batch, "wait_s", 0.0))
        all_tokens = getattr(pl_module, "step_statistics", {}).get("n_tokens", float(n_tokens))
        statistics = {
            "time/step": step_s,
            "time/rollout_wait": wait_s,
            "throughput/trainer_idle_share": min(1.0, wait_s / step_s),
            "throughput/trained_tokens_per_s": all_tokens / step_s,
        }
        operations = (_operations(pl_module) - self._last_operations) / tensor_size(pl_module)
        if self.peak_flops and operations:
            statistics["throughput/mfu"] = operations / step_s / self.peak_flops
        return statistics


class _Ticker:
    """A thread that says every `interval_s` how many tokens per second were generated since the last time."""

    def __init__(self, datamodule: RolloutStatistics, interval_s: float, generated: float) -> None:
        self._datamodule, self._interval_s, self._generated = datamodule, interval_s, generated
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="generation-throughput", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Returns when the thread has ended, or after `timeout_s` if the datamodule does not answer."""
        self._ended.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        last, last_s = self._generated, time.monotonic()
        while not self._ended.wait(self._interval_s):
            try:
                generated = self._datamodule.statistics().get("generated_tokens", 0.0)
            except RuntimeError as error:  # the run itself meets the same failure, or is already over
                logger.warning("Generation throughput is not reported any more: %s", error)
                return
            now = time.monotonic()
            logger.info("Generation throughput: %.1f tokens/s", (generated - last) / (now - last_s))
            last, last_s = generated, now


def _operations(pl_module: LightningModule) -> float:
    """Counted by the module so far; 0 by one that does not count."""
    counted: Any = getattr(pl_module, "operations", 0.0)
    return float(counted)


def _peak_flops(trainer: Trainer, pl_module: LightningModule) -> float | None:
    """Floating-point operations per second that the device can do in the type of the matrix products, None where unknown."""
    if pl_module.device.type != "cuda":
        return None
    stored = next((p.dtype for p in pl_module.parameters()), torch.float32)
    return get_available_flops(pl_module.device, torch.bfloat16 if trainer.precision == "bf16-mixed" else stored)
