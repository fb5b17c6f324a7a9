"""The end of a weight update: who proved the new weights gets prompts, whatever the others do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rl_lightning.callbacks.weight_publisher import WeightPublisher
from rl_lightning.engines.engine import EngineError, WeightMismatchError
from rl_lightning.rollout.roster import WorkerRoster
from tests.samples import acknowledge

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Controller:
    """Notes what it is told; at the first word it lets the slow engine go on, and those that it is told of start again."""

    def __init__(self, signal: Path) -> None:
        self.signal, self.told, self.roster = signal, list[tuple[int, list[str]]](), WorkerRoster(60.0, "round_robin")

    def call(self, method: str, version: int, workers: list[str]) -> None:
        assert method == "publish"
        self.told.append((version, sorted(workers)))
        self.roster.mark_synced(workers, version)
        if not self.signal.exists():
            for name in workers:
                self.roster.register(name, "started again", None, 0.0)
        self.signal.touch()


def collect(folder: Path, engines: dict[str, tuple[bool, Exception | None]], timeout_s: float = 90.0) -> tuple[Any, Controller]:
    """What the publisher makes of engines that are (slow or not, what they raise)."""
    import ray

    signal = folder / "signal"
    answer = ray.remote(acknowledge).options(num_cpus=0)
    acks = {answer.remote(str(signal) if slow else None, error): name for name, (slow, error) in engines.items()}
    controller: Any = Controller(signal)
    return WeightPublisher()._collect(7, acks, timeout_s, controller), controller


def test_a_slow_engine_does_not_hold_the_others(tmp_path: Path) -> None:
    stopped_s, controller = collect(tmp_path, {"fast": (False, None), "slow": (True, None)})
    assert stopped_s == {"fast": 0.5, "slow": 0.5}
    assert controller.told == [(7, ["fast"]), (7, ["slow"])]


def test_an_engine_that_was_started_again_meanwhile_does_not_count_as_one_with_weights(tmp_path: Path) -> None:
    _, controller = collect(tmp_path, {"fast": (False, None), "slow": (True, None)})
    assert [entry.name for entry in controller.roster.unsynced(7)] == ["fast"]


def test_an_engine_that_failed_is_left_to_its_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stopped_s, controller = collect(tmp_path, {"good": (False, None), "bad": (False, EngineError("out of memory"))})
    assert stopped_s == {"good": 0.5} and controller.told[-1] == (7, ["good"])
    assert "bad did not take version 7: out of memory" in caplog.text


def test_an_engine_with_other_weights_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(WeightMismatchError, match="odd does not hold the weights of version 7: a.weight differs"):
        collect(tmp_path, {"odd": (False, WeightMismatchError("a.weight differs"))})
