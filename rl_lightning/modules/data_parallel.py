"""DataParallel: what trainer ranks agree on by counting together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class DataParallel:
    """Sums, maxima and gatherings over the trainer's ranks; the identity where there is one.

    Every method is a collective: all ranks call it, in the same order. The process group's time-out is their deadline.
    """

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def sum(self, values: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """The sum over ranks, on the CPU, communicated through `device`."""
        return self._reduce(values, dist.ReduceOp.SUM, device) if self.size > 1 else values

    def max(self, value: int, device: torch.device | str = "cpu") -> int:
        """The largest of the ranks' values."""
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.MAX, device)) if self.size > 1 else value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. Meant for small objects."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def _reduce(self, values: Tensor, op: Any, device: torch.device | str) -> Tensor:
        shared = values.detach().clone().to(device)
        dist.all_reduce(shared, op=op)
        return shared.cpu()
