"""ObjectStoreTransport: weights through Ray's object store, for engines that live in the worker's process.

A weight travels as a NumPy view of its memory, which Ray stores without pickling and hands to every process of a machine
without copying.  NumPy knows no bfloat16, so each tensor goes as plain bytes beside its dtype and shape.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_lightning.weights.buckets import Bucket, fill_buckets, gathered_to_the_end, plan_buckets
from rl_lightning.weights.cast import in_dtype_of
from rl_lightning.weights.fingerprint import FingerprintTaker
from rl_lightning.weights.source import WeightSource
from rl_lightning.weights.transport import Refusal, WeightTarget, WeightUpdate, no_refusal

BUCKET_BYTES = 256 * 2**20
"""Weights are stored in objects of about this size, so that no single huge object has to fit."""


class ObjectStoreTransport:
    """The trainer's side. `stage` stores the weights once for all engines; `send` has nothing left to do.

    Where Ray does not run, the update carries copies of the arrays themselves, which serves an engine in the same process.

    Args:
        bucket_bytes: size of one stored object.
    """

    name = "object_store"

    def __init__(self, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._bucket_bytes = bucket_bytes
        self._buckets: list[dict[str, Any]] = []

    def stage(self, version: int, weights: WeightSource, targets: Sequence[WeightTarget]) -> list[WeightUpdate]:
        """Stores the weights, bucket by bucket; one update for each of `targets`, all with the same references."""
        weights = in_dtype_of(targets, weights)
        taker, self._buckets = FingerprintTaker(weights.specs()), []
        with gathered_to_the_end(fill_buckets(plan_buckets(weights.specs(), self._bucket_bytes), weights)) as buckets:
            for bucket in buckets:
                taker.look(bucket)
                self._buckets.append(_store(bucket))
        proof = taker.fingerprint()
        return [WeightUpdate(version, self.name, {"buckets": self._buckets}, proof) for _ in targets]

    def send(self, timeout_s: float, refusal: Refusal = no_refusal) -> None:
        """Nothing: engines read what `stage` stored."""

    def release(self) -> None:
        """Drops the references; the store frees the weights when the engines have let go of them too."""
        self._buckets = []

    def close(self) -> None:
        """Same as `release`."""
        self.release()


def read_weights(payload: Mapping[str, Any], timeout_s: float) -> list[tuple[str, Tensor]]:
    """The engine's side: named tensors that share the store's memory; not to be written to. Blocks.

    Raises:
        TimeoutError: the store did not deliver within `timeout_s`.
    """
    buckets = payload["buckets"]
    data = _fetch([bucket["data"] for bucket in buckets], timeout_s)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return [
        (name, torch.from_numpy(array).view(getattr(torch, dtype)).view(shape))
        for bucket, arrays in zip(buckets, data, strict=True)
        for (name, dtype, shape), array in zip(bucket["weights"], arrays, strict=True)
    ]


def _store(bucket: Bucket) -> dict[str, Any]:
    weights = [(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in bucket]
    return {"weights": weights, "data": _put([_bytes(tensor) for _, tensor in bucket])}


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _put(arrays: list[np.ndarray]) -> Any:
    ray = sys.modules.get("ray")
    return ray.put(arrays) if ray is not None and ray.is_initialized() else [array.copy() for array in arrays]


def _fetch(data: list[Any], timeout_s: float) -> list[list[np.ndarray]]:
    if all(isinstance(arrays, list) for arrays in data):
        return data
    import ray

    try:
        return ray.get(data, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise TimeoutError(f"the object store did not deliver {len(data)} objects of weights within {timeout_s:.0f} s") from None
