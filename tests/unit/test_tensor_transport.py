"""TensorTransport from the trainer's side: what it shares, when it frees it, and how it gives up."""

from __future__ import annotations

import base64
import gc
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rl_lightning.weights.channel import SyncChannel, connect_store
from rl_lightning.weights.fingerprint import find_mismatch, pick
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.tensor import Handle, TensorTransport, share_bucket
from rl_lightning.weights.transport import WeightTarget, WeightUpdate

WEIGHTS = [("a", torch.arange(3, dtype=torch.bfloat16)), ("b", torch.arange(6.0).view(2, 3)), ("c", torch.ones(1))]


@pytest.fixture
def transport() -> Iterator[TensorTransport]:
    transport = TensorTransport("127.0.0.1", bucket_bytes=32)
    yield transport
    transport.close()


def channel_of(update: WeightUpdate) -> SyncChannel:
    return SyncChannel(connect_store("127.0.0.1", update.payload["port"]), update.payload["sync"])


def opened(handle: str) -> list[tuple[str, torch.Tensor]]:
    return pickle.loads(base64.b64decode(handle))


def test_a_shared_bucket_is_the_same_tensors_whatever_their_alignment() -> None:
    shared = share_bucket(WEIGHTS)
    for (name, tensor), (own_name, own) in zip(opened(Handle(shared).text), WEIGHTS, strict=True):
        assert name == own_name and tensor.dtype == own.dtype and torch.equal(tensor, own)


def test_engines_copy_bucket_after_bucket_and_learn_the_fingerprint(transport: TensorTransport) -> None:
    targets = [WeightTarget("x", ranks=2), WeightTarget("y")]
    updates = transport.stage(1, NamedWeights(WEIGHTS), targets)
    held: list[dict[str, torch.Tensor]] = [{}, {}]

    def copy(engine: int) -> None:
        channel = channel_of(updates[engine])
        for i in range(updates[engine].payload["n_buckets"]):
            while (given := channel.poll_bucket(i, engine)) is None:
                time.sleep(0.001)
            assert len(given) == targets[engine].ranks
            for handle in given:
                held[engine].update({name: tensor.clone() for name, tensor in opened(handle)})
            channel.report_taken(i, engine)

    engines = [threading.Thread(target=copy, args=(engine,)) for engine in range(2)]
    for engine in engines:
        engine.start()
    transport.send(30.0)
    for engine in engines:
        engine.join(30)
    sent = channel_of(updates[0]).poll_fingerprint()
    assert updates[0].payload["n_buckets"] == 2 and sent is not None
    for weights in held:
        samples = {name: pick(tensor) for name, tensor in weights.items()}
        assert find_mismatch(sent, samples.get) is None and samples.keys() == {"a", "b", "c"}
    transport.release()
    assert channel_of(updates[0]).poll_fingerprint() is None and channel_of(updates[0]).poll_bucket(0, 0) is None


def test_an_engine_that_takes_nothing_is_given_up(transport: TensorTransport) -> None:
    [update] = transport.stage(1, NamedWeights(WEIGHTS), [WeightTarget("x")])
    with pytest.raises(TimeoutError, match="engines to copy bucket 0"):
        transport.send(0.2)
    assert "gave up" in str(channel_of(update).failure())


def test_memory_of_a_transfer_that_was_given_up_is_freed(transport: TensorTransport) -> None:
    def in_use() -> set[str]:
        return {file.name for file in Path("/dev/shm").glob(f"torch_{os.getpid()}_*")}

    before = in_use()
    updates = transport.stage(1, NamedWeights(WEIGHTS), [WeightTarget("x"), WeightTarget("y", ranks=2)])
    taken = threading.Event()

    def take() -> None:
        channel = channel_of(updates[0])
        while (given := channel.poll_bucket(0, 0)) is None:
            time.sleep(0.001)
        opened(given[0])
        channel.report_taken(0, 0)
        taken.set()

    engine = threading.Thread(target=take)
    engine.start()
    with pytest.raises(TimeoutError, match="not now"):
        transport.send(60.0, lambda: "not now" if taken.is_set() else None)
    engine.join()
    transport.release()
    gc.collect()
    assert in_use() <= before


def test_an_engine_that_refuses_ends_the_wait_at_once(transport: TensorTransport) -> None:
    transport.stage(1, NamedWeights(WEIGHTS), [WeightTarget("x")])
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="no room"):
        transport.send(60.0, lambda: "no room")
    assert time.monotonic() - started < 10
