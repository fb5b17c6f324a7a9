"""WeightPublisher: after every training step the engines go on with the trainer's weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

from rl_lightning.engines.engine import EngineError, WeightMismatchError
from rl_lightning.models.lora import merged_weights
from rl_lightning.weights.source import GatheredWeights, NamedWeights, WeightSource
from rl_lightning.weights.transport_choice import make_transport

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import LightningModule, Trainer

    from rl_lightning.rollout.datamodule import RolloutDataModule
    from rl_lightning.rollout.fleet import RolloutFleet
    from rl_lightning.weights.transport import WeightTarget, WeightTransport

TARGET_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)

TOGETHER_S = 0.02
"""Engines that acknowledge within this time of each other are told to the controller at once."""

GRACE_S = 10.0
"""For an acknowledgement to arrive, after an engine's own time is over."""

GATHER, ENOUGH = "gather", "enough"
"""What rank 0 tells the others where the model is in pieces."""


class WeightPublisher(Callback):
    """Makes version v live everywhere: stage, hand to every engine, send, collect the proofs, tell the controller.

    Runs at the start, after every step, before a stand-alone validation, and, for engines that were restarted, while the
    trainer waits for a batch: on trainer rank 0, and where each rank holds a piece of the model on all.  An engine that
    fails or does not answer in time is left to its worker, which restarts it; it gets no prompts until it has proved the
    current weights.  An engine whose weights differ from the trainer's stops the run.
    """

    def __init__(self) -> None:
        self._transport: WeightTransport | None = None
        self._version: int | None = None

    # -- Callback

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation before training needs weights too."""
        self._publish_if_new(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The engines start from what the trainer starts from, also after a resume."""
        self._publish_if_new(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For `validate`, where nothing was trained."""
        self._publish_if_new(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """The step is finished: its weights are the next version."""
        stopped_s, took_s = self._publish_if_new(trainer, pl_module)
        times = {"time/weight_sync": took_s, "time/generation_paused": stopped_s}
        pl_module.weight_times = times  # type: ignore[assignment]
        # Lightning would count this step as the one before
        pl_module.log_dict({**times, "step": float(trainer.global_step)}, rank_zero_only=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Frees the transport."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Frees the transport."""
        self._close()

    # -- inside

    def _publish_if_new(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, float]:
        """(longest time that an engine stood still, whole duration) in seconds; zeros on ranks that do not send."""
        data: RolloutDataModule | None = getattr(trainer, "datamodule", None)
        make_room(data)
        is_needed = trainer.is_global_zero or in_pieces(pl_module)
        if not is_needed or getattr(data, "fleet", None) is None or self._version == trainer.global_step:
            return 0.0, 0.0
        assert data is not None and data.fleet is not None
        started, is_first = time.monotonic(), self._version is None
        self._version = trainer.global_step
        if is_first:
            data.resync = lambda workers: self._resync(trainer, pl_module, data, workers)
        if not trainer.is_global_zero:
            gather_along(trainer, pl_module)
            return 0.0, 0.0
        workers = data.fleet.wait_for_workers() if is_first else data.fleet.call("workers")
        return self._deliver(trainer, pl_module, data, workers), time.monotonic() - started

    def _resync(
        self, trainer: Trainer, pl_module: LightningModule, data: RolloutDataModule, workers: Sequence[tuple[str, Any]]
    ) -> None:
        if trainer.is_global_zero:
            logger.info("sending version %d again to %s", trainer.global_step, ", ".join(name for name, _ in workers))
            self._deliver(trainer, pl_module, data, workers)
        elif in_pieces(pl_module):
            gather_along(trainer, pl_module)

    def _deliver(
        self, trainer: Trainer, pl_module: LightningModule, data: RolloutDataModule, workers: Sequence[tuple[str, Any]]
    ) -> float:
        """Sends the present version; the longest time that an engine stood still, in seconds."""
        assert data.fleet is not None
        if self._transport is None:
            self._transport = make_transport(data.transport_name)
        version, (workers, targets) = trainer.global_step, targets_of(workers)
        try:
            updates = self._transport.stage(version, weights_of(trainer, pl_module), targets) if workers else []
            acks = {
                handle.update_weights.remote(update, data.sync_timeout_s): name
                for (name, handle), update in zip(workers, updates, strict=True)
            }
            self._send(version, acks, data.sync_timeout_s)
        finally:
            if in_pieces(pl_module):
                trainer.strategy.broadcast(ENOUGH)
        stopped_s = self._collect(version, acks, data.sync_timeout_s, data.fleet)
        self._transport.release()
        return max(stopped_s.values(), default=0.0)

    def _send(self, version: int, acks: dict[Any, str], timeout_s: float) -> None:
        if not acks:
            return
        assert self._transport is not None
        try:
            self._transport.send(timeout_s, lambda: refusal(acks))
        except TimeoutError as error:
            logger.warning("version %d was not taken by every engine: %s", version, error)

    def _collect(self, version: int, acks: dict[Any, str], timeout_s: float, fleet: RolloutFleet) -> dict[str, float]:
        """Seconds of stopped generation for every engine that proved its weights.

        Those that did get prompts again at once; they do not wait for a slower one. Each is told of once: it may have died since,
        and be back without these weights.
        """
        import ray

        stopped_s: dict[str, float] = {}
        pending, deadline = list(acks), time.monotonic() + timeout_s + GRACE_S
        while pending and ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))[0]:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=TOGETHER_S)
            proved = {acks[ref]: seconds for ref in done if (seconds := outcome(ref, acks[ref], version)) is not None}
            stopped_s |= proved
            if proved:
                fleet.call("publish", version, list(proved))
        for ref in pending:
            logger.warning("%s did not acknowledge version %d within %.0f s", acks[ref], version, timeout_s)
        if not stopped_s:
            fleet.call("publish", version, [])  # the step is finished all the same
        return stopped_s

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None


