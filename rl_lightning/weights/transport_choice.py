"""make_transport: the way weights travel, by the name that a recipe gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_lightning.weights.transport import WeightTransport


def make_transport(name: str) -> WeightTransport:
    """The transport called `name`."""
    if name == "disk":
        from rl_lightning.weights.disk import DiskTransport

        return DiskTransport()
    if name == "object_store":
        from rl_lightning.weights.object_store import ObjectStoreTransport

        return ObjectStoreTransport()
    if name == "tensor":
        from rl_lightning.weights.tensor import TensorTransport

        return TensorTransport()
    from rl_lightning.weights.distributed import DistributedTransport

    return DistributedTransport()
