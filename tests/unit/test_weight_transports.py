"""Disk and broadcast transports, from the trainer's side."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rl_lightning.weights import disk
from rl_lightning.weights.buckets import buckets_of, fill_buckets, plan_buckets
from rl_lightning.weights.channel import SyncChannel, SyncFailed, connect_store, serve_store
from rl_lightning.weights.disk import DiskTransport
from rl_lightning.weights.distributed import (
    ERROR_HANDLING,
    DistributedTransport,
    describe,
    flatten,
    no_end_with_engines,
    unbound_default_group,
)
from rl_lightning.weights.fingerprint import find_mismatch, pick, sampled_positions, take_fingerprint
from rl_lightning.weights.object_store import ObjectStoreTransport
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.transport import WeightTarget

WEIGHTS = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(4, dtype=torch.bfloat16)), ("c", torch.zeros(1))]
X, Y = WeightTarget("x"), WeightTarget("y")


class Gathered(NamedWeights):
    """Notes which tensors were asked for."""

    given: list[str]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.given = []
        for name, tensor in super().__iter__():
            self.given.append(name)
            yield name, tensor


def test_a_staged_folder_holds_the_weights_and_only_the_newest_stays(tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path / "weights", shard_bytes=24)
    for version in (1, 2):
        updates = transport.stage(version, NamedWeights(WEIGHTS), [X, Y])
        transport.release()
    folder = Path(updates[0].payload["path"])
    held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert [u.version for u in updates] == [2, 2] and len(list(folder.glob("*.safetensors"))) == 2
    assert all(torch.equal(held[name], tensor) for name, tensor in WEIGHTS) and len(held) == 3
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["version2"]
    transport.close()
    assert not (tmp_path / "weights").exists()


def test_a_version_is_written_once(tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path)
    [first] = transport.stage(1, NamedWeights(WEIGHTS), [X])
    [again] = transport.stage(1, NamedWeights([]), [X])
    assert (again.payload, again.fingerprint) == (first.payload, first.fingerprint)


def test_a_run_leaves_the_weights_of_others_alone_and_removes_those_of_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may be in another container or on another node: their process ids say nothing here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(disk, "SHARED_MEMORY", tmp_path / "none")
    dead, theirs = tmp_path / f"{disk.PREFIX}4194999-dead", tmp_path / f"{disk.PREFIX}4194998-live"
    for folder in (dead, theirs):
        folder.mkdir()
    lock = os.open(theirs, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    ours, later = DiskTransport(), DiskTransport()
    for transport in (ours, later):
        transport.stage(1, NamedWeights(WEIGHTS), [X])
    assert theirs.exists() and not dead.exists() and len(list(tmp_path.iterdir())) == 3
    for transport in (ours, later):
        transport.close()
    os.close(lock)
    assert list(tmp_path.iterdir()) == [theirs]


def test_buckets_flatten_to_bytes_that_their_description_takes_apart() -> None:
    buckets = list(buckets_of(WEIGHTS, 32))
    assert [[name for name, _ in bucket] for bucket in buckets] == [["a", "b"], ["c"]]
    flat = flatten(buckets[0])
    assert torch.equal(flat[:24].view(torch.float32).view(2, 3), WEIGHTS[0][1])
    description = describe(NamedWeights(buckets[0]).specs())
    assert description == {"names": ["a", "b"], "dtypes": ["float32", "bfloat16"], "shapes": [[2, 3], [4]]}


def test_the_plan_is_what_is_filled_one_bucket_at_a_time() -> None:
    weights = Gathered(WEIGHTS)
    plan = plan_buckets(weights.specs(), 32)
    assert [[spec.name for spec in bucket] for bucket in plan] == [["a", "b"], ["c"]]
    filled = fill_buckets(plan, weights)
    assert [name for name, _ in next(filled)] == weights.given == ["a", "b"]
    assert [name for name, _ in next(filled)] == ["c"] and next(filled, None) is None


def test_weights_travel_in_the_engines_dtype_where_that_is_smaller(tmp_path: Path) -> None:
    transport = DiskTransport(tmp_path)
    for version, dtypes, expected in ((1, ["bfloat16"] * 2, torch.bfloat16), (2, ["bfloat16", "float32"], torch.float32)):
        [update, _] = transport.stage(version, NamedWeights(WEIGHTS), [WeightTarget("x", dtype) for dtype in dtypes])
        held = load_file(next(Path(update.payload["path"]).glob("*.safetensors")))
        assert {name: tensor.dtype for name, tensor in held.items()} == {"a": expected, "b": torch.bfloat16, "c": expected}
        samples = {name: pick(tensor) for name, tensor in held.items()}
        assert update.fingerprint is not None and find_mismatch(update.fingerprint, samples.get) is None


@given(st.integers(1, 3000))
def test_samples_are_in_order_and_reach_from_the_first_value_to_the_last(count: int) -> None:
    places = sampled_positions(count)
    assert places == sorted(set(places)) and places[0] == 0 and places[-1] == count - 1
    assert all(b - a <= -(-count // 400) for a, b in zip(places, places[1:], strict=False))


def test_a_mismatch_is_named() -> None:
    sent = take_fingerprint(NamedWeights(WEIGHTS))
    held = {name: pick(tensor) for name, tensor in WEIGHTS}
    assert find_mismatch(sent, held.get) is None
    assert "no parameter c" in str(find_mismatch(sent, {**held, "c": None}.get))
    assert "a differs in 1 of 6" in str(find_mismatch(sent, {**held, "a": torch.tensor([0.0, 1, 2, 3, 4, 6])}.get))
    assert "b differs in 4 of 4" in str(find_mismatch(sent, {**held, "b": torch.full((4,), float("nan"))}.get))
    assert "c has another size" in str(find_mismatch(sent, {**held, "c": torch.zeros(2)}.get))


def test_engines_of_several_gpus_take_as_many_ranks(transport: DistributedTransport) -> None:
    targets = [WeightTarget("x", ranks=2), WeightTarget("y"), WeightTarget("z", ranks=4)]
    updates = transport.stage(1, NamedWeights(WEIGHTS), targets)
    assert [update.payload["rank"] for update in updates] == [1, 3, 4]
    assert [update.payload["engine"] for update in updates] == [0, 1, 2] and updates[0].payload["world_size"] == 8


def test_the_weights_are_gathered_to_the_end_though_nobody_takes_them(transport: DistributedTransport) -> None:
    """Other trainer ranks gather along: one that stopped would leave them waiting."""
    weights = Gathered(WEIGHTS)
    transport.stage(1, weights, [X])
    with pytest.raises(TimeoutError):
        transport.send(0.1)
    assert weights.given == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["disk", "object_store"])
def test_they_are_gathered_to_the_end_though_there_is_no_room_for_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Gathered(WEIGHTS)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("rl_lightning.weights.object_store._put", full)
    transport = DiskTransport(tmp_path, shard_bytes=24) if kind == "disk" else ObjectStoreTransport(bucket_bytes=24)
    with pytest.raises(OSError, match="no space left"):
        transport.stage(1, weights, [X])
    assert weights.given == ["a", "b", "c"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_store_is_served_at_one_address_of_either_kind(host: str) -> None:
    try:
        socket.create_server((host, 0), family=socket.getaddrinfo(host, 0)[0][0]).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    store = serve_store(host)
    connect_store(host, store.port).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)


def test_nothing_is_left_in_the_store_of_what_was_said_in_a_transfer() -> None:
    store, engines, deadline = serve_store("127.0.0.1"), range(3), time.monotonic() + 60
    before = store.num_keys()
    trainer, engine = SyncChannel(store, "sync0"), SyncChannel(connect_store("127.0.0.1", store.port), "sync0")
    for i in engines:
        engine.report_group(i, "")
    trainer.groups(engines, deadline)
    trainer.go("group")
    for i in engines:
        trainer.give_bucket(0, i, ["handle"])
        engine.report_taken(0, i)
    trainer.tell_fingerprint({})
    trainer.watch(lambda: trainer.is_taken(0, engines), deadline, "the engines")
    trainer.watch(lambda: engine.poll_fingerprint() == {} and engine.poll_go() == "group", deadline, "the trainer")
    trainer.clear()
    assert store.num_keys() == before


@pytest.fixture
def transport() -> Iterator[DistributedTransport]:
    transport = DistributedTransport(backend="gloo", host="127.0.0.1")
    yield transport
    transport.close()


def test_an_engine_that_never_comes_is_named_within_the_deadline(transport: DistributedTransport) -> None:
    transport.stage(1, NamedWeights(WEIGHTS), [X])
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="every engine to be ready"):
        transport.send(0.2)
    assert time.monotonic() - started < 5


def test_an_engine_that_gives_up_ends_the_wait_at_once(transport: DistributedTransport) -> None:
    [update, _] = transport.stage(1, NamedWeights(WEIGHTS), [X, Y])
    channel = SyncChannel(connect_store("127.0.0.1", update.payload["port"]), update.payload["sync"])
    threading.Timer(0.1, channel.fail, ["no memory left"]).start()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="no memory left"):
        transport.send(60)
    assert time.monotonic() - started < 5
    assert "no memory left" in (channel.failure() or "")


def test_an_engine_whose_partner_never_joins_is_told(transport: DistributedTransport) -> None:
    [update] = transport.stage(1, NamedWeights(WEIGHTS), [X])
    channel = SyncChannel(connect_store("127.0.0.1", update.payload["port"]), update.payload["sync"])
    channel.report_group(0, "")
    with pytest.raises(TimeoutError):
        transport.send(1.0)
    with pytest.raises(SyncFailed, match="gave up"):
        channel.poll_go()


def test_an_engine_learns_that_the_trainer_died() -> None:
    store = serve_store("127.0.0.1")
    channel = SyncChannel(connect_store("127.0.0.1", store.port), "s")
    del store
    calls: list[Callable[[], object]] = [
        channel.poll_go,
        channel.poll_fingerprint,
        lambda: channel.report_group(0, ""),
        lambda: channel.report_taken(0, 0),
    ]
    for call in calls:
        with pytest.raises(SyncFailed, match="the trainer died"):
            call()
    channel.fail("nobody hears it")


def test_engines_that_are_left_form_a_group_without_the_one_that_went() -> None:
    """A broadcast in the old group would wait for it."""

    class Forming(DistributedTransport):
        def _form_group(self, name: str, deadline: float) -> Any:
            return SimpleNamespace(size=lambda world=self._world: world)

    transport, group, worlds = Forming(backend="gloo", host="127.0.0.1"), "", []
    for version, targets in enumerate([[X, Y], [X, Y], [X], [X]]):
        updates = transport.stage(version, NamedWeights(WEIGHTS), targets)
        channel = SyncChannel(connect_store("127.0.0.1", updates[0].payload["port"]), updates[0].payload["sync"])
        for engine in range(len(targets)):
            channel.report_group(engine, group)
        assert transport._channel is not None
        transport._agree_on_group(transport._channel, time.monotonic() + 60)
        told, group = group, str(channel.poll_go())
        worlds.append((told == group, transport._group.size()))  # type: ignore[union-attr]
    transport._group = None
    transport.close()
    assert worlds == [(False, 3), (True, 3), (False, 2), (True, 2)]


class Stuck:
    """A process group whose broadcast does not even begin, as NCCL's first one while an engine has not come."""

    def __init__(self) -> None:
        self.released, self.allowed_s = threading.Event(), 0.0

    def size(self) -> int:
        return 2

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> None:
        self.released.wait(60)

    def _get_backend(self, device: torch.device) -> Any:
        return self

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.allowed_s = timeout.total_seconds()


