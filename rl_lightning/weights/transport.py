"""WeightTransport: how a trainer's weights reach the engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rl_lightning.weights.source import WeightSource


class Sample(NamedTuple):
    """Some values of one parameter: those at `weights.fingerprint.sampled_positions`."""

    shape: tuple[int, ...]
    values: tuple[float, ...]


Fingerprint = Mapping[str, Sample]
"""Samples of some parameters, by their Hugging Face name, exactly as the engine must hold them."""


Refusal = Callable[[], str | None]
"""Asked now and then while data moves: why some engine will not take part, or None."""


def no_refusal() -> None:
    """Every engine takes part, as far as one knows."""


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """One engine as transports see it.

    Attributes:
        name: of its worker; empty where the engine itself says the rest.
        dtype: that it holds weights in (`bfloat16`, ...); None where it does not say: weights come as the trainer has them.
        ranks: processes that it brings into a collective, one per GPU.
    """

    name: str = ""
    dtype: str | None = None
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What one engine is told about a new version.

    Attributes:
        version: the version that becomes live.
        transport: `disk`, `object_store`, `distributed` or `tensor`; says how to read `payload`.
        payload: plain data: a folder; object references; or the plan of a collective.
        fingerprint: what the engine must hold afterwards; None where the values are not known yet: it follows them.
    """

    version: int
    transport: str
    payload: Mapping[str, Any]
    fingerprint: Fingerprint | None


@runtime_checkable
class WeightTransport(Protocol):
    """Moves named tensors from the trainer to engines. Called by the WeightPublisher on trainer rank 0, in this order.

    `stage` and `send` are split because a collective only moves data while the engines are already receiving.  Between
    them they iterate over the weights once and to the end, whatever happens to the engines: the other trainer ranks may be
    gathering along.  Only a version that `stage` still has (see `DiskTransport`) is not asked for again.
    """

    name: str

    def stage(self, version: int, weights: WeightSource, targets: Sequence[WeightTarget]) -> list[WeightUpdate]:
        """Prepares `version` for `targets`; one update each, in their order."""
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