def make_room(data: Any) -> None:
    """Gives an engine on this rank's GPU what the step left in PyTorch's cache: with new weights it takes its memory again."""
    import torch

    if getattr(getattr(data, "engine", None), "colocated", False) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def outcome(ref: Any, worker: str, version: int) -> float | None:
    """Seconds that the worker's engine stood still; None if it failed, which its worker sees to.

    Raises:
        WeightMismatchError: it holds other weights.
    """
    import ray

    try:
        return float(ray.get(ref))
    except WeightMismatchError as error:
        raise WeightMismatchError(f"{worker} does not hold the weights of version {version}: {reason(error)}") from None
    except (EngineError, ray.exceptions.RayActorError) as error:
        logger.warning("%s did not take version %d: %s", worker, version, reason(error))
        return None


def targets_of(workers: Sequence[tuple[str, Any]]) -> tuple[list[tuple[str, Any]], list[WeightTarget]]:
    """Those of the (name, handle) `workers` that are there, and how their engines take weights."""
    import ray

    asked = [handle.target.remote() for _, handle in workers]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=TARGET_TIMEOUT_S)
    present, targets = [], []
    for worker, ref in zip(workers, asked, strict=True):
        try:
            targets.append(ray.get(ref, timeout=0))
            present.append(worker)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            logger.warning("%s gets no weights now: it does not answer (%s)", worker[0], reason(error))
    return present, targets


def refusal(acks: dict[Any, str]) -> str | None:
    """Why an engine has already refused its update, if one has."""
    import ray

    done, _ = ray.wait(list(acks), num_returns=len(acks), timeout=0)
    for ref in done:
        try:
            ray.get(ref)
        except (EngineError, WeightMismatchError, ray.exceptions.RayActorError) as error:
            return f"{acks[ref]} refused: {reason(error)}"
    return None


def reason(error: Exception) -> str:
    """The sentence of an error that an actor raised, without Ray's traceback around it."""
    return str(getattr(error, "cause", None) or error)


def named_weights(pl_module: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every weight that generates, shared ones once, adapters merged."""
    return merged_weights(pl_module.model)


def in_pieces(pl_module: Any) -> bool:
    """Whether the model is cut over the trainer's ranks, so that all of them take part in sending it."""
    return getattr(pl_module, "sharding", None) is not None


def weights_of(trainer: Trainer, pl_module: LightningModule) -> WeightSource:
    """What rank 0 sends; where the model is in pieces, the other ranks are in `gather_along` meanwhile."""
    named = named_weights(pl_module)
    if not in_pieces(pl_module):
        return NamedWeights(named)
    return GatheredWeights(named, pl_module.device, lambda: trainer.strategy.broadcast(GATHER))


def gather_along(trainer: Trainer, pl_module: LightningModule) -> None:
    """On every rank but 0: gathers as often as rank 0 does, until it has enough."""
    while trainer.strategy.broadcast(ENOUGH) == GATHER:
        for _ in GatheredWeights(named_weights(pl_module), pl_module.device, lambda: None):
            pass
