"""The parts of RayStrategy that need no cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from ray.exceptions import ActorDiedError, ActorUnavailableError

from rl_lightning.failure import may_be_mended_by_restart
from rl_lightning.strategies import RayStrategy, cluster
from rl_lightning.strategies.channel import RunChannel
from rl_lightning.strategies.demand import Demand, shortage
from rl_lightning.strategies.events import EventHandler, EventSender
from rl_lightning.strategies.failures import RayWorkerError, WorkerFailure, root_cause, worker_error
from rl_lightning.strategies.job import worker_environment
from rl_lightning.strategies.launcher import RayLauncher
from rl_lightning.strategies.place import Place, in_order, number
from rl_lightning.strategies.progress import ProgressForwarder, ProgressUpdate, ProgressView, replace_bars
from rl_lightning.strategies.worker import TrainWorker

# -- channel


def test_channel_hands_on_events_and_lets_ranks_agree() -> None:
    async def scenario() -> None:
        channel = RunChannel(world_size=2)
        assert await channel.drain(0.01) == []
        waiting = asyncio.create_task(channel.drain(10))
        await asyncio.sleep(0)
        await channel.report([b"a"])
        assert await waiting == [b"a"]
        await channel.report([b"b"])
        await channel.report([b"c"])
        assert await channel.drain(10) == [b"b", b"c"]

        assert not await channel.stop_wanted(0.01)
        assert await channel.agree(0, place=3, timeout_s=0.01) is None
        wanted = asyncio.create_task(channel.stop_wanted(10))
        await channel.request_stop()
        assert await wanted
        first = asyncio.create_task(channel.agree(0, place=3, timeout_s=10))
        await asyncio.sleep(0)
        assert await channel.agree(1, place=4, timeout_s=10) == 4
        assert await first == 4

    asyncio.run(scenario())


class Box(list[Any]):
    """Stands for an EventSender."""

    put = list.append


@pytest.mark.parametrize(("error", "arrived"), [(ActorUnavailableError("cut off", None), ["b"]), (ActorDiedError(), [])])
def test_events_go_on_after_a_moment_without_network_and_are_not_kept_for_the_dead(
    error: Exception, arrived: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported, answers = list[str](), iter([error])

    def answer(events: list[bytes], timeout: float) -> None:
        if (failure := next(answers, None)) is not None:
            failed.set()
            raise failure
        reported.extend(map(pickle.loads, events))

    failed = threading.Event()
    monkeypatch.setattr("ray.get", answer)
    sender = EventSender(SimpleNamespace(report=SimpleNamespace(remote=lambda events: events)), interval_s=0.0)
    sender.put("a")
    assert failed.wait(60)
    if not arrived:
        sender._thread.join(60)
    sender.put("b")
    sender.close()
    assert reported == arrived and sender._queue.qsize() == (not arrived)


def test_log_records_travel_as_text_and_name_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    box, log = Box(), logging.getLogger("rl_lightning.forwarded")
    handler = EventHandler(box, rank=1)  # type: ignore[arg-type]
    monkeypatch.setattr(log, "handlers", [handler])
    log.warning("%s at %d", object, 3)
    handler.handle(logging.makeLogRecord({"name": "ray.something", "msg": "not this"}))
    handler.handle(logging.makeLogRecord({"name": "py.warnings", "msg": "nor this, rank 0 has it"}))
    (record,) = pickle.loads(pickle.dumps(list(box)))
    assert record.getMessage() == "[rank 1] <class 'object'> at 3"
    assert (record.name, record.levelno) == ("rl_lightning.forwarded", logging.WARNING)


# -- failures


class Unpicklable(RuntimeError):
    """Needs two arguments, and pickles with one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def failure(rank: int, cause: BaseException, at: float = 0.0, died: bool = False) -> WorkerFailure:
    return WorkerFailure(rank, f"pid {rank}", cause, "" if died else "Traceback ...", died, at)