@pytest.mark.parametrize(("timeout_s", "reason"), [(1.0, "a broadcast of"), (60.0, "no memory left")])
def test_a_broadcast_that_does_not_begin_is_given_up(timeout_s: float, reason: str) -> None:
    class Forming(DistributedTransport):
        def _form_group(self, name: str, deadline: float) -> Any:
            return group

    transport, group = Forming(backend="gloo", host="127.0.0.1"), Stuck()
    [update] = transport.stage(1, NamedWeights(WEIGHTS), [X])
    channel = SyncChannel(connect_store("127.0.0.1", update.payload["port"]), update.payload["sync"])
    channel.report_group(0, "")
    if timeout_s > 10:
        threading.Timer(0.5, channel.fail, ["no memory left"]).start()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=reason):
        transport.send(timeout_s)
    assert time.monotonic() - started < 20 and group.allowed_s > timeout_s
    group.released.set()
    transport.close()


def test_a_group_that_is_left_is_gone() -> None:
    """Its threads and connections would stay otherwise, those of every engine that was ever lost."""
    transport = DistributedTransport(backend="gloo", host="127.0.0.1")
    transport.stage(1, NamedWeights(WEIGHTS), [])
    transport._group_name = "rl-lightning-test"
    transport._group = transport._form_group(transport._group_name, time.monotonic() + 60)
    group = weakref.ref(transport._group)
    transport.close()
    deadline = time.monotonic() + 60
    while group() is not None and time.monotonic() < deadline:
        gc.collect()
    assert group() is None


