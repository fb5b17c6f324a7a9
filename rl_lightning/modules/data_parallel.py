"""DataParallel: what trainer ranks agree on by counting together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rl_lightning.weights.buckets import buckets_of

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20
"""Gradients that are added up in one message, and the memory that this takes beside them."""


class DataParallel:
    """Sums, maxima and gatherings over the trainer's ranks; the identity where there is one.

    Every method is a collective: all ranks call it, in the same order. The process group's time-out is their deadline.

    Args:
        group: the ranks that train on different sequences; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def index(self) -> int:
        """This rank."""
        return dist.get_rank(self._group) if self.size > 1 else 0

    def sum(self, values: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """The sum over ranks, on the CPU, communicated through `device`."""
        return self._reduce(values, dist.ReduceOp.SUM, device) if self.size > 1 else values

    def max(self, value: int, device: torch.device | str = "cpu") -> int:
        """The largest of the ranks' values."""
        return int(self._reduce(torch.tensor(value), dist.ReduceOp.MAX, device)) if self.size > 1 else value

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Adds up the gradients of all ranks, in place and in flat buckets; on every rank the same parameters have one."""
        if self.size == 1:
            return
        for bucket in buckets_of((("", p.grad) for p in parameters if p.grad is not None), BUCKET_BYTES):
            gradients = [gradient for _, gradient in bucket]
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat, group=self._group)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. Meant for small objects."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _reduce(self, values: Tensor, op: Any, device: torch.device | str) -> Tensor:
        shared = values.detach().clone().to(device)
        dist.all_reduce(shared, op=op, group=self._group)
        return shared.cpu()
