"""Buckets: named tensors in portions of bounded size, one portion a message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Bucket = list[tuple[str, "Tensor"]]


def buckets_of(named: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Bucket]:
    """Consecutive tensors of at most `limit` bytes together (a larger tensor has a bucket of its own)."""
    bucket: Bucket = []
    size = 0
    for name, tensor in named:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
