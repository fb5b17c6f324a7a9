"""What clusters do to a run, done to a small one: a rank, the controller or the driver is killed with SIGKILL."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from benchmarks.fault_run import CONTROLLER, RANK, WORKER, FaultRun

pytestmark = pytest.mark.slow


def pids(run: FaultRun, name: str) -> set[int]:
    return {process.pid for process in run.actors(name)}


def test_a_killed_rank_restarts_the_trainer_and_leaves_the_engines(folder: Path) -> None:
    with FaultRun(folder, [4], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 5, "first steps")
        engines, controller, rank = pids(run, WORKER), pids(run, CONTROLLER), pids(run, RANK)
        run.kill(RANK)
        run.wait(lambda: run.restarts == 1, "second attempt")
        run.wait(lambda: pids(run, RANK) and "(global step 12)" in run.log, "steps of the second attempt")
        assert pids(run, WORKER) == engines and pids(run, CONTROLLER) == controller
        assert not pids(run, RANK) & rank
        run.finish(restarts=1)
        assert run.trained_on_all_once()


def test_a_killed_controller_goes_on_where_it_stood(folder: Path) -> None:
    with FaultRun(folder, [4], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 5, "first steps")
        engines, rank = pids(run, WORKER), pids(run, RANK)
        run.kill(CONTROLLER)
        run.wait(lambda: "the rollout controller had died; it goes on from version" in run.log, "return of the controller")
        went_on_at = run.steps + 3
        run.wait(lambda: run.steps >= went_on_at, "training with the new controller")
        assert pids(run, WORKER) == engines and pids(run, RANK) == rank
        run.finish()
        assert run.trained_on_all_once()


def test_a_killed_driver_leaves_no_process(folder: Path) -> None:
    with FaultRun(folder, [4], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 3, "first steps")
        actors = [process for name in (WORKER, CONTROLLER, RANK, "RunChannel") for process in run.actors(name)]
        family = [child for actor in actors for child in (actor, *actor.children(recursive=True))]
        assert len(actors) == 5 and len(family) > 5, "two engines with rewards, a rank, the controller and the channel"
        run.process.kill()
        assert psutil.wait_procs(family, timeout=60)[1] == []
