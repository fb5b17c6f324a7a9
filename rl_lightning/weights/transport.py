"""WeightTransport: how a trainer's weights reach the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

Fingerprint = Mapping[str, tuple[float, ...]]
"""The first values of some parameters, by their Hugging Face name, exactly as the engine must hold them."""


Refusal = Callable[[], str | None]
"""Asked now and then while data moves: why some engine will not take part, or None."""


def no_refusal() -> None:
    """Every engine takes part, as far as one knows."""


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What one engine is told about a new version.

    Attributes:
        version: the version that becomes live.
        transport: `disk`, `object_store` or `distributed`; says how to read `payload`.
        payload: plain data: a folder; object references; or the plan of a collective.
        fingerprint: what the engine must hold afterwards.
    """

    version: int
    transport: str
    payload: Mapping[str, Any]
    fingerprint: Fingerprint


@runtime_checkable
class WeightTransport(Protocol):
    """Moves named tensors from the trainer to engines. Called by the WeightPublisher on trainer rank 0, in this order.

    `stage` and `send` are split because a collective only moves data while the engines are already receiving.
    """

    name: str

    def stage(self, version: int, weights: Iterable[tuple[str, torch.Tensor]], engines: Sequence[str]) -> list[WeightUpdate]:
        """Prepares `version` for `engines` (their ids, in order); one update each."""
        ...

    def send(self, timeout_s: float, refusal: Refusal) -> None:
        """Moves the data, after every engine was handed its update. A no-op where staging already stored it.

        Raises:
            TimeoutError: an engine did not take part within `timeout_s`, or refused.
        """
        ...

    def release(self) -> None:
        """Every engine acknowledged or was given up: frees what `stage` took (files, references)."""
        ...

    def close(self) -> None:
        """Ends the transport for good (process groups, folders). Idempotent."""
        ...
