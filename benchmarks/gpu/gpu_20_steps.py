"""The command line's own run on two GPUs, or on one, and what its TensorBoard files say of its twenty steps.

    python benchmarks/gpu/gpu_20_steps.py                 # sglang.d1p1m1+d1p1m1
    python benchmarks/gpu/gpu_20_steps.py --colocated     # sglang.d1p1m1|d1p1m1

Prepares a model of random weights, runs `rl-lightning fit --config recipes/async_ppo_0.6b_gpu2.yaml`, and writes table and JSON.
The first steps, in which kernels compile and the pipeline fills, are shown and left out of the means.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "recipes")]

from gpu_machine import describe_machine, shown, write_results  # noqa: E402
from shared_server import ON_GPU  # noqa: E402
from turn import kill_tree  # noqa: E402

logger = logging.getLogger("gpu_20_steps")

RECIPE = ROOT / "recipes" / "async_ppo_0.6b_gpu2.yaml"
STEPS = 20
TITLE = "Twenty steps through the command line, {}"
ABOUT = """`rl-lightning fit --config recipes/async_ppo_0.6b_gpu2.yaml`: a Qwen3-0.6B shape of random weights, `{}`.
{:.0f} s in all, the start of Ray, engine and trainer among them; it ended with status {}."""
LEGEND = """The mean is of the steps from {} on. Times of the weights are those of the step itself; the first step has the
engine's start in its time. Towards the end the engine has generated all that the run needs, and stands still."""
STOP_S = 30.0
"""For a run that takes too long to end by itself."""

SCALARS = {
    "time/step": "s/step",
    "throughput/trained_tokens_per_s": "trained tokens/s",
    "throughput/generated_tokens_per_s": "generated tokens/s",
    "time/rollout_wait": "waiting for rollouts, s",
    "time/update": "update, s",
    "time/weight_sync": "weight sync, s",
    "time/generation_paused": "generation paused, s",
    "head_offpolicyness": "staleness",
    "head_offpolicyness_max": "at most",
    "engine_logprob_diff": "engine - trainer (nats)",
    "throughput/mfu": "MFU",
}
MODES = {False: "sglang.d1p1m1+d1p1m1", True: "sglang.d1p1m1|d1p1m1"}
"""By whether engine and trainer share one GPU."""

ON_CPU = {
    "run.allocation_mode": "null",
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "data.prompts.init_args.size": "80",
    "data.batch_size": "4",
    "data.group_size": "4",
    "data.generation.max_new_tokens": "16",
    "data.engine.init_args.server_args": "{}",
}


def main() -> None:
    """Prepares, runs and reports."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse()
    shape = "tiny" if args.cpu else "0.6b"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as folder:
        model = Path(folder) / "model"
        subprocess.run([sys.executable, str(ROOT / "recipes" / "random_qwen3.py"), shape, str(model)], check=True, env=env)
        started = time.monotonic()
        code = run(command(args, model, Path(folder)), env, args.budget_s)
        seconds = time.monotonic() - started
        steps = read_steps(Path(folder) / "runs" / "logs" / "async-ppo-0.6b-gpu2" / "trial0")
    document = {
        **describe_machine("gpu_20_steps.py", 0 if args.cpu else 2),
        "recipe": f"recipes/{RECIPE.name}",
        "ended_with": code,
    }
    document |= {"seconds_in_all": round(seconds, 1), "mean_from_step": args.warmup + 1, "mean": means(steps[args.warmup :])}
    rows = table(steps, document["mean"])
    title = TITLE.format("one GPU" if args.colocated else "two GPUs")
    about = ABOUT.format(MODES[args.colocated], document["seconds_in_all"], code)
    write_results(args.out, {**document, "steps": steps}, title, about, rows, LEGEND.format(args.warmup + 1))
    logger.info("%s", rows)
    if code or len(steps) != STEPS:
        raise SystemExit(f"{len(steps)} of {STEPS} steps, status {code}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--warmup", type=int, default=5, help="steps left out of the means")
    parser.add_argument("--budget-s", type=float, default=360.0, help="seconds after which the run is ended")
    parser.add_argument("--colocated", action="store_true", help="engine and trainer on one GPU")
    parser.add_argument("--cpu", action="store_true", help="try the program on a machine without GPUs")
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/gpu_20_steps[_colocated].json")
    parser.add_argument("options", nargs="*", help="further options of `rl-lightning fit`, after --")
    args = parser.parse_args()
    args.out = args.out or ROOT / "docs" / "benchmarks" / f"gpu_20_steps{'_colocated' if args.colocated else ''}.json"
    return args


def command(args: argparse.Namespace, model: Path, folder: Path) -> list[str]:
    """`rl-lightning fit` with the recipe; only what depends on the machine is set beside it."""
    options = {"run.fileroot": str(folder / "runs"), "run.recover_mode": "disabled", "model.path": str(model)}
    if args.cpu:
        options |= ON_CPU
    else:
        memory = {} if args.colocated else {"mem_fraction_static": 0.8}  # an engine that shares its GPU knows its part
        options["data.engine.init_args.server_args"] = json.dumps({**ON_GPU, **memory})
        options["run.allocation_mode"] = MODES[args.colocated]
        options["run.n_gpus_per_node"] = "1" if args.colocated else "2"
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "rl_lightning", "fit", f"--config={RECIPE}", *words, *args.options]


def run(words: list[str], env: dict[str, str], seconds: float) -> int | str:
    """Status of the run, or that it was ended."""
    process = subprocess.Popen(words, env=env, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # it then writes what it has measured
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        return f"ended after {seconds:.0f} s"
    finally:
        kill_tree(process.pid)


def read_steps(folder: Path) -> list[dict[str, float]]:
    """The scalars of every step, by their names in docs/metrics.md."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for name in SCALARS:
        for event in events.Scalars(name) if name in events.Tags()["scalars"] else []:
            steps.setdefault(event.step, {"step": event.step})[name] = round(event.value, 4)
    return [steps[number] for number in sorted(steps)]


def means(steps: list[dict[str, float]]) -> dict[str, float]:
    """Mean over the steps that have it; rates are weighted by time."""
    values = {name: [step[name] for step in steps if name in step] for name in SCALARS}
    result = {name: mean(column) for name, column in values.items() if column}
    total_s = sum(step.get("time/step", 0.0) for step in steps)
    for name in ("throughput/trained_tokens_per_s", "throughput/generated_tokens_per_s"):
        if total_s and name in result:
            result[name] = sum(step.get(name, 0.0) * step.get("time/step", 0.0) for step in steps) / total_s
    return {name: round(value, 4) for name, value in result.items()}


def table(steps: list[dict[str, float]], mean_step: dict[str, float]) -> str:
    """Markdown, a line for each step and one of the means."""
    lines = [f"| step | {' | '.join(SCALARS.values())} |", "|---" * (len(SCALARS) + 1) + "|"]
    rows: list[tuple[Any, dict[str, float]]] = [(int(step["step"]), step) for step in steps]
    for name, row in [*rows, ("mean", mean_step)]:
        lines.append(f"| {name} | {' | '.join(shown(row[key]) if key in row else '-' for key in SCALARS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
