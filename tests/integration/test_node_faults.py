"""What clusters do to a run, done to a small one: a node is killed with SIGKILL in mid-run, or joins it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fault_run import WORKER, FaultRun

pytestmark = pytest.mark.slow
LONG_ANSWER = "benchmarks.fault_run.long_answer"


def test_nodes_come_and_go_and_cost_time_but_no_prompt(folder: Path) -> None:
    """The run begins with one engine of two; the other one's node joins, is lost and replaced."""
    with FaultRun(folder, [3], data__num_engines=2, data__min_engines=1, data__max_head_offpolicyness=4) as run:
        run.wait(lambda: run.steps >= 2, "first steps with one engine")
        assert len(run.actors(WORKER)) == 1 and run.statistic("rollout/workers_alive") == 1
        run.slow_down()
        run.add_node(1)
        run.wait(lambda: run.statistic("rollout/workers_alive") == 2, "second engine")
        assert len(run.actors(WORKER, node=0)) == len(run.actors(WORKER, node=1)) == 1
        run.wait(lambda: "worker 1" in run.workers(), "answers of the second engine")
        run.kill_node(1)
        run.wait(lambda: run.statistic("rollout/groups_requeued") > 0, "return of its leases")
        went_on_at = run.steps + 1
        run.wait(lambda: run.steps >= went_on_at and run.statistic("rollout/workers_alive") == 1, "training with the rest")
        run.add_node(1)
        run.wait(lambda: run.statistic("rollout/workers_alive") == 2, "replacement")
        run.speed_up()
        run.finish()
        assert run.workers() == {"worker 0", "worker 1"}
        assert run.trained_on_all_once()


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
        assert run.trained_on_all_once(40)
