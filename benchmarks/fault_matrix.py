"""Every fault that a cluster can do to a run, done to a small one: what happened then, and how long it took.

    python benchmarks/fault_matrix.py [--only SCENARIO ...]

The runs are those of `fault_run.py`: a tiny model, TorchEngines and a reward that takes 0.1 s an answer, on a Ray cluster whose
nodes are all on this machine.  Most of the seconds are the machine's: Python, torch and Ray starting again on its cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from circumstances import circumstances
from fault_run import CONTROLLER, HANG_S, N_PROMPTS, RANK, REWARD_TIMEOUT_S, SERVER, WORKER, FaultRun

logger = logging.getLogger("fault_matrix")

OUT = Path(__file__).parents[1] / "docs" / "benchmarks"
CHANNEL = "RunChannel"
HEAD = """| fault | done by | what happened | noticed after | trains on after |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Outcome:
    """One row.

    Attributes:
        fault: what broke.
        command: what broke it.
        happened: what the run did, as far as it was checked here.
        noticed_s: from the fault until its first effect in the run's log.
        trains_on_s: from the fault until the first training step after that; None where there is none.
    """

    fault: str
    command: str
    happened: str
    noticed_s: float
    trains_on_s: float | None


def lost_node(folder: Path) -> list[Outcome]:
    """One of two engines' node is killed; later another node takes its place."""
    with FaultRun(folder, [3, 1], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 3 and run.statistic("rollout/groups_running") == 8, "full load")
        lost = measure(run, lambda: run.kill_node(1), lambda: run.statistic("rollout/groups_requeued") > 0)
        run.wait(lambda: run.statistic("rollout/workers_alive") == 1, "training with the rest")
        back = measure(run, lambda: run.add_node(1), lambda: run.statistic("rollout/workers_alive") == 2)
        requeued = int(run.statistic("rollout/groups_requeued"))
        finish(run, restarts=0)
    command = "kill -9 of all processes of the node"
    return [
        Outcome("node of an engine", command, f"{requeued} prompts in flight were answered by the other engine", *lost),
        Outcome("the node comes back", "ray start --address=...", "its engine started, got the weights and prompts", *back),
    ]


def added_engine(folder: Path) -> list[Outcome]:
    """A run that began with one engine of two gets a node for the other."""
    with FaultRun(folder, [3], data__num_engines=2, data__min_engines=1) as run:
        run.wait(lambda: run.steps >= 3, "first steps")
        times = measure(run, lambda: run.add_node(1), lambda: run.statistic("rollout/workers_alive") == 2)
        finish(run, restarts=0)
        assert len(run.workers()) == 2
    return [Outcome("an engine is added", "ray start --address=... (data.min_engines)", "it got the weights and prompts", *times)]


def killed(actor: str, fault: str, restarts: int, sign: Callable[[FaultRun], bool], happened: str, folder: Path) -> list[Outcome]:
    """An actor's process is killed; the engines keep theirs, unless it is one."""
    with FaultRun(folder, [4], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 5, "first steps")
        engines = {process.pid for process in run.actors(WORKER)}
        times = measure(run, lambda: run.kill(actor), lambda: sign(run))
        kept = engines & {process.pid for process in run.actors(WORKER)}
        finish(run, restarts)
        assert len(kept) == (1 if actor == WORKER else 2)
    return [Outcome(fault, f"kill -9 of {actor}", happened, *times)]


def killed_rank(folder: Path) -> list[Outcome]:
    """The trainer's only rank."""
    happened = "the ranks started again from last.ckpt; engines and controller kept their processes"
    return killed(RANK, "trainer rank", 1, lambda run: run.restarts == 1, happened, folder)


def killed_controller(folder: Path) -> list[Outcome]:
    """The controller."""
    happened = "Ray started it again, rank 0 gave it its state; rank and engines kept their processes, no step was repeated"
    return killed(CONTROLLER, "controller", 0, lambda run: "rollout controller had died" in run.log, happened, folder)


def killed_engine(folder: Path) -> list[Outcome]:
    """A worker with its TorchEngine."""
    happened = "its prompts went to the other engine; Ray started it again, it got the weights and prompts"
    return killed(WORKER, "engine", 0, lambda run: run.statistic("rollout/engine_restarts") == 1, happened, folder)


def killed_server(folder: Path) -> list[Outcome]:
    """The server of a run with a single SGLangEngine, where SGLang is installed."""
    if importlib.util.find_spec("sglang") is None:
        return []
    with FaultRun(
        folder, [3], data__num_engines=1, data__engine='{"class_path": "rl_lightning.engines.sglang.SGLangEngine"}'
    ) as run:
        run.wait(lambda: run.steps >= 5, "first steps")
        times = measure(run, lambda: run.kill(SERVER), lambda: run.statistic("rollout/engine_restarts") == 1)
        finish(run, restarts=0)
    happened = "its worker started it again, it got the weights, then the prompts that were in flight"
    return [Outcome("SGLang server, the only one", "kill -9 of the server", happened, *times)]


