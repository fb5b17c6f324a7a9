"""TensorTransport: weights in memory that trainer and server both see, for engines on the trainer's own GPU.

NCCL cannot put two ranks on one GPU.  Here the server opens the trainer's memory instead (CUDA IPC; shared memory on a CPU)
and copies from it, bucket by bucket; a bucket lives until every engine has said that it has it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch.multiprocessing import reductions

from rl_lightning.weights.agreed import BUCKET_BYTES, AgreedTransport
from rl_lightning.weights.buckets import Bucket
from rl_lightning.weights.channel import SyncChannel
from rl_lightning.weights.fingerprint import FingerprintTaker
from rl_lightning.weights.source import WeightSource
from rl_lightning.weights.transport import WeightTarget, WeightUpdate

ALIGNMENT = 16
DEVICE_ARGUMENT = 6
"""Place of the device's index among the arguments of `rebuild_cuda_tensor`."""


class TensorTransport(AgreedTransport):
    """See `AgreedTransport`.

    Args:
        host: address of this machine; by default Ray's node address, or 127.0.0.1 without Ray. Only a few bytes go there.
        bucket_bytes: memory that is shared at a time; twice that much is taken beside the weights.
    """

    name = "tensor"

    def __init__(self, host: str | None = None, bucket_bytes: int = BUCKET_BYTES) -> None:
        super().__init__(host, bucket_bytes)
        self._targets: Sequence[WeightTarget] = ()

    def stage(self, version: int, weights: WeightSource, targets: Sequence[WeightTarget]) -> list[WeightUpdate]:
        """The plan; also gives the memory that the training step left in the allocator's cache to the engine beside it."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._targets, agreed = targets, self._agree(weights, targets)
        payload = {**agreed, "n_buckets": len(self._plan)}
        return [WeightUpdate(version, self.name, {**payload, "engine": i}, None) for i in range(len(targets))]

    def release(self) -> None:
        """See `AgreedTransport.release`; also frees memory that engines have closed."""
        super().release()
        if torch.cuda.is_initialized():
            torch.cuda.ipc_collect()

    def _move(self, buckets: Iterator[Bucket], channel: SyncChannel, deadline: float) -> None:
        """While the engines copy one bucket, the next one is gathered."""
        taker = FingerprintTaker([spec for specs in self._plan for spec in specs])
        engines, before = range(len(self._targets)), None
        for i, bucket in enumerate(buckets):
            taker.look(bucket)
            shared = share_bucket(bucket)
            if before is not None:
                channel.watch(_taken(channel, i - 1, engines), deadline, f"engines to copy bucket {i - 1}")
            for engine, target in zip(engines, self._targets, strict=True):
                channel.give_bucket(i, engine, [handles(shared) for _ in range(target.ranks)])
            before = shared  # lives until all have copied it
        channel.watch(_taken(channel, len(self._plan) - 1, engines), deadline, f"engines to copy bucket {len(self._plan) - 1}")
        channel.tell_fingerprint(taker.fingerprint())

    def _give_up(self) -> None:
        """Nothing: a bucket lives no longer than its transfer."""


def _taken(channel: SyncChannel, bucket: int, engines: range) -> Callable[[], bool]:
    return lambda: channel.is_taken(bucket, engines)


def share_bucket(bucket: Bucket) -> Bucket:
    """The same tensors in one piece of memory, which on a CPU can be opened by its name."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for _, tensor in bucket]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device=bucket[0][1].device)
    if not flat.is_cuda:
        with shared_by_name():
            flat.share_memory_()
    shared = []
    for (name, tensor), place in zip(bucket, flat.split(sizes), strict=True):
        view = place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        shared.append((name, view))
    return shared


def handles(bucket: Bucket) -> str:
    """Base64 of the pickled [(name, tensor)] that one process opens, once."""
    buffer = io.BytesIO()
    with shared_by_name():
        ForkingPickler(buffer).dump([(name, _Handle(tensor)) for name, tensor in bucket])
    return base64.b64encode(buffer.getvalue()).decode()


class _Handle:
    """Pickles as a tensor. Its GPU is named by UUID: the same one has another index where other GPUs are visible."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        if self._tensor.is_cuda:
            uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
            arguments = (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])
        return rebuild, arguments


@contextmanager
def shared_by_name() -> Iterator[None]:
    """CPU memory is shared by a name, which any process can open; torch's default hands file descriptors to children."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
