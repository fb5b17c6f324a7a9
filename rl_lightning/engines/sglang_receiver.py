"""Receiver: brings a weight update into an SGLang server and proves that it arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from rl_lightning.engines.engine import EngineError, UpdateGivenUpError, WeightMismatchError
from rl_lightning.weights.channel import POLL_S, SyncChannel, SyncFailed, connect_store
from rl_lightning.weights.transport import Fingerprint, WeightTarget

if TYPE_CHECKING:
    import torch

    from rl_lightning.engines.sglang_client import SGLangClient, Shown
    from rl_lightning.weights.transport import WeightUpdate

T = TypeVar("T")

LOOK_S = 0.1
"""Between two looks whether all others still take part."""

Load = Callable[[], Awaitable[Fingerprint]]
"""Loads the weights; returns what the server must hold now."""


class Receiver:
    """One server's end of the weight transports.

    Args:
        client: of the server.
        dtype: what the server calls the type of its weights.
    """

    def __init__(self, client: SGLangClient, dtype: str) -> None:
        self._client = client
        self._dtype = dtype
        self._group = ""
        self.proof_s = 0.0

    @asynccontextmanager
    async def prepared(self, update: WeightUpdate) -> AsyncIterator[Load]:
        """Does all that generation need not stand still for; gives what loads the weights.

        Raises:
            UpdateGivenUpError: the trainer or another engine gave up or died before they agreed.
            EngineError: the transport is unknown, or the trainer cannot be reached.
        """
        if update.transport == "disk":
            yield lambda: self._read(update)
        elif update.transport == "distributed":
            async with self._listening(update.payload) as channel:
                await self._join(channel, update.payload)
                yield lambda: self._receive(channel, update.payload["buckets"])
        elif update.transport == "tensor":
            async with self._listening(update.payload) as channel:
                with _nothing_changed():
                    first = await _told(partial(channel.poll_bucket, 0, update.payload["engine"]))
                yield lambda: self._copy(channel, update.payload, first)
        else:
            raise EngineError(f"SGLang cannot receive weights by {update.transport!r}, only by distributed, tensor or disk")

    async def prove(self, version: int, sent: Fingerprint) -> None:
        """Compares the server's weights with the fingerprint of `version`.

        Raises:
            WeightMismatchError: they differ.
        """
        from rl_lightning.weights.fingerprint import find_mismatch

        started = time.monotonic()
        shown = await self._client.samples({name: sample.shape for name, sample in sent.items()})
        if (difference := find_mismatch(sent, as_held(shown, sent, self._dtype))) is not None:
            raise WeightMismatchError(
                f"SGLang at {self._client.url} does not hold the weights of version {version}: {difference}"
            )
        self.proof_s = time.monotonic() - started

    async def _read(self, update: WeightUpdate) -> Fingerprint:
        await self._client.load_from_disk(update.payload["path"])
        assert update.fingerprint is not None
        return update.fingerprint

    # -- from memory

    async def _copy(self, channel: SyncChannel, payload: Mapping[str, Any], first: list[str]) -> Fingerprint:
        engine, handles = payload["engine"], first
        session = await self._client.begin_update()
        for i in range(payload["n_buckets"]):
            if i:
                handles = await _told(partial(channel.poll_bucket, i, engine))
            await self._client.load_from_memory(handles)
            channel.report_taken(i, engine)
        if session:
            await self._client.end_update()
        return await _told(channel.poll_fingerprint)

    # -- by broadcast

    @asynccontextmanager
    async def _listening(self, payload: Mapping[str, Any]) -> AsyncIterator[SyncChannel]:
        """In touch with the trainer. Whatever fails in here is told to it, and it then waits no longer."""
        try:
            store = await asyncio.to_thread(connect_store, payload["host"], payload["port"])
        except TimeoutError as error:
            raise EngineError(str(error)) from None
        channel = SyncChannel(store, payload["sync"])
        try:
            yield channel
        except BaseException as error:
            channel.fail(f"engine {payload['engine']}: {error!r}")
            if isinstance(error, SyncFailed):
                raise EngineError(f"the transfer of weights was given up: {error}") from None
            raise

    async def _join(self, channel: SyncChannel, payload: Mapping[str, Any]) -> None:
        with _nothing_changed():
            channel.report_group(payload["engine"], self._group)
            group = await _told(channel.poll_go)
        if group == self._group:
            return
        await self._client.leave_group(self._group)
        self._group = ""
        joining = self._client.join_group(
            master_address=payload["host"],
            master_port=payload["port"],
            rank_offset=payload["rank"],
            world_size=payload["world_size"],
            group_name=group,
            backend=payload["backend"],
        )
        await _with_others(joining, channel)
        self._group = group

    async def _receive(self, channel: SyncChannel, buckets: list[Mapping[str, Any]]) -> Fingerprint:
        session = await self._client.begin_update()
        for bucket in buckets:
            await _with_others(self._client.receive(self._group, bucket), channel)
        if session:
            await self._client.end_update()
        return await _told(channel.poll_fingerprint)


async def _told(poll: Callable[[], T | None]) -> T:
    """What the trainer says, once it does; whoever waits has a deadline around."""
    while (said := poll()) is None:
        await asyncio.sleep(POLL_S)
    return said


async def _with_others(call: Coroutine[Any, Any, None], channel: SyncChannel) -> None:
    """Returns when `call` has, in which the server waits for all others; NCCL would let it wait though one has given up."""
    task = asyncio.create_task(call)
    try:
        while not (await asyncio.wait([task], timeout=LOOK_S))[0]:
            channel.expect_more()
        task.result()
    finally:
        task.cancel()


@contextmanager
def _nothing_changed() -> Iterator[None]:
    """Inside, until the trainer's first word, a transfer that fails leaves the server as it was."""
    try:
        yield
    except SyncFailed as error:
        raise UpdateGivenUpError(f"the transfer of weights was given up: {error}") from None


def target_of(info: Mapping[str, Any]) -> WeightTarget:
    """What `/server_info` says of how a server takes weights."""
    dtype = {"half": "float16", "float": "float32", "auto": None}.get(info["dtype"], info["dtype"])
    return WeightTarget(dtype=dtype, ranks=int(info.get("tp_size") or 1))


def as_held(shown: Shown, sent: Fingerprint, dtype: str) -> Callable[[str], torch.Tensor | None]:
    """The server's samples, which it shows as float32, in the type that it holds them in, NaN where it holds nothing.

    A server whose dtype is `auto` holds bfloat16 or float16: whichever all of the values fit into.  Of a server that does
    not show everything, only what it shows is looked at.
    """
    import torch

    def all_fit(candidate: torch.dtype) -> bool:
        values = torch.tensor([value for held in shown.values.values() for value in held.values()])
        return torch.equal(values, values.to(candidate).float())

    if dtype == "auto":
        held_as = next((d for d in (torch.bfloat16, torch.float16) if all_fit(d)), torch.float32)
    else:
        held_as = getattr(torch, {"half": "float16", "float": "float32"}.get(dtype, dtype))

    def held(name: str) -> torch.Tensor | None:
        if not (own := shown.values.get(name)):
            return None
        unseen = [float("nan")] * len(sent[name].values) if shown.whole else sent[name].values
        return torch.tensor([own.get(i, value) for i, value in enumerate(unseen)], dtype=torch.float32).to(held_as)

    return held
