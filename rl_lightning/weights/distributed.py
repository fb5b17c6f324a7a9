"""DistributedTransport: weights by broadcast (NCCL between GPUs, gloo between CPUs) straight into the engines' servers.

Rank 0 of the process group is the trainer, ranks 1.. are SGLang's servers, one for each of their GPUs.  Tensors travel in
flat buckets.  A group lives as long as its members: when an engine was restarted or the set of engines changed, a new one
is formed.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from rl_lightning.weights.agreed import BUCKET_BYTES, AgreedTransport
from rl_lightning.weights.buckets import Bucket
from rl_lightning.weights.channel import SyncChannel
from rl_lightning.weights.fingerprint import FingerprintTaker
from rl_lightning.weights.source import WeightSource, WeightSpec
from rl_lightning.weights.transport import WeightTarget, WeightUpdate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

logger = logging.getLogger(__name__)

T = TypeVar("T")

SLACK_S = 60.0
"""PyTorch's own deadlines end so much later than ours, which tell what was waited for."""

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Environment variable that every process group reads as it is formed."""


class DistributedTransport(AgreedTransport):
    """See `AgreedTransport`.

    NCCL: SGLang's processes run with NCCL_CUMEM_ENABLE=0, and a trainer that does not would wait for ever.  The variable
    must be in the trainer's environment before its first use of NCCL; it is set here for those who use it nowhere else.

    Args:
        backend: `nccl` or `gloo`; by default what the weights' device has.
        host: address of this machine that engines can reach; by default Ray's node address, or 127.0.0.1 without Ray.
        bucket_bytes: size of one broadcast; twice that much memory is taken beside the weights.
    """

    name = "distributed"
    failures = (*AgreedTransport.failures, RuntimeError)  # of a broken connection in the collective

    def __init__(self, backend: str | None = None, host: str | None = None, bucket_bytes: int = BUCKET_BYTES) -> None:
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        super().__init__(host, bucket_bytes)
        self._backend = backend
        self._group: ProcessGroup | None = None
        self._group_name = ""
        self._world = self._n_engines = 1

    def stage(self, version: int, weights: WeightSource, targets: Sequence[WeightTarget]) -> list[WeightUpdate]:
        """The plan of a broadcast to `targets`, whose ranks follow each other from 1 on in that order."""
        agreed = self._agree(weights, targets)
        if self._backend is None:
            self._backend = "nccl" if torch.cuda.is_initialized() else "gloo"
        first_ranks = [*itertools.accumulate((target.ranks for target in targets), initial=1)]
        self._world, self._n_engines = first_ranks.pop(), len(targets)
        payload = {
            **agreed,
            "backend": self._backend,
            "world_size": self._world,
            "buckets": [describe(specs) for specs in self._plan],
        }
        return [
            WeightUpdate(version, self.name, {**payload, "engine": i, "rank": rank}, None) for i, rank in enumerate(first_ranks)
        ]

    def _move(self, buckets: Iterator[Bucket], channel: SyncChannel, deadline: float) -> None:
        first = next(buckets)  # generation need not stand still for it
        self._agree_on_group(channel, deadline)
        self._set_timeout(deadline)
        self._stream(itertools.chain([first], buckets), channel, deadline)

    def _agree_on_group(self, channel: SyncChannel, deadline: float) -> None:
        """Uses the group that all engines and nobody else are in, or forms a new one with them."""
        groups = channel.groups(range(self._n_engines), deadline)
        is_whole = self._group is not None and self._group.size() == self._world
        if is_whole and all(group == self._group_name for group in groups):
            channel.go(self._group_name)
            return
        self._give_up()
        name = f"rl-lightning-{uuid.uuid4().hex}"
        channel.go(name)
        join = _Background(lambda: self._form_group(name, deadline))
        channel.watch(join.done, deadline, "the engines to join a process group")
        self._group, self._group_name = join.result(), name

    def _form_group(self, name: str, deadline: float) -> ProcessGroup:
        """The other half of what SGLang does in `/init_weights_update_group`. Blocks until all have joined."""
        from torch.distributed import Backend, PrefixStore, distributed_c10d

        assert self._store is not None and self._backend is not None
        timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        store = PrefixStore(name, self._store)
        helper: Any = distributed_c10d._new_process_group_helper
        with unbound_default_group(), no_end_with_engines():
            group, _ = helper(self._world, 0, [], Backend(self._backend), store, group_name=name, timeout=timeout)
        return group

    def _stream(self, buckets: Iterator[Bucket], channel: SyncChannel, deadline: float) -> None:
        """While one bucket moves, the next one is gathered."""
        taker = FingerprintTaker([spec for specs in self._plan for spec in specs])
        flat = self._flat(next(buckets, None), taker)
        while flat is not None:
            begun = self._begin_broadcast(flat)
            following = self._flat(next(buckets, None), taker)
            what = f"a broadcast of {flat.numel() / 2**20:.0f} MiB to {self._n_engines} engines"
            channel.watch(begun.done, deadline, what)
            work = begun.result()
            channel.watch(work.is_completed, deadline, what)
            work.wait()
            flat = following
        channel.tell_fingerprint(taker.fingerprint())

    def _flat(self, bucket: Bucket | None, taker: FingerprintTaker) -> Tensor | None:
        if bucket is None:
            return None
        taker.look(bucket)
        flat = flatten(bucket)
        on_cpu = self._backend == "nccl" and not flat.is_cuda  # a trainer may keep its weights there
        return flat.cuda() if on_cpu else flat

    def _begin_broadcast(self, flat: Tensor) -> _Background[Work]:
        """Not in this thread: the first broadcast of a group connects NCCL, which waits for all engines without a deadline."""
        from torch.distributed import BroadcastOptions

        group = self._group
        assert group is not None
        options = BroadcastOptions()
        options.rootRank = 0
        options.asyncOp = True
        stream = torch.cuda.current_stream(flat.device) if flat.is_cuda else None  # which `flat` was made on

        def begin() -> Work:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                return group.broadcast([flat], options)

        return _Background(begin)

    def _set_timeout(self, deadline: float) -> None:
        """Has PyTorch wait at least until `deadline`; a group may have been formed when little time was left."""
        assert self._group is not None
        timeout = timedelta(seconds=max(0.0, deadline - time.monotonic()) + SLACK_S)
        self._backend_of(self._group)._set_default_timeout(timeout)

    def _backend_of(self, group: ProcessGroup) -> Any:
        """What does the work; TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it."""
        backend: Any = group._get_backend(torch.device("cuda" if self._backend == "nccl" else "cpu"))
        return getattr(backend, "wrapped_pg", backend)

    def _give_up(self) -> None:
        """Leaves the process group without waiting for anybody."""
        if self._group is None:
            return
        left, name = [self._group], self._group_name
        self._group, self._group_name = None, ""
        if self._backend == "nccl":
            self._backend_of(left[0]).abort()
        _Background(lambda: _forget(left.pop(), name))  # the last reference: a group that ends waits for its watchdog


def _forget(group: ProcessGroup, name: str) -> None:
    """Takes the `group` called `name` out of PyTorch's registries, which would keep its threads, connections and last buckets."""
    from torch.distributed import distributed_c10d

    world, unregister = distributed_c10d._world, cast(Any, distributed_c10d._unregister_process_group)
    for registry in (world.pg_map, world.pg_names, world.pg_backend_config, world.pg_to_tag):
        registry.pop(group, None)
    for groups in world.tags_to_pg.values():
        if group in groups:
            groups.remove(group)
    unregister(name)


