"""StopGate: all ranks end at the same batch, whenever the request comes."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rl_lightning.strategies.stop_gate import StopGate, main_frame
from rl_lightning.strategies.stop_signals import StopSignals


class Agreement:
    """What RunChannel.agree does, for threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self.places: list[int] = []

    def __call__(self, place: int) -> int:
        self.places.append(place)
        self.barrier.wait(10)
        return max(self.places)


class Rank(threading.Thread):
    """Trains like Lightning's loop does, with collectives between batches, in batches and when it saves at the end."""

    def __init__(self, gate: StopGate, collective: threading.Barrier, fetch_s: float) -> None:
        super().__init__(daemon=True)
        self.gate, self.collective, self.fetch_s = gate, collective, fetch_s
        self.met: list[str] = []
        self.trainer: Any = SimpleNamespace(_signal_connector=SimpleNamespace(received_sigterm=False))

    def run(self) -> None:
        try:
            for index in range(10_000):
                self.meet(f"before batch {index}")
                time.sleep(self.fetch_s)
                self.gate.on_train_batch_start(self.trainer, None, None, index)  # type: ignore[arg-type]
                self.meet(f"in batch {index}")
                self.gate.on_train_batch_end(self.trainer, None, None, None, index)  # type: ignore[arg-type]
                if self.trainer._signal_connector.received_sigterm:
                    break
        except SIGTERMException:
            pass
        self.meet("save")

    def meet(self, what: str) -> None:
        self.met.append(what)
        self.collective.wait(10)


@settings(max_examples=40, deadline=None)
@given(
    fetch_s=st.lists(st.floats(0, 0.004), min_size=2, max_size=3),
    request_s=st.lists(st.floats(0, 0.03), min_size=3, max_size=3),
)
def test_ranks_stop_at_the_same_place(fetch_s: list[float], request_s: list[float]) -> None:
    agreement, collective = Agreement(len(fetch_s)), threading.Barrier(len(fetch_s))
    ranks = [Rank(StopGate(agreement), collective, seconds) for seconds in fetch_s]
    for rank in ranks:
        rank.start()
    time.sleep(0.005)
    requests = [threading.Timer(after, rank.gate.request) for after, rank in zip(request_s, ranks, strict=False)]
    for request in requests:
        request.start()
    for thread in [*ranks, *requests]:
        thread.join(10)
        assert not thread.is_alive()
    assert all(rank.met == ranks[0].met for rank in ranks)
    assert ranks[0].met[-1] == "save"
    assert all(rank.gate.raised for rank in ranks)


def test_before_the_first_batch_it_interrupts_whatever_runs() -> None:
    gate = StopGate(lambda place: place)
    trainer: Any = SimpleNamespace(_signal_connector=None)
    previous = signal.getsignal(signal.SIGUSR2)
    gate.install(trainer)
    threading.Timer(0.05, gate.request).start()
    try:
        with pytest.raises(SIGTERMException):
            threading.Event().wait(10)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert gate.raised


def test_without_an_agreement_nothing_is_interrupted() -> None:
    gate = StopGate(lambda place: None)
    gate.request()
    gate.on_train_batch_start(None, None, None, 0)  # type: ignore[arg-type]
    assert not gate.raised


def test_no_garbage_is_collected_while_python_holds_its_list_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    frames_of_all, collects = sys._current_frames, []

    def note() -> Any:
        collects.append(gc.isenabled())
        return frames_of_all()

    monkeypatch.setattr(sys, "_current_frames", note)
    assert main_frame() is not None
    assert collects == [False] and gc.isenabled()


def test_signals_are_noted_and_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        signals.install()
        signals.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.received, signals.count) == (signal.SIGTERM, 1)
        with pytest.raises(SIGTERMException) as caught:
            signals.check()
        assert caught.value.code == 143
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.count == 2
        with pytest.raises(KeyboardInterrupt):
            signals.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
