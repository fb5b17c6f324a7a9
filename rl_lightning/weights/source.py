"""WeightSource: what a transport sends, described all at once and then given one tensor after another.

A trainer whose parameters are sharded never holds all of them: it gathers each as it is asked for, in the order of the
description, while the transport sends those before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rl_lightning.models.sharding import whole


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight before it is there: Hugging Face name, full shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the full tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightSource(Protocol):
    """Named weights of one version. Belongs to the trainer; used by one transport for one version.

    Iterating may be a collective of all trainer ranks (a gather for each weight).  Whoever begins to iterate therefore goes
    on to the end, even where nobody wants the values any more.
    """

    def specs(self) -> Sequence[WeightSpec]:
        """Every weight, in the order of iteration. No communication, nothing is computed."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of every weight; a tensor need only stay as it is until the next but one is asked for."""
        ...


class NamedWeights:
    """A WeightSource of tensors that are all there.

    Args:
        named: (name, tensor) in the order to be sent.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]) -> None:
        self._named = [(name, tensor.detach()) for name, tensor in named]

    def specs(self) -> list[WeightSpec]:
        """See `WeightSource.specs`."""
        return [WeightSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._named]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource.__iter__`."""
        return iter(self._named)


class GatheredWeights:
    """A WeightSource of a model that is cut over ranks. Iterating is a collective of all ranks.

    Args:
        named: (name, tensor) in the order to be sent; pieces are put together one after the other.
        device: where whole tensors are wanted.
        begin: called before the first gather; has the other ranks begin too.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], device: torch.device, begin: Callable[[], object]) -> None:
        self._named, self._device, self._begin = list(named), device, begin

    def specs(self) -> list[WeightSpec]:
        """See `WeightSource.specs`."""
        return [WeightSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self._named]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource.__iter__`."""
        self._begin()
        return ((name, whole(tensor).to(self._device)) for name, tensor in self._named)
