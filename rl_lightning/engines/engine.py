"""Engine: what turns token ids into answers, and takes new weights while it does."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from rl_lightning.types import Completion, GenerationRequest
from rl_lightning.weights.transport import WeightTarget, WeightUpdate


class EngineError(RuntimeError):
    """The engine failed or died; its owner restarts it. The message names the engine and the cause."""


class UpdateGivenUpError(EngineError):
    """The trainer or another engine gave a weight update up before anything was changed here: the engine is as it was."""


class WeightMismatchError(RuntimeError):
    """The engine's weights are not the ones that were sent. The run stops: training on it would be silent nonsense."""


@runtime_checkable
class YieldsMemory(Protocol):
    """What an engine on the trainer's GPU may have besides: it is asked before every step of a synchronous trainer."""

    async def yield_memory(self) -> None:
        """Lets go of what memory it can until the next `update_weights`; generates nothing meanwhile. Idempotent.

        Raises:
            EngineError: the engine died or did not answer in time.
        """
        ...


@runtime_checkable
class Engine(Protocol):
    """One inference engine, owned by one RolloutWorker.

    An instance is configured in the driver, pickled, and started in the worker's process; `__init__` therefore only
    stores its settings.  All methods run on the worker's event loop and must not block it.  Every wait inside has a
    deadline and raises `EngineError` when it passes.
    """

    @property
    def transports(self) -> tuple[str, ...]:
        """Weight transports that the engine can receive, preferred first, as far as the process that asks can tell."""
        ...

    @property
    def target(self) -> WeightTarget:
        """How it takes weights, without a name; known once it was started, and the same after every start."""
        ...

    async def start(self, model_path: str) -> None:
        """Loads `model_path` (version 0 until told otherwise) and returns when ready to generate."""
        ...

    async def generate(self, request: GenerationRequest) -> Completion:
        """Answers one request; called many times concurrently.

        A weight update in between interrupts it: tokens so far keep their log-probabilities and versions, the rest is
        sampled under the new weights from a context recomputed under them.  Cancelling the task frees the request.
        """
        ...

    async def update_weights(self, update: WeightUpdate) -> float:
        """Pauses generation, loads `update`, proves it by its fingerprint, resumes; returns seconds of generation stopped.

        Raises:
            WeightMismatchError: the fingerprint differs.
            UpdateGivenUpError: others gave up, and nothing was changed.
            EngineError: the engine died or did not answer in time.
        """
        ...

    async def health(self) -> None:
        """Returns if the engine can generate now; raises `EngineError` otherwise. Cheap enough to be called every second."""
        ...

    async def stop(self) -> None:
        """Ends the engine and everything that it started. Idempotent."""
        ...
