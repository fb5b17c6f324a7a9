"""Buckets: named tensors in portions of bounded size, one portion a message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rl_lightning.weights.source import WeightSource, WeightSpec

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


def plan_buckets(specs: Sequence[WeightSpec], limit: int) -> list[list[WeightSpec]]:
    """The buckets that `fill_buckets` will give, by what is known before any tensor is there."""
    plan: list[list[WeightSpec]] = []
    size = limit + 1
    for spec in specs:
        if size + spec.nbytes > limit:
            plan.append([])
            size = 0
        plan[-1].append(spec)
        size += spec.nbytes
    return plan


def fill_buckets(plan: Sequence[Sequence[WeightSpec]], weights: WeightSource) -> Iterator[Bucket]:
    """The planned buckets with their tensors; asks `weights` for those of one bucket at a time."""
    values = iter(weights)
    for specs in plan:
        bucket = [next(values) for _ in specs]
        assert [name for name, _ in bucket] == [spec.name for spec in specs], "a WeightSource iterates in the order of its specs"
        yield bucket


@contextmanager
def gathered_to_the_end(buckets: Iterator[Bucket]) -> Iterator[Iterator[Bucket]]:
    """Gives `buckets`, and takes what is left of them whatever happens inside: other trainer ranks gather along to the end."""
    try:
        yield buckets
    finally:
        for _ in buckets:
            pass