def killed_driver(folder: Path) -> list[Outcome]:
    """The process that the user started."""
    with FaultRun(folder, [4], data__num_engines=2) as run:
        run.wait(lambda: run.steps >= 3, "first steps")
        actors = [process for name in (WORKER, CONTROLLER, RANK, CHANNEL) for process in run.actors(name)]
        family = [child for actor in actors for child in (actor, *actor.children(recursive=True))]
        began = time.monotonic()
        run.process.kill()
        alive = psutil.wait_procs(family, timeout=120)[1]
        took_s = time.monotonic() - began
        assert not alive, alive
    happened = f"all {len(family)} processes of the run on the cluster ended"
    return [Outcome("driver", "kill -9 of rl-lightning fit", happened, round(took_s, 1), None)]


def hung_reward(folder: Path) -> list[Outcome]:
    """A reward that does not return."""
    rewards = '[{"reward": "benchmarks.fault_run.hanging_reward"}]'
    with FaultRun(folder, [4], data__num_engines=2, data__rewards=rewards, data__reward_timeout_s=REWARD_TIMEOUT_S) as run:
        hung = folder / "hung"
        run.wait(hung.exists, "a reward that hangs")
        times = measure(run, lambda: None, lambda: run.statistic("rollout/reward_timeout") > 0)
        finish(run, restarts=0)
    happened = f"after reward_timeout_s={REWARD_TIMEOUT_S:g} its process was replaced, the answer scored 0"
    return [Outcome("reward that hangs", f"time.sleep({HANG_S:g}) in one call", happened, *times)]


def measure(run: FaultRun, harm: Callable[[], None], sign: Callable[[], bool]) -> tuple[float, float]:
    """Seconds from before `harm` until `sign`, and until a training step ended after that."""
    began = time.monotonic()
    harm()
    run.wait(sign, "effect in the log")
    noticed_s, steps = time.monotonic() - began, run.steps
    run.wait(lambda: run.steps > steps, "next step")
    return round(noticed_s, 1), round(time.monotonic() - began, 1)


def finish(run: FaultRun, restarts: int) -> None:
    """Whatever broke, the run ends well and has trained on every prompt once."""
    run.finish(restarts)
    assert run.trained_on_all_once(), "a prompt was lost or trained on twice"


SCENARIOS: dict[str, Callable[[Path], list[Outcome]]] = {
    scenario.__name__: scenario
    for scenario in (
        lost_node, added_engine, killed_engine, killed_server, killed_rank, killed_controller, killed_driver, hung_reward
    )
}  # fmt: skip


def table(outcomes: list[dict[str, Any]]) -> str:
    """Markdown, one row an outcome."""
    rows = [HEAD]
    for o in outcomes:
        trains_on = "" if o["trains_on_s"] is None else f"{o['trains_on_s']:g} s"
        rows.append(f"| {o['fault']} | `{o['command']}` | {o['happened']} | {o['noticed_s']:g} s | {trains_on} |")
    return "\n".join(rows)


def page(measured: dict[str, Any]) -> str:
    """The benchmark's page: scenarios by name, each with its circumstances and outcomes."""
    made = next(iter(measured.values()))
    outcomes = [outcome for scenario in measured.values() for outcome in scenario["outcomes"]]
    times = sorted({f"{scenario['date']} (commit {scenario['commit'][:12]})" for scenario in measured.values()})
    return f"""# What faults cost

Each fault was done to a run of {N_PROMPTS} prompts with two engines and a rank, on nodes that are all one machine:
most of the seconds are Python, torch and Ray starting on its cores. Every run whose driver lived ended well, with
every prompt trained on exactly once (read from the rollout log). *Noticed*: the first effect in the run's log; *trains on*: the
first step that ended after that. Silence counts as death after `worker_timeout_s`, 5 s here and 60 s by default.

{table(outcomes)}

{", ".join(times)}, {made["machine"]}, Python {made["python"]}.

    python benchmarks/fault_matrix.py
"""


def main() -> None:
    """Runs the scenarios, prints the table and writes json and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS, default=list(SCENARIOS), help="default: all")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = OUT / "fault_matrix.json"
    for name in args.only:
        measured: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as folder:
            outcomes = [asdict(outcome) for outcome in SCENARIOS[name](Path(folder))]
        measured[name] = {**circumstances(), "outcomes": outcomes}
        measured = {scenario: measured[scenario] for scenario in SCENARIOS if scenario in measured}
        path.write_text(json.dumps(measured, indent=1) + "\n")
        path.with_suffix(".md").write_text(page(measured))
        logger.info("%s", table(outcomes))


if __name__ == "__main__":
    main()
