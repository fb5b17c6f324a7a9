"""What clusters do to a run, done to a small one: a node, a rank, the controller or the driver is killed with SIGKILL."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.fault_run import CONTROLLER, N_PROMPTS, RANK, WORKER, FaultRun

pytestmark = pytest.mark.slow
LONG_ANSWER = "benchmarks.fault_run.long_answer"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def pids(run: FaultRun, name: str) -> set[int]:
    return {process.pid for process in run.actors(name)}


def assert_every_prompt_was_trained_on_once(run: FaultRun) -> None:
    assert run.trained() == {index: 1 for index in range(N_PROMPTS)}


def test_a_lost_node_costs_time_and_no_prompt_and_its_replacement_works(folder: Path) -> None:
    with FaultRun(folder, [3, 1], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 3, "first steps")
        assert len(run.actors(WORKER, node=0)) == len(run.actors(WORKER, node=1)) == 1
        run.wait(lambda: run.statistic("rollout/groups_running") == 8, "full load on both engines")
        run.kill_node(1)
        run.wait(lambda: run.statistic("rollout/groups_requeued") > 0, "return of its leases")
        went_on_at = run.steps + 2
        run.wait(lambda: run.steps >= went_on_at and run.statistic("rollout/workers_alive") == 1, "training with the rest")
        run.add_node(1)
        run.wait(lambda: run.statistic("rollout/workers_alive") == 2, "replacement")
        run.finish()
        assert run.restarts == 0
        assert_every_prompt_was_trained_on_once(run)


def test_answers_that_lay_on_a_lost_node_are_generated_again(folder: Path) -> None:
    options = {
        "data__engine": json.dumps({"class_path": "rl_lightning.testing.FakeEngine", "init_args": {"answer": LONG_ANSWER}}),
        "data__rewards": '[{"reward": "rl_lightning.rewards.exact.exact_match"}]',
        "data__group_size": 16,
        "data__generation__max_new_tokens": 1000,
        "data__prompts__init_args__size": 40,
    }
    with FaultRun(folder, [3, 1], data__num_engines=2, **options) as run:
        run.wait(lambda: run.statistic("rollout/groups_buffered") >= 6, "answers that wait for the trainer")
        run.kill_node(1)
        run.finish()
        assert "were lost with their node: they are answered again first" in (folder / "output").read_text()
        assert run.restarts == 0 and run.trained() == {index: 1 for index in range(40)}


def test_an_engine_that_is_added_while_the_run_is_under_way_gets_work(folder: Path) -> None:
    with FaultRun(folder, [3], data__num_engines=2, data__min_engines=1) as run:
        run.wait(lambda: run.steps >= 2, "first steps with one engine")
        assert len(run.actors(WORKER)) == 1 and run.statistic("rollout/workers_alive") == 1
        run.add_node(1)
        run.wait(lambda: run.statistic("rollout/workers_alive") == 2, "second engine")
        run.finish()
        assert run.workers() == {"worker 0", "worker 1"}
        assert_every_prompt_was_trained_on_once(run)


def test_a_killed_rank_restarts_the_trainer_and_leaves_the_engines(folder: Path) -> None:
    with FaultRun(folder, [4], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 5, "first steps")
        engines, controller, rank = pids(run, WORKER), pids(run, CONTROLLER), pids(run, RANK)
        run.kill(RANK)
        run.wait(lambda: run.restarts == 1, "second attempt")
        run.wait(lambda: pids(run, RANK) and "(global step 12)" in run.log, "steps of the second attempt")
        assert pids(run, WORKER) == engines and pids(run, CONTROLLER) == controller
        assert not pids(run, RANK) & rank
        run.finish()
        assert run.restarts == 1
        assert_every_prompt_was_trained_on_once(run)


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
        assert run.restarts == 0
        assert_every_prompt_was_trained_on_once(run)


def test_a_killed_driver_leaves_no_process(folder: Path) -> None:
    with FaultRun(folder, [4], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 3, "first steps")
        actors = [process for name in (WORKER, CONTROLLER, RANK, "RunChannel") for process in run.actors(name)]
        family = [child for actor in actors for child in (actor, *actor.children(recursive=True))]
        assert len(actors) == 5 and len(family) > 5, "two engines with rewards, a rank, the controller and the channel"
        run.process.kill()
        assert psutil.wait_procs(family, timeout=60)[1] == []
