"""What the rollout controller itself costs: prompt groups per second of one core from lease to publish, and its memory.

    python benchmarks/controller_cost.py

The real RolloutController on an event loop of simulated time, in which engines answer 5,000 groups a second, evenly spread,
send heartbeats every second, and every rank of the trainer takes its share. Nothing computes, so what a group costs is the
CPU time of this process: the controller's own work, the loop's, and that of these stand-ins. Ray's calls are not in it.
Then one million groups go through one controller, and the process' memory is noted on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from circumstances import circumstances
from simulation_loop import simulate

from rl_lightning.prompts.source import PromptSource
from rl_lightning.rollout.admission import StalenessGate
from rl_lightning.rollout.controller import RolloutController
from rl_lightning.rollout.controller_settings import ControllerSettings
from rl_lightning.rollout.group_record import GroupRecord
from rl_lightning.rollout.share import Share
from rl_lightning.testing import FakePrompts
from rl_lightning.types import Lease, SamplingParams

logger = logging.getLogger("controller_cost")

HERE = Path(__file__).parent
GOAL = 5000
"""Groups per second that one controller must carry."""

RECORD = GroupRecord(n_tokens=130_000, n_answer_tokens=128_000, success_rate=0.5)
"""Of every group: 16 answers of 8,000 tokens."""

TABLE_HEAD = """| engines | trainer ranks | prompts a step | in flight | eta | who waits | groups/s | us a group |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Load:
    """A run's size, and which side waits.

    Attributes:
        workers: engines.
        ranks: of the trainer; each takes its share.
        batch: prompts a step.
        concurrent: most groups in flight.
        eta: max_head_offpolicyness.
        waits: `trainer`, which then trains twice as fast as the engines answer, or `engines`, with half as fast a trainer.
    """

    workers: int
    ranks: int
    batch: int
    concurrent: int
    eta: int
    waits: Literal["trainer", "engines"] = "trainer"


LOADS = (
    Load(4, 4, 512, 512, 4),
    Load(64, 32, 512, 512, 0),
    Load(64, 32, 512, 512, 4),
    Load(64, 32, 512, 512, 4, "engines"),
    Load(64, 32, 512, 4096, 16),
    Load(512, 128, 512, 512, 4),
    Load(512, 128, 4096, 8192, 4),
    Load(512, 128, 4096, 8192, 4, "engines"),
)


MEMORY_LOAD, POINTS = Load(64, 32, 512, 512, 4), 10