def test_a_group_that_was_formed_in_the_last_moment_has_time_for_later_broadcasts() -> None:
    transport = DistributedTransport(backend="gloo", host="127.0.0.1")
    [update] = transport.stage(1, NamedWeights(WEIGHTS), [X])
    joined: list[Any] = []

    def join() -> None:
        store = dist.PrefixStore("late", connect_store("127.0.0.1", update.payload["port"]))
        backend_store = dist.PrefixStore("cpu/", dist.PrefixStore("late/", store))
        joined.append(dist.ProcessGroupGloo(backend_store, 1, 2, timedelta(seconds=60)))

    engine = threading.Thread(target=join)
    engine.start()
    transport._group_name = "late"
    transport._group = transport._form_group("late", time.monotonic())  # one second
    engine.join()
    transport._set_timeout(time.monotonic() + 60)
    work = transport._begin_broadcast(torch.arange(3, dtype=torch.uint8)).result()
    time.sleep(2)  # longer than there was to form it
    received = torch.zeros(3, dtype=torch.uint8)
    joined[0].broadcast(received, 0).wait()
    work.wait()
    assert received.tolist() == [0, 1, 2]
    transport.close()


@pytest.mark.parametrize("chosen", [None, "1"])
def test_only_groups_with_engines_outlive_their_errors(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ERROR_HANDLING, raising=False)
    if chosen is not None:
        monkeypatch.setenv(ERROR_HANDLING, chosen)
    with pytest.raises(ZeroDivisionError), no_end_with_engines():
        assert os.environ[ERROR_HANDLING] == "0"
        _ = 1 / 0
    assert os.environ.get(ERROR_HANDLING) == chosen


def test_each_transfer_has_names_of_its_own(transport: DistributedTransport) -> None:
    [first], [second] = (transport.stage(version, NamedWeights(WEIGHTS), [X]) for version in (1, 2))
    assert first.payload["port"] == second.payload["port"] and first.payload["sync"] != second.payload["sync"]
    assert (first.payload["rank"], first.payload["world_size"]) == (1, 2)


def test_a_group_with_engines_is_not_split_off_the_trainers_own() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.group.WORLD.bound_device_id = torch.device("cpu", 0)
        with pytest.raises(ZeroDivisionError), unbound_default_group():
            assert dist.group.WORLD.bound_device_id is None
            _ = 1 / 0
        assert dist.group.WORLD.bound_device_id == torch.device("cpu", 0)
    finally:
        dist.destroy_process_group()
    with unbound_default_group():  # nothing to unbind
        assert not dist.is_initialized()
