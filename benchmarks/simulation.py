"""Staleness and the split of GPUs on paper: training runs in simulated time, admitted and scheduled by the real controller.

    python benchmarks/simulation.py

Engines and trainer are fakes with measured speeds (`simulation_inputs.py`, which says where each number is from); StalenessGate,
RolloutLedger, WorkerRoster and RolloutController are the ones of a run, on an event loop that jumps from timer to timer. Six
questions, under two minutes of one core:

1. AReaL's table of tokens/s over eta on 8 GPUs: is its shape what these inputs give? One factor is fitted, to eta 0.
2. Which split of the GPUs between generation and training is best, and who waits in the others?
3. How does that hang on the lengths of the answers, which are the input that is least known?
4. How many prompts must be in flight, and how long does one take then?
5. And on one engine, whose batch is small?
6. What do 1 to 512 engines make of the same batch?

Needs matplotlib for the plot (`rl-lightning[benchmarks]`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from circumstances import circumstances
from simulation_inputs import Hardware, Workload, stated
from simulation_report import SHOWN_ETA, page, plot, table
from simulation_run import Setup, simulate_run

logger = logging.getLogger("simulation")

PUBLISHED = {0: 27.1, 1: 47.8, 2: 47.8, 4: 49.0, 8: 51.5, 16: 52.0}
"""AReaL (arXiv 2505.24298), 1.5B on 8 GPUs: thousand tokens trained per second, by eta."""

SPLIT_ETAS = (0, 1, 4, 16)
SPREADS, LENGTH_ETAS = (0.6, 1.1), (0, 1, 16)
IN_FLIGHT = (0.125, 0.25, 0.5, 1.0)
"""Shares of a batch that may be in flight."""

SMALL_BATCHES, SMALL_ANSWERS, SMALL_ETAS = (16, 32, 64), 8, (1, 2, 4)
"""Prompts and answers of a step that one engine and one trainer take."""

SMALL_IN_FLIGHT = (1.0, 1.5, 2.0)
"""Batches of those in flight."""

SCALE_ETAS, SCALE_STEPS = (0, 1, 4, 16), 8
WIDE_FROM, WIDE = 64, 4
"""Engines from which on one batch is too little for them, and how many batches in flight are tried there too."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=8, help="of the splits")
    parser.add_argument("--steps", type=int, default=12, help="training steps of a run; the first two are not counted")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 8, 64, 512], help="of the last table; half as many train")
    parser.add_argument("--prompts", type=int, default=Workload.prompts, help="of a training step")
    parser.add_argument("--median-len", type=float, default=Workload.median_len, help="tokens of an answer")
    parser.add_argument("--seed", type=int, default=Workload.seed, help="of the answers' lengths")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "benchmarks" / "simulation.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'rl-lightning[benchmarks]'")
    result = {**circumstances(), "command": shlex.join(["python", "benchmarks/simulation.py", *sys.argv[1:]]), **measure(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page(result))
    plot(result, args.out.with_suffix(".png"))
    logger.info("\n%s\n\n%.0f s of one core, in %s", table(result), result["cpu_s"], args.out)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All tables."""
    workload, began_s = Workload(prompts=args.prompts, median_len=args.median_len, seed=args.seed), time.process_time()
    setups = [Setup(engines, args.gpus - engines, 0, args.steps, workload=workload) for engines in range(1, args.gpus)]
    splits = [summary(setup, SPLIT_ETAS) for setup in setups]
    best = max(range(len(splits)), key=lambda i: splits[i]["runs"][-1]["tokens_per_s"])
    chosen = summary(setups[best], PUBLISHED)
    lengths = [replace(setups[best], workload=replace(workload, spread=spread)) for spread in SPREADS]
    return {
        "inputs": stated(Hardware(), workload),
        "published_k_tokens_per_s": PUBLISHED,
        "factor": round(1000 * PUBLISHED[0] / chosen["runs"][0]["tokens_per_s"], 4),
        "generating_share": generating_share(splits),
        "best": chosen,
        "splits": splits,
        "lengths": [{"spread": setup.workload.spread, **summary(setup, LENGTH_ETAS)} for setup in lengths],
        "in_flight": [in_flight(setups[best], share) for share in IN_FLIGHT],
        "small": [small_batch(prompts, batches, workload) for prompts in SMALL_BATCHES for batches in SMALL_IN_FLIGHT],
        "scale": [row for engines in args.engines for row in scale_out(engines, workload)],
        "cpu_s": round(time.process_time() - began_s, 1),
    }


def summary(setup: Setup, etas: Iterable[int]) -> dict[str, Any]:
    """The same run under each eta."""
    runs = [observe(replace(setup, eta=eta)) for eta in etas]
    return {"engines": setup.engines, "trainers": setup.trainers, "runs": runs}


def in_flight(setup: Setup, share: float) -> dict[str, Any]:
    """The same run with at most `share` of a batch in flight."""
    concurrent = max(1, round(share * setup.batch))
    return {"concurrent": concurrent, **summary(replace(setup, concurrent=concurrent), [SHOWN_ETA])}


def small_batch(prompts: int, batches: float, workload: Workload) -> dict[str, Any]:
    """One engine and one trainer, with `batches` of so few prompts in flight."""
    small = replace(workload, prompts=prompts, answers=SMALL_ANSWERS)
    setup = Setup(1, 1, 0, 2 * SCALE_STEPS, concurrent=round(batches * prompts), workload=small)
    return {"prompts": prompts, "answers": SMALL_ANSWERS, "batches_in_flight": batches, **summary(setup, SMALL_ETAS)}


def scale_out(engines: int, workload: Workload) -> list[dict[str, Any]]:
    """The same batch on `engines` engines and half as many trainers; where it cannot fill them, also with more in flight."""
    setup = Setup(engines, max(1, engines // 2), 0, SCALE_STEPS, workload=workload)
    rows = [{"batches_in_flight": 1, **summary(setup, SCALE_ETAS)}]
    if engines >= WIDE_FROM:
        rows.append({"batches_in_flight": WIDE, **summary(replace(setup, concurrent=WIDE * setup.batch), SCALE_ETAS[1:])})
    return rows


def observe(setup: Setup) -> dict[str, Any]:
    """One run's numbers."""
    outcome = simulate_run(setup)
    mean, highest = outcome.staleness()
    seen = {
        "eta": setup.eta,
        "tokens_per_s": round(outcome.tokens_per_s()),
        "trainer_idle": round(outcome.trainer_idle(), 3),
        "engine_idle": round(outcome.engine_idle, 3),
        "staleness_mean": round(mean, 2),
        "staleness_max": highest,
        "step_s": round(outcome.step_s(), 1),
        "longest_lease_s": round(outcome.longest_lease_s),
    }
    logger.info("%d + %d GPUs, eta %d: %d tokens/s", setup.engines, setup.trainers, setup.eta, seen["tokens_per_s"])
    return seen


def generating_share(splits: list[dict[str, Any]]) -> float:
    """Share of GPUs at which generation is as fast as training, from what one GPU does where the other side never waits."""
    generates = splits[0]["runs"][-1]["tokens_per_s"] / splits[0]["engines"]
    trains = splits[-1]["runs"][-1]["tokens_per_s"] / splits[-1]["trainers"]
    return round(trains / (generates + trains), 3)


if __name__ == "__main__":
    main()