@contextmanager
def unbound_default_group() -> Iterator[None]:
    """Inside, new process groups are formed from scratch.

    Where the trainer's own group is bound to a GPU, torch would split a new group's communicator off that one; the servers
    are not in it, and both sides would wait for each other.
    """
    from torch import distributed

    default = distributed.group.WORLD if distributed.is_initialized() else None
    bound = None if default is None else default.bound_device_id
    try:
        if default is not None:
            default.bound_device_id = None
        yield
    finally:
        if default is not None:
            default.bound_device_id = bound


@contextmanager
def no_end_with_engines() -> Iterator[None]:
    """Inside, NCCL's process groups are formed whose errors end nothing but what asks for their results.

    By default PyTorch's watchdog ends a process with the first connection that breaks, the trainer's with that to a lost engine.
    """
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        del os.environ[ERROR_HANDLING]
        if before is not None:
            os.environ[ERROR_HANDLING] = before


class _Background(Generic[T]):
    """A blocking call in a thread of its own, which is left behind if nobody waits for it any more."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._error: BaseException | None = None
        self._results: list[T] = []
        self._function = function
        self._thread = threading.Thread(target=self._run, name="weight-transfer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:  # handed to whoever asks for the result
            self._error = error

    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]


def describe(specs: Sequence[WeightSpec]) -> dict[str, Any]:
    """What SGLang must know to take a flat bucket apart."""
    return {
        "names": [spec.name for spec in specs],
        "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in specs],
        "shapes": [list(spec.shape) for spec in specs],
    }


def flatten(bucket: Bucket) -> Tensor:
    """(bytes,) uint8: the tensors' memory end to end."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
