"""The program that measures the controller's cost: its traffic trains every group, and memory does not grow with it."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import controller_cost  # noqa: E402
from controller_cost import Load, Traffic  # noqa: E402
from simulation_loop import simulate  # noqa: E402


@pytest.mark.parametrize("waits", ["trainer", "engines"])
def test_traffic_trains_every_group_and_leaves_nothing_behind(waits):
    load = Load(8, 4, 16, 32, 2, waits)

    async def scenario() -> tuple[int, int]:
        traffic = Traffic(load)
        await traffic.start()
        await traffic.train(1000)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        await traffic.train(3000)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        statistics = await traffic.controller.statistics()
        assert statistics["generated_tokens"] >= controller_cost.RECORD.n_answer_tokens * 4000
        assert statistics["groups_running"] + statistics["groups_buffered"] <= 3 * 16
        await traffic.stop()
        return traffic.step, grown

    tracemalloc.start()
    try:
        steps, grown = simulate(scenario())
    finally:
        tracemalloc.stop()
    assert steps == -(-1000 // 16) + -(-3000 // 16)
    assert grown < 3000 * 8, "less than a reference for each group"


def test_the_page_has_every_load():
    load = Load(2, 2, 8, 8, 1)
    speed = simulate(controller_cost.measure_speed(load, 100))
    memory = simulate(controller_cost.measure_memory(load, 100, 2))
    assert speed["groups"] == 104 and speed["groups_per_s"] == pytest.approx(1e6 / speed["us_per_group"], rel=0.01)
    assert [point["groups"] for point in memory] == [24, 80, 136]
    result = {"date": "", "machine": "", "python": "", "commit": "", "command": "", "goal_groups_per_s": 5000}
    result |= {"speeds": [speed], "memory_load": speed, "memory": memory}
    assert f"| 2 | 2 | 8 | 8 | 1 | trainer | {speed['groups_per_s']:,} |" in controller_cost.page(result)
