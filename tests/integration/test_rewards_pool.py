from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from rl_lightning.rewards.math import MathReward
from rl_lightning.rewards.pool import RewardPool, unique_names
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.types import Prompt
from tests import reward_samples

PROMPT = Prompt("q1", "1+1=", (1, 2), "math", {"solutions": ["2"]})


def pool_of(*rewards: Callable[[Prompt, str], float], **settings: Any) -> RewardPool:
    return RewardPool([WeightedReward(reward) for reward in rewards], **{"timeout_s": 0.5, "memory_gb": 1.0, **settings})


def with_pool(pool: RewardPool, scenario: Callable[[RewardPool], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), pool:
            await scenario(pool)

    asyncio.run(run())


def test_weighted_sum_and_parts_by_name_in_the_answers_order() -> None:
    async def scenario(pool: RewardPool) -> None:
        scores = await pool.score_many(PROMPT, ["a", "bbb", ""])
        assert [s.total for s in scores] == [2 * 1 - 0.5, 2 * 3 - 0.5, -0.5]
        assert scores[1].parts == {"length": 3.0, "half": 0.5} and scores[1].failure is None
        assert await pool.score_many(PROMPT, []) == []
        total, parts, failure = await pool.score(PROMPT, "ab")
        assert (total, parts["length"], failure) == (3.5, 2.0, None)

    terms = [WeightedReward(reward_samples.length, 2.0), WeightedReward(reward_samples.half, -1.0)]
    with_pool(RewardPool(terms), scenario)
    assert unique_names([*terms, terms[0]]) == ["length", "half", "length_2"]


@pytest.mark.parametrize(
    ("answer", "failure", "costs_process"),
    [
        ("raise", "error", False),
        ("nan", "error", False),
        ("hang", "timeout", True),
        ("spin", "timeout", True),
        ("eat", "memory", True),
        ("exit", "error", True),
        ("die", "error", True),
        ("killed", "memory", True),
    ],
)
def test_a_fault_scores_zero_is_counted_and_harms_no_other_answer(answer: str, failure: str, costs_process: bool) -> None:
    async def scenario(pool: RewardPool) -> None:
        scores = await pool.score_many(PROMPT, ["fine", answer, "fine"])
        assert [s.failure for s in scores] == [None, failure, None]
        assert [s.parts["faulty"] for s in scores] == [1.0, 0.0, 1.0]
        assert [s.parts["half"] for s in scores] == [0.5, 0.5, 0.5]
        assert pool.failures == {failure: 1} and pool.restarts == costs_process

    with_pool(pool_of(reward_samples.faulty, reward_samples.half), scenario)


def test_what_a_reward_prints_does_not_disturb() -> None:
    async def scenario(pool: RewardPool) -> None:
        assert (await pool.score(PROMPT, "print")).total == 1.0

    with_pool(pool_of(reward_samples.faulty), scenario)


def test_a_fork_that_comes_back_has_no_say() -> None:
    async def scenario(pool: RewardPool) -> None:
        scores = await pool.score_many(PROMPT, ["fork", "raise", "fine"])
        assert [(s.total, s.failure) for s in scores] == [(1.0, None), (0.0, "error"), (1.0, None)]

    with_pool(pool_of(reward_samples.faulty), scenario)


@pytest.mark.parametrize(
    ("reward", "failure"), [(reward_samples.spawns_and_hangs, "timeout"), (reward_samples.spawns_and_dies, "error")]
)
def test_what_a_reward_started_ends_with_it(reward: Callable[[Prompt, str], float], failure: str, tmp_path: Path) -> None:
    async def scenario(pool: RewardPool) -> None:
        assert (await pool.score(PROMPT, str(tmp_path / "pid"))).failure == failure
        assert reward_samples.is_gone(int((tmp_path / "pid").read_text()))

    with_pool(pool_of(reward), scenario)


def test_setup_runs_once_outside_the_deadline() -> None:
    async def scenario(pool: RewardPool) -> None:
        assert (await pool.score(PROMPT, "x")).total == 1.0

    with_pool(pool_of(reward_samples.NeedsSetup(), timeout_s=0.3), scenario)


def test_at_most_so_many_processes_run_and_slow_groups_are_spread() -> None:
    async def scenario(pool: RewardPool) -> None:
        pids = await asyncio.gather(*(pool.score(PROMPT, str(i)) for i in range(8)))
        assert 1 <= len({s.parts["pid"] for s in pids}) <= 2
        await pool.score_many(PROMPT, ["a"] * 4)
        seen = await pool.score_many(PROMPT, ["a"] * 4)
        assert len({s.parts["pid"] for s in seen}) == 2 and all(s.parts["slow"] == 1.0 for s in seen)

    with_pool(pool_of(reward_samples.pid, reward_samples.slow, processes=2), scenario)


def test_cancelled_scoring_leaves_the_pool_usable() -> None:
    async def scenario(pool: RewardPool) -> None:
        task = asyncio.create_task(pool.score(PROMPT, "hang"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await pool.score(PROMPT, "fine")).total == 1.0

    with_pool(pool_of(reward_samples.faulty, timeout_s=30), scenario)


def test_a_process_killed_while_idle_costs_no_score() -> None:
    async def scenario(pool: RewardPool) -> None:
        pid = int((await pool.score(PROMPT, "x")).total)
        subprocess.run(["kill", "-9", str(pid)], check=True)
        assert reward_samples.is_gone(pid)
        assert (await pool.score(PROMPT, "x")).failure is None and pool.restarts == 1

    with_pool(pool_of(reward_samples.pid), scenario)


def local_function() -> Callable[[Prompt, str], float]:
    lock = open(__file__)  # noqa: SIM115 - an open file does not pickle
    return lambda prompt, answer: float(lock.fileno())


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (local_function(), ["<lambda>", "top level of a module"]),
        (reward_samples.OnlyInParent(), ["OnlyInParent", "No module named 'notebook_cell'", "sys.path"]),
        (reward_samples.BrokenSetup(), ["BrokenSetup", "sympathy"]),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_one_error_at_start(reward: Callable[[Prompt, str], float], words: list[str]) -> None:
    async def start() -> None:
        await pool_of(reward_samples.half, reward).start()

    with pytest.raises(ValueError) as error:
        asyncio.run(start())
    assert all(word in str(error.value) for word in words), error.value


def test_closed_pool_refuses_and_leaves_no_process() -> None:
    async def scenario(pool: RewardPool) -> None:
        pid = int((await pool.score(PROMPT, "x")).total)
        waiting = [asyncio.create_task(pool.score(PROMPT, "x")) for _ in range(3)]
        await pool.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(r, RuntimeError) for r in results), results
        assert reward_samples.is_gone(pid)

    with_pool(pool_of(reward_samples.pid), scenario)


SCRIPT = """
import asyncio, sys, time
from rl_lightning.rewards.pool import RewardPool
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.types import Prompt
from tests import reward_samples

async def main():
    pool = RewardPool([WeightedReward(reward_samples.pid), WeightedReward(reward_samples.slow)])
    await pool.start()
    print(int((await pool.score(Prompt("q", "t", (1,)), "x")).parts["pid"]), flush=True)
    await asyncio.gather(*(pool.score(Prompt("q", "t", (1,)), "x") for _ in range(1000)))

asyncio.run(main())
"""


def test_reward_processes_die_with_their_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not reward_samples.is_gone(child, within_s=0.1)
    parent.kill()
    parent.wait()
    assert reward_samples.is_gone(child)


NOTEBOOK = """
import asyncio
from rl_lightning.rewards.pool import RewardPool
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.types import Prompt

FACTOR = 3

def vowels(prompt, answer):
    return FACTOR * sum(c in "aeiou" for c in answer)

async def main():
    async with RewardPool([WeightedReward(vowels)]) as score:
        print((await score(Prompt("q", "t", (1,)), ["banana"]))[0].total)

asyncio.run(main())
"""


def test_rewards_defined_in_a_script_work() -> None:
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "9.0", done.stderr


def test_math_reward_in_the_pool() -> None:
    async def scenario(pool: RewardPool) -> None:
        answers = [r"\boxed{\sqrt{4}}", r"\boxed{3^{3^{3^{3}}}}", r"\boxed{((9!)!)!}", "it is 2"]
        scores = await pool.score_many(PROMPT, answers)
        assert [s.total > 0 for s in scores] == [True, False, False, True]

    with_pool(pool_of(MathReward(), timeout_s=8), scenario)


def test_a_pool_pickles_before_it_starts_and_checks_its_settings() -> None:
    assert pickle.loads(pickle.dumps(pool_of(reward_samples.half))).names == ["half"]
    with pytest.raises(ValueError, match="no reward"):
        RewardPool([])
    with pytest.raises(ValueError, match="timeout_s"):
        pool_of(reward_samples.half, timeout_s=0)


def test_cheap_rewards_cost_little() -> None:
    async def scenario(pool: RewardPool) -> None:
        await pool.score_many(PROMPT, ["a"] * 16)
        began = time.perf_counter()
        for _ in range(20):
            await pool.score_many(PROMPT, ["a"] * 16)
        seconds = (time.perf_counter() - began) / 320
        assert seconds < 0.005, f"{1000 * seconds:.2f} ms a score"

    with_pool(pool_of(reward_samples.half), scenario)
