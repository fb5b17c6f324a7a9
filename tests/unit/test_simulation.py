"""The simulated runs keep the rules of a real one, and the fake engine keeps the time that a loop over tokens gives."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lightning.types import Lease, Prompt, SamplingParams

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import simulation  # noqa: E402
import simulation_report  # noqa: E402
from simulation_engine import Answer, SimulatedEngine, SimulatedGroup  # noqa: E402
from simulation_inputs import Hardware, Workload, stated  # noqa: E402
from simulation_loop import simulate  # noqa: E402
from simulation_run import Setup, simulate_run  # noqa: E402

SMALL = Workload(prompts=6, answers=3, prompt_len=5, median_len=60.0, max_new_tokens=300)
FEW = Hardware(max_running=4)


# -- whole runs


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.integers(1, 30), st.integers(0, 10**6))
def test_no_answer_is_older_than_eta_and_every_prompt_is_trained_on_once(engines, trainers, eta, concurrent, seed):
    setup = Setup(engines, trainers, eta, 8, concurrent, endless=False, workload=replace(SMALL, seed=seed), hardware=FEW)
    outcome = simulate_run(setup)
    assert all(0 <= age <= eta for step in outcome.steps for age in step.staleness)
    assert all(len(step.indices) == setup.batch for step in outcome.steps)
    assert sorted(index for step in outcome.steps for index in step.indices) == list(range(8 * setup.batch))
    assert sum(step.tokens for step in outcome.steps) == sum(
        SMALL.prompt_len + n for index in range(8 * setup.batch) for n in setup.workload.lengths(index)
    )


def test_a_run_is_a_function_of_its_inputs():
    setup = Setup(3, 2, 2, 6, workload=SMALL, hardware=FEW)
    outcome = simulate_run(setup)
    assert simulate_run(setup) == outcome
    assert simulate_run(replace(setup, workload=replace(SMALL, seed=2))) != outcome


@pytest.mark.parametrize("engines", [1, 3, 6])
def test_more_staleness_is_never_slower(engines):
    workload = replace(SMALL, prompts=24)
    speeds = [simulate_run(Setup(engines, 2, eta, 14, workload=workload, hardware=FEW)).tokens_per_s() for eta in (0, 1, 2, 4, 8)]
    assert all(later > 0.97 * sooner for sooner, later in zip(speeds, speeds[1:], strict=False)), speeds
    assert speeds[1] > 1.05 * speeds[0], "generation beside training is the point of it"


def test_time_is_what_the_slower_side_needs():
    slow = replace(FEW, train_mfu=1e-6)
    outcome = simulate_run(Setup(3, 2, 2, 8, workload=SMALL, hardware=slow))
    assert outcome.trainer_idle() < 0.01 and outcome.engine_idle > 0.5 and outcome.staleness()[1] == 2
    tokens = sum(step.tokens for step in outcome.steps[2:])
    busy = slow.train_s(tokens, 0) / 2  # two ranks; so short contexts add nothing to the work
    assert busy < outcome.steps[-1].ended_s - outcome.steps[2].started_s < 1.3 * busy
    outcome = simulate_run(Setup(3, 2, 2, 8, workload=SMALL, hardware=replace(FEW, sync_s=0.0)))
    assert outcome.trainer_idle() > 0.9 and outcome.engine_idle < 0.05


def test_at_eta_0_engines_and_trainer_take_turns():
    outcome = simulate_run(Setup(2, 1, 0, 5, workload=SMALL, hardware=FEW))
    assert all(step.indices == sorted(step.indices) for step in outcome.steps)
    assert [step.indices[0] for step in outcome.steps] == [0, 6, 12, 18, 24]
    assert outcome.staleness() == (0.0, 0)


def test_the_shape_of_the_published_table():
    """A quarter of the published run: as many answers wait for as many places."""
    workload, hardware = Workload(prompts=128), Hardware(max_running=64)
    speeds = [simulate_run(Setup(5, 3, eta, 6, workload=workload, hardware=hardware)).tokens_per_s() for eta in (0, 1, 16)]
    assert 1.5 < speeds[1] / speeds[0] < 2.0 and speeds[1] < speeds[2] < 1.2 * speeds[1]


# -- the engine


def group_of(index: int, lengths: list[int], prompt_len: int = 7) -> SimulatedGroup:
    lease = Lease(index, Prompt(f"q{index}", "", (1,) * prompt_len), len(lengths), SamplingParams())
    group = SimulatedGroup(lease, prompt_len, open=len(lengths))
    group.answers = [Answer(group, length) for length in lengths]
    return group


async def ends(hardware: Hardware, groups: list[list[int]], interrupted_after_s: float | None = None) -> list[tuple[float, int]]:
    """(time, index) of each group that one engine finishes, all given to it at once."""
    loop, seen = asyncio.get_running_loop(), []
    engine = SimulatedEngine(hardware, lambda group: seen.append((loop.time(), group.lease.index)))
    for index, lengths in enumerate(groups):
        engine.add(group_of(index, lengths))
    if interrupted_after_s is not None:
        loop.call_later(interrupted_after_s, engine.interrupt, 1)
    while len(seen) < len(groups):
        await asyncio.sleep(1.0)
    return seen


def ends_token_by_token(hardware: Hardware, groups: list[list[int]], prompt_len: int = 7) -> list[tuple[float, int]]:
    queue = [[index, length, prompt_len] for index, lengths in enumerate(groups) for length in lengths]
    left, running, now, seen = [len(lengths) for lengths in groups], [], 0.0, []
    while queue or running:
        while queue and len(running) < hardware.max_running:
            now += hardware.forward_s(prompt_len, prompt_len**2)
            running.append(queue.pop(0))
        now += hardware.decode_s(len(running)) + sum(context for _, _, context in running) * hardware.read_s
        for answer in running:
            answer[1], answer[2] = answer[1] - 1, answer[2] + 1
        for index, _, _ in [answer for answer in running if not answer[1]]:
            left[index] -= 1
            if not left[index]:
                seen.append((now, index))
        running = [answer for answer in running if answer[1]]
    return seen


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=6), st.integers(1, 9))
def test_the_engine_takes_the_time_of_a_loop_over_tokens(groups, max_running):
    hardware = Hardware(max_running=max_running, bytes_per_s=1e9)
    seen, expected = simulate(ends(hardware, groups)), ends_token_by_token(hardware, groups)
    assert sorted(index for _, index in seen) == sorted(index for _, index in expected)
    assert [time for time, _ in seen] == pytest.approx([time for time, _ in expected], rel=1e-9)


def test_an_interruption_costs_the_pause_and_the_contexts_again():
    hardware, after_s = Hardware(forward_mfu=1e-4), 1.0
    ((whole_s, _),), ((later_s, _),) = (simulate(ends(hardware, [[1000, 1000]], after)) for after in (None, after_s))
    now, context = 2 * hardware.forward_s(7, 49), 7
    while (now := now + hardware.decode_s(2) + 2 * context * hardware.read_s) <= after_s:
        context += 1
    costs = [hardware.sync_s + hardware.forward_s(2 * n, 2 * n * n) for n in (context, context + 1)]
    assert context > 50 and costs[0] <= later_s - whole_s <= costs[1]


def test_answers_know_the_weights_that_began_and_ended_them():
    async def versions() -> list[tuple[int, int]]:
        engine = SimulatedEngine(Hardware(max_running=1), lambda group: None)
        engine.add(group := group_of(0, [100, 100]))
        asyncio.get_running_loop().call_later(0.1, engine.interrupt, 5)
        await asyncio.sleep(60.0)
        return [(answer.first_version, answer.last_version) for answer in group.answers]

    assert simulate(versions()) == [(0, 5), (5, 5)]


# -- the loop


def test_time_passes_only_while_everybody_waits():
    async def scenario() -> list[tuple[float, str]]:
        loop, seen = asyncio.get_running_loop(), []

        async def sleeper(name: str, *naps: float) -> None:
            for nap in naps:
                await asyncio.sleep(nap)
                seen.append((loop.time(), name))

        await asyncio.gather(sleeper("a", 3600.0, 0.5), sleeper("b", 3600.0), sleeper("c", 1e6))
        return seen

    assert simulate(scenario()) == [(3600.0, "a"), (3600.0, "b"), (3600.5, "a"), (1e6, "c")]


def test_a_hang_is_an_error():
    async def scenario() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="hangs"):
        simulate(scenario())


# -- inputs and report


def test_lengths_are_a_function_of_seed_and_prompt_and_have_the_stated_mean():
    workload = Workload()
    lengths = [n for index in range(2000) for n in workload.lengths(index)]
    assert lengths[:16] == workload.lengths(0) != Workload(seed=2).lengths(0)
    assert sum(min(n, 8192) for n in lengths) / len(lengths) == pytest.approx(5600, rel=0.02)
    assert max(lengths) == workload.max_new_tokens and 0.03 < lengths.count(max(lengths)) / len(lengths) < 0.06


def test_speeds_are_those_that_were_measured():
    hardware = Hardware()
    assert [n / hardware.decode_s(n) for n in (1, 32, 256)] == pytest.approx([388, 7826, 23035])
    assert all(hardware.decode_s(n) < hardware.decode_s(n + 1) for n in range(1, 300))
    rng = random.Random(1)
    lengths = [rng.randrange(1, 3000) for _ in range(50)]
    flops = sum(2 * 1.54e9 + 4 * 28 * 12 * 128 * position for n in lengths for position in range(n))
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    assert hardware.forward_s(tokens, squares) == pytest.approx(flops / (989e12 * 0.453), rel=1e-3)
    assert hardware.train_s(tokens, squares) == pytest.approx(3 * flops / (989e12 * 0.367), rel=1e-3)
    assert stated(hardware, Workload()).keys() == hardware.__dict__.keys() | Workload().__dict__.keys()


def test_the_report_has_every_run():
    args = argparse.Namespace(gpus=3, steps=4, engines=[1, 64], prompts=4, median_len=100.0, seed=1)
    result = {"date": "", "machine": "", "python": "", "commit": "", "command": "", **simulation.measure(args)}
    page = simulation_report.page(result)
    assert page.count("\n| 1 + ") == 2 and page.count("\n| 64 + 32 |") == 2
    for entry in [result["best"], *result["splits"], *result["in_flight"], *result["small"], *result["scale"]]:
        assert all(f"{run['tokens_per_s'] / 1000:,.1f}" in page for run in entry["runs"])
    assert len(simulation_report.table(result).splitlines()) == 2 + len(simulation.PUBLISHED)
    assert result["factor"] * result["best"]["runs"][0]["tokens_per_s"] == pytest.approx(27100, rel=1e-3)
