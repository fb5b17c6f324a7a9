"""TrainWorker: one rank of the training, as a Ray actor."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.call import _call_and_handle_interrupt

from rl_lightning.strategies.channel import CALL_TIMEOUT_S
from rl_lightning.strategies.companion import find_companion
from rl_lightning.strategies.environment import Rank, become_rank
from rl_lightning.strategies.events import EventSender, forward_logging
from rl_lightning.strategies.failures import WorkerFailure
from rl_lightning.strategies.job import Job
from rl_lightning.strategies.place import Place
from rl_lightning.strategies.result import RunResult, collect
from rl_lightning.strategies.stop_gate import AGREEMENT_TIMEOUT_S, StopGate
from rl_lightning.weights.channel import serve_store
from rl_lightning.weights.interface import name_interface

if TYPE_CHECKING:
    from rl_lightning.strategies.ranks import RayRanks

STOP_POLL_S = 60.0
UNAVAILABLE_S = 1.0


class TrainWorker:
    """A plain, synchronous actor: its methods run one after the other, on the main thread of their process."""

    def __init__(self) -> None:
        self._store: torch.distributed.TCPStore | None = None

    def place(self) -> Place:
        """Where this worker is; also shows that it came up."""
        import ray

        context = ray.get_runtime_context()
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())

    def open_store(self, world_size: int, timeout_s: float) -> int:
        """Rank 0 only: opens the store of the process group and gives its port, chosen by the kernel and held from then on."""
        self._store = serve_store(self.place().address, timeout_s, world_size)
        return self._store.port

    def run(self, job: Job, rank: Rank, channel: Any) -> RunResult | WorkerFailure:
        """Runs the trainer's function; what it raises comes back as a value, whether it pickles or not."""
        job.prepare_process()
        name_interface(self.place().address)
        _announce_rank(rank)
        sender = EventSender(channel)
        forward_logging(sender, rank.index, job.log_levels)
        try:
            return self._train(job, rank, sender, channel)
        except BaseException as error:  # an actor that raises SystemExit would take it for the wish to exit
            return WorkerFailure.of(error, rank.index, str(self.place()))
        finally:
            sender.close()

    def _train(self, job: Job, rank: Rank, sender: EventSender, channel: Any) -> RunResult:
        from ray import cloudpickle

        trainer, function, args, kwargs = cloudpickle.loads(job.blob)
        companion = find_companion((*args, *kwargs.values()))
        if companion is not None:
            companion.join(job.shared)
        gate = StopGate(agreement(channel, rank.index))
        gate.install(trainer)
        strategy: RayRanks = trainer.strategy
        strategy.enter_worker(rank, self._store, sender, gate)
        threading.Thread(target=_await_stop, args=(channel, gate), name="stop", daemon=True).start()
        try:
            results = _call_and_handle_interrupt(trainer, function, *args, **kwargs)
        except SystemExit:
            if not gate.raised:
                raise
            results = None
        return collect(trainer, results, job.weights, stopped=gate.raised)


def agreement(channel: Any, rank: int) -> Callable[[int], int | None]:
    """How this rank's StopGate agrees with the others'."""

    def agree(place: int) -> int | None:
        import ray

        answer = channel.agree.remote(rank, place, AGREEMENT_TIMEOUT_S)
        return ray.get(answer, timeout=AGREEMENT_TIMEOUT_S + CALL_TIMEOUT_S)

    return agree


def _announce_rank(rank: Rank) -> None:
    """Before anything is unpickled: code may ask for its rank at import."""
    os.environ.update(RANK=str(rank.index), LOCAL_RANK=str(rank.local), NODE_RANK=str(rank.node), WORLD_SIZE=str(rank.world_size))
    become_rank(rank.index)


def _await_stop(channel: Any, gate: StopGate) -> None:
    import ray

    wanted = False
    try:
        while not wanted:
            try:
                wanted = ray.get(channel.stop_wanted.remote(STOP_POLL_S), timeout=STOP_POLL_S + CALL_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:  # a busy machine
                continue
            except ray.exceptions.ActorUnavailableError:  # a network that is cut for a moment
                time.sleep(UNAVAILABLE_S)
        gate.request()
    except ray.exceptions.RayError:  # the run is over, or the driver is gone and ends this process
        return