class Traffic:
    """All workers and the trainer of one controller, in simulated time. The engines together answer `GOAL` groups a second.

    Args:
        load: see `Load`.
    """

    def __init__(self, load: Load) -> None:
        self.load = load
        self.step = 0
        settings = ControllerSettings(StalenessGate(load.batch, load.eta, load.concurrent), 16, SamplingParams())
        source = PromptSource(FakePrompts(size=10_000))
        self.controller = RolloutController(source, settings, clock=asyncio.get_running_loop().time)
        self._names = [f"worker {i}" for i in range(load.workers)]
        self._held: dict[str, deque[Lease]] = {name: deque() for name in self._names}
        self._answered = {name: asyncio.Event() for name in self._names}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Registers all workers and sets them to work."""
        for name in self._names:
            await self.controller.register(name, "1", None)
        await self.controller.publish(0, self._names)
        for i, name in enumerate(self._names):
            loops = (self._lease(name), self._answer(name, i / GOAL), self._beat(name))
            self._tasks += [asyncio.create_task(loop) for loop in loops]

    async def train(self, n_groups: int) -> None:
        """Trains on the next batches, until at least `n_groups` more were trained on."""
        speed = GOAL * (2.0 if self.load.waits == "trainer" else 0.5)
        for _ in range(-(-n_groups // self.load.batch)):
            await asyncio.gather(*(self._take(rank) for rank in range(self.load.ranks)))
            await asyncio.sleep(self.load.batch / speed)
            self.step += 1
            await self.controller.publish(self.step, self._names)

    async def stop(self) -> None:
        """Ends the workers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take(self, rank: int) -> None:
        while not isinstance(await self.controller.take(self.step, rank, self.load.ranks), Share):
            pass

    async def _lease(self, name: str) -> None:
        most, held = -(-self.load.concurrent // self.load.workers), self._held[name]
        while True:
            while len(held) >= most:
                await self._answered[name].wait()
            held.extend(await self.controller.lease(name, most - len(held)))

    async def _answer(self, name: str, offset_s: float) -> None:
        """One group every `workers / GOAL` seconds, as long as there is one."""
        held = self._held[name]
        await asyncio.sleep(offset_s)
        while True:
            await asyncio.sleep(self.load.workers / GOAL)
            if held:
                await self.controller.put(name, held.popleft(), RECORD, None)
                self._answered[name].set()
                self._answered[name].clear()

    async def _beat(self, name: str) -> None:
        while True:
            await asyncio.sleep(1.0)
            report = {"busy_s": 1.0, "alive_s": 1.0, "tokens": 1600.0 * len(self._held[name])}
            await self.controller.heartbeat(name, "1", report)


async def measure_speed(load: Load, n_groups: int) -> dict[str, Any]:
    """Groups per second of CPU time, after a warm-up of the steps that eta lets run ahead."""
    traffic = Traffic(load)
    await traffic.start()
    await traffic.train((load.eta + 2) * load.batch)
    before, step = time.process_time(), traffic.step
    await traffic.train(n_groups)
    seconds = time.process_time() - before
    await traffic.stop()
    n = (traffic.step - step) * load.batch
    return {**asdict(load), "groups": n, "groups_per_s": round(n / seconds), "us_per_group": round(1e6 * seconds / n, 1)}


async def measure_memory(load: Load, n_groups: int, points: int) -> list[dict[str, float]]:
    """Resident memory of this process in MB after the warm-up and at `points` places on the way through `n_groups`."""
    traffic, process = Traffic(load), psutil.Process()
    await traffic.start()
    await traffic.train((load.eta + 2) * load.batch)
    noted: list[dict[str, float]] = []
    while True:
        gc.collect()
        noted.append({"groups": traffic.step * load.batch, "rss_mb": round(process.memory_info().rss / 2**20, 2)})
        logger.info("%d groups: %.2f MB", noted[-1]["groups"], noted[-1]["rss_mb"])
        if len(noted) > points:
            await traffic.stop()
            return noted
        await traffic.train(n_groups // points)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--groups", type=int, default=20_000, help="measured groups of each load")
    parser.add_argument("--memory-groups", type=int, default=1_000_000, help="groups of the memory run")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks" / "controller_cost.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    speeds = []
    for load in LOADS:
        speeds.append(simulate(measure_speed(load, args.groups)))
        logger.info("%s", row(speeds[-1]))
    memory = simulate(measure_memory(MEMORY_LOAD, args.memory_groups, POINTS))
    result = {**circumstances(), "command": "python benchmarks/controller_cost.py", "goal_groups_per_s": GOAL, "speeds": speeds}
    result |= {"memory_load": asdict(MEMORY_LOAD), "memory": memory}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page(result))


def row(speed: dict[str, Any]) -> str:
    """A line of the table."""
    size = " | ".join(f"{speed[key]:,}" for key in ("workers", "ranks", "batch", "concurrent", "eta"))
    return f"| {size} | {speed['waits']} | {speed['groups_per_s']:,} | {speed['us_per_group']:.0f} |"


def page(result: dict[str, Any]) -> str:
    """Both tables with their circumstances."""
    load, first, last = result["memory_load"], result["memory"][0], result["memory"][-1]
    table = "\n".join([TABLE_HEAD, *map(row, result["speeds"])])
    memory = " | ".join(f"{point['rss_mb']:.1f}" for point in result["memory"])
    groups = " | ".join(f"{point['groups']:,.0f}" for point in result["memory"])
    return f"""# What the controller costs

Prompt groups that one core carries from lease to publish; the goal is {result["goal_groups_per_s"]:,} a second. Engines answer
evenly spread in simulated time, every trainer rank takes its share, every engine sends a heartbeat a second; CPU time of the
whole process, stand-ins for engines and trainer included, Ray's calls not.

{table}

Memory of the process in MB on the way through {last["groups"] - first["groups"]:,.0f} groups ({load["workers"]} engines,
{load["ranks"]} ranks, {load["batch"]} prompts a step, {load["concurrent"]} in flight, eta {load["eta"]}):

| groups | {groups} |
|---|{"---|" * len(result["memory"])}
| MB | {memory} |

{result["date"]}, {result["machine"]}, Python {result["python"]}, commit {result["commit"][:12]}.

    {result["command"]}
"""


if __name__ == "__main__":
    main()