def test_root_cause_is_the_death_then_the_exception_then_the_broken_connection() -> None:
    broken = failure(0, RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:123"), at=1.0)
    raised = failure(1, ValueError("the reason"), at=2.0)
    dead = failure(2, RuntimeError("The actor died"), at=3.0, died=True)
    assert root_cause([broken, raised, dead]) is dead
    assert root_cause([broken, raised]) is raised
    assert root_cause([broken]) is broken
    assert root_cause([failure(1, ValueError("late"), at=2.0), failure(0, ValueError("early"), at=1.0)]).rank == 0
    error = worker_error([broken, raised])
    assert isinstance(error, RayWorkerError) and (error.rank, error.cause) == (1, raised.cause)
    assert "rank 1 (pid 1) raised ValueError: the reason" in str(error)
    assert "rank 0 (RuntimeError)" in str(error)
    assert pickle.loads(pickle.dumps(error)).rank == 1


def test_a_failure_always_pickles() -> None:
    try:
        raise Unpicklable("one", "two")
    except Unpicklable as error:
        told = pickle.loads(pickle.dumps(WorkerFailure.of(error, 3, "pid 1")))
    assert str(told.cause) == "Unpicklable: one"
    assert 'raise Unpicklable("one", "two")' in told.traceback


# -- group


def test_ranks_start_on_the_drivers_node_and_count_on_each() -> None:
    places = [Place(node, f"10.0.0.{ord(node)}", pid) for pid, node in enumerate("bacba")]
    order = in_order(places, first_node="a")
    assert [places[i].node_id for i in order] == list("aabbc")
    assert [(rank.index, rank.node, rank.local) for rank in number([places[i] for i in order], 7)] == [
        (0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 2, 0),
    ]  # fmt: skip


def test_workers_find_the_drivers_modules_but_no_second_standard_library() -> None:
    folders = worker_environment()["PYTHONPATH"].split(os.pathsep)
    assert str(Path(__file__).parent) in folders
    assert os.path.dirname(os.__file__) not in folders
    assert not any(folder.endswith("site-packages") for folder in folders)


# -- cluster


def test_wrong_addresses_are_found_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    sentence = f"no Ray cluster answers at 127.0.0.1:{port} .*ray start --head --port={port}"
    with pytest.raises(ConnectionError, match=sentence) as raised:
        cluster._probe(f"127.0.0.1:{port}")
    assert not may_be_mended_by_restart(raised.value)
    for address in ("ray://somewhere:10001", "somewhere", "host:port"):
        with pytest.raises(ValueError, match="local, auto or host:port"):
            cluster._probe(address)


def test_a_cluster_that_went_away_is_not_joined(tmp_path: Path) -> None:
    assert cluster._running_address(str(tmp_path)) is None
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:1\n")
    assert cluster._running_address(str(tmp_path)) is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray_current_cluster").write_text(address)
        assert cluster._running_address(str(tmp_path)) == address


# -- demand


def ranks(count: int, **each: float) -> Demand:
    return Demand("trainer rank", count, each, "num_workers")


def test_what_is_missing_is_told_in_one_sentence() -> None:
    demands = [Demand("engine", 4, {"CPU": 1, "GPU": 1}, "num_engines"), ranks(4, CPU=1, GPU=1)]
    assert shortage(demands, [{"CPU": 32.0, "GPU": 4.0}]) == (
        "the run needs 8 GPUs (4 for 4 engines, 4 for 4 trainer ranks): the cluster has 4 GPUs on 1 node"
    )
    assert shortage(demands, [{"CPU": 32.0, "GPU": 4.0}] * 2) is None


def test_a_part_that_fits_on_no_single_node_is_missing_too() -> None:
    problem = shortage([ranks(2, CPU=6)], [{"CPU": 4.0}, {"CPU": 10.0}])
    assert problem is not None and "not 6 CPUs together on one node for each trainer rank" in problem
    shared = [ranks(3, GPU=0.6), Demand("engine", 3, {"GPU": 0.4}, "")]
    assert shortage(shared, [{"GPU": 3.0}]) is None, "sums of fractions are not exact"
    assert shortage([ranks(2, CPU=4), Demand("engine", 1, {"CPU": 6}, "")], [{"CPU": 4.0}, {"CPU": 10.0}]) is None


# -- strategy


def test_strategy_by_name_takes_its_size_from_the_trainer() -> None:
    trainer = Trainer(strategy="ray", accelerator="cpu", devices=3, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, RayStrategy)
    assert trainer.world_size == trainer.strategy.num_processes == 3
    assert trainer.is_global_zero
    explicit = Trainer(strategy=RayStrategy(num_workers=5), accelerator="cpu", logger=False, enable_checkpointing=False)
    assert explicit.world_size == 5
    assert explicit.strategy.gpus_per_worker == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": -1}, {"num_cpus_per_worker": 0}])
def test_sizes_must_be_positive(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be above 0"):
        RayStrategy(**options)


# -- progress


def test_a_rank_that_ends_copies_no_optimiser_state() -> None:
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))  # has no data: copying it to the CPU raises
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {"momentum_buffer": torch.empty(2, device="meta")}
    strategy = Trainer(accelerator="cpu", strategy=RayStrategy(), logger=False, enable_checkpointing=False).strategy
    strategy.optimizers = [optimizer]
    strategy.teardown()
    assert strategy.optimizers == []


