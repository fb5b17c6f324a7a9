"""CastWeights: weights in the dtype that engines hold them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rl_lightning.weights.source import WeightSource, WeightSpec
from rl_lightning.weights.transport import WeightTarget


class CastWeights:
    """`source` with its floating-point weights in `dtype` where that is smaller: bfloat16 needs half of float32's bytes."""

    def __init__(self, source: WeightSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype

    def specs(self) -> list[WeightSpec]:
        """See `WeightSource.specs`."""
        return [replace(spec, dtype=self._cast(spec.dtype)) for spec in self._source.specs()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource.__iter__`."""
        return ((name, tensor.to(self._cast(tensor.dtype))) for name, tensor in self._source)

    def _cast(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if dtype.is_floating_point and dtype.itemsize > self._dtype.itemsize else dtype


def in_dtype_of(targets: Sequence[WeightTarget], weights: WeightSource) -> WeightSource:
    """`weights` in the dtype that all targets hold them in, if that makes them smaller."""
    dtypes = {target.dtype for target in targets}
    dtype = getattr(torch, dtypes.pop() or "", None) if len(dtypes) == 1 else None
    return CastWeights(weights, dtype) if isinstance(dtype, torch.dtype) else weights
