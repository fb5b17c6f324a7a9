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
DEVICE_ARGUMENT, COUNTER_ARGUMENTS = 6, slice(11, 13)
"""Places among the arguments of `rebuild_cuda_tensor`: the device's index, and where it is counted who has yet to open it."""


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
        self._last, self._given = 0, list[list[Handle]]()

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
        engines = range(len(self._targets))
        for i, bucket in enumerate(buckets):
            taker.look(bucket)
            shared = share_bucket(bucket)
            if i:
                channel.watch(_taken(channel, i - 1, engines), deadline, f"engines to copy bucket {i - 1}")
            # the bucket before is let go now that all have copied it
            self._last, self._given = i, [[Handle(shared) for _ in range(target.ranks)] for target in self._targets]
            for engine, handles in enumerate(self._given):
                channel.give_bucket(i, engine, [handle.text for handle in handles])
        channel.watch(_taken(channel, len(self._plan) - 1, engines), deadline, f"engines to copy bucket {len(self._plan) - 1}")
        self._given = []
        channel.tell_fingerprint(taker.fingerprint())

    def _give_up(self) -> None:
        """Takes the last bucket back from engines that have not copied it: they will not, or end with it half copied."""
        given, self._given = self._given, []
        for engine, handles in enumerate(given):
            if self._channel is None or not self._channel.is_taken(self._last, range(engine, engine + 1)):
                for handle in handles:
                    handle.take_back()


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


class Handle:
    """By what one process opens a bucket, once. Its memory lives until then, whatever becomes of the tensors.

    Args:
        bucket: of `share_bucket`.

    Attributes:
        text: base64 of the pickled [(name, tensor)].
    """

    def __init__(self, bucket: Bucket) -> None:
        self._tensors = [(name, _Shared(tensor)) for name, tensor in bucket]
        buffer = io.BytesIO()
        with shared_by_name():
            ForkingPickler(buffer).dump(self._tensors)
        self.text = base64.b64encode(buffer.getvalue()).decode()

    def take_back(self) -> None:
        """Nobody has opened it, or will: counts as if it had been opened and closed, on a GPU for each tensor."""
        storage: Any = self._tensors[0][1].tensor.untyped_storage()
        if not storage.is_cuda:
            storage._shared_decref()
            return
        for _, shared in self._tensors:
            storage._release_ipc_counter(*shared.counter, device=storage.device)


class _Shared:
    """Pickles as a tensor. Its GPU is named by UUID: the same one has another index where other GPUs are visible."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.counter: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self.tensor)
        if self.tensor.is_cuda:
            uuid = str(torch.cuda.get_device_properties(self.tensor.device).uuid)
            self.counter = arguments[COUNTER_ARGUMENTS]
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