def test_rank_0_reports_what_the_removed_bar_would_show() -> None:
    class Bar(TQDMProgressBar):
        def get_metrics(self, *_: Any) -> dict[str, Any]:
            return {"reward": 0.25, "staleness": 2}

    box = Box()
    trainer: Any = SimpleNamespace(
        callbacks=[Bar(), TQDMProgressBar()], is_global_zero=True, max_epochs=5, current_epoch=1, num_training_batches=4
    )
    trainer.sanity_checking = False
    replace_bars(trainer, box)  # type: ignore[arg-type]
    (forwarder,) = trainer.callbacks
    assert isinstance(forwarder, ProgressForwarder)
    for index in range(4):  # faster than anyone can look: only the first and the last are sent
        forwarder.on_train_batch_end(trainer, None, None, None, index)  # type: ignore[arg-type]
    assert box == [
        ProgressUpdate("Epoch 2/5", 1, 4, {"reward": "0.25", "staleness": "2"}),
        ProgressUpdate("Epoch 2/5", 4, 4, {"reward": "0.25", "staleness": "2"}),
    ]
    other: Any = SimpleNamespace(callbacks=[Bar()], is_global_zero=False)
    replace_bars(other, box)  # type: ignore[arg-type]
    assert other.callbacks == []


def test_the_driver_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    view = ProgressView()
    view.show(ProgressUpdate("Epoch 1/2", 1, 2, {"reward": "0.5"}))
    with view.hidden():
        pass
    view.show(ProgressUpdate("Epoch 1/2", 2, 2, {"reward": "0.75"}))
    view.show(ProgressUpdate("Epoch 2/2", 1, None))
    view.close()
    drawn = capsys.readouterr().err
    assert "Epoch 1/2: 100%" in drawn and "2/2" in drawn and "reward=0.75" in drawn
    assert "Epoch 2/2" in drawn


class WithBadData:
    """A companion whose check finds something; nothing else of it is asked for."""

    def check_on_driver(self, trainer: Trainer) -> None:
        raise ValueError("data.jsonl line 3")

    demand = start_on_driver = end_on_driver = join = check_on_driver


def test_data_is_checked_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda *_: pytest.fail("the cluster was joined"))
    trainer = Trainer(accelerator="cpu", strategy=RayStrategy(num_workers=1), logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="line 3"):
        RayLauncher(trainer.strategy).launch(print, WithBadData(), trainer=trainer)


class WorkerHere(TrainWorker):
    """Without Ray."""

    def place(self) -> Place:
        return Place("node", "127.0.0.1", os.getpid())


def test_ranks_meet_at_an_address_that_is_not_open_to_more() -> None:
    worker = WorkerHere()
    port = worker.open_store(2, 5.0)
    for host, refused in (("127.0.0.1", False), ("127.0.0.2", True)):
        expected: Any = pytest.raises(ConnectionRefusedError) if refused else nullcontext()
        with expected:
            socket.create_connection((host, port), timeout=5).close()
