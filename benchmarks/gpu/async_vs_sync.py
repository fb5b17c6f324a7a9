"""The same training at several bounds of staleness, with answers of long-tailed length, beside what either side does alone.

    python benchmarks/gpu/async_vs_sync.py                            # 2 GPUs: one generates, one trains; weights by NCCL
    python benchmarks/gpu/async_vs_sync.py --layout colocated         # 1 GPU does both; weights through its memory

The model has a real one's shape and random weights, so an answer hardly ever ends by itself: its length is drawn from a lognormal
distribution, a function of (seed, group, answer).  One SGLang server and one training process serve all turns: the engine
alone (the loop with a trainer that trains nothing), the trainer alone (batches of that turn again and again, no engine at
work), then the loop at every eta.  The first steps of a turn, in which kernels compile and the pipeline fills, are not
measured.  The bound that no eta can pass is the slower side alone.  `--budget-s` is kept: table and JSON are written after
every turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "recipes")]

from async_vs_sync_turns import ENGINE_ALONE, TRAINER_ALONE, run_turns  # noqa: E402
from gpu_machine import describe_machine, shown, write_results  # noqa: E402
from random_qwen3 import SHAPES  # noqa: E402
from shared_server import ON_GPU, SharedServer  # noqa: E402
from turn import kill_tree, started_process  # noqa: E402

logger = logging.getLogger("async_vs_sync")

MEASURES = {
    "tokens_per_s": "trained tokens/s",
    "seconds": "s/step",
    "trainer_idle": "trainer idle",
    "engine_idle": "engine idle",
    "update_s": "update, s",
    "sync_s": "weight sync, s",
    "paused_s": "generation paused, s",
    "staleness": "staleness",
    "staleness_max": "at most",
    "logprob_diff": "engine - trainer (nats)",
    "graphs": "graphs compiled",
}
LEGEND = """Trained tokens include prompts. Idle is the share of time in which the trainer waited for rollouts, and in which the
engine had nothing at all in flight; that it is half empty while the longest answers end shows only in its rate. The bound is
the slower side alone: the engine with a trainer that trains nothing, the trainer with batches that are there. Times of the
weights are those of the step before."""
RIVAL = "eta 0, both GPUs colocated"
"""The fairest synchronous rival of GPUs apart: no GPU waits for the other, and no gradients travel in this figure."""

CLOSING_S = 15.0
"""Kept back from the budget for ending all processes."""


def main() -> None:
    """Runs all turns and writes table and JSON after each."""
    started = time.monotonic()
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s" if args.worker else "%(message)s")
    if args.worker:
        run_turns(args, started + args.budget_s)
        return
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write = [sys.executable, str(ROOT / "recipes" / "random_qwen3.py"), args.shape, str(folder / "model")]
        subprocess.run(write, check=True, env={**os.environ, "PYTHONPATH": with_root()})
        with SharedServer(folder / "model", args.log.with_suffix(".server"), args.engine_gpu, server_args(args)) as server:
            seconds = args.budget_s - (time.monotonic() - started) - CLOSING_S
            collect(args, worker_command(args, folder, server, seconds), server, seconds)


def parse() -> argparse.Namespace:
    """The command line, with what follows from it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layout", choices=["apart", "colocated"], default="apart")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--etas", type=int, nargs="+", default=[0, 4, 1, 2, 8], help="in this order")
    parser.add_argument(
        "--kept", type=int, nargs="*", default=[4], help="etas once more, answers keeping their cache over updates"
    )
    parser.add_argument("--budget-s", type=float, default=560.0, help="seconds of the whole program")
    parser.add_argument("--steps", type=int, default=24, help="measured steps of a turn, at most")
    parser.add_argument("--warmup", type=int, default=4, help="steps before those (one of the synchronous turn)")
    parser.add_argument("--prompts", type=int, default=32, help="per step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--in-flight", type=int, help="prompts; as many as in a step by default")
    parser.add_argument("--median-tokens", type=int, default=256, help="median length of an answer")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of the length")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longest answer")
    parser.add_argument("--max-tokens-per-mb", type=int, default=16384)
    parser.add_argument("--transport", help="weight_transport; distributed apart and tensor colocated by default")
    parser.add_argument("--mem-fraction", type=float, help="of its GPU for the engine; 0.8 apart, 0.35 colocated by default")
    parser.add_argument(
        "--weights", choices=["float32", "bfloat16"], default="bfloat16", help="of the trainer; with float32 copies"
    )
    parser.add_argument("--checkpointing", help="gradient_checkpointing; none apart with the 0.6b shape, else full by default")
    parser.add_argument("--cpu", action="store_true", help="try the program on a machine without GPUs, with --shape tiny")
    parser.add_argument("--between-s", type=float, default=10.0, help="seconds that a turn takes to start and to end")
    parser.add_argument("--rival", type=Path, help="JSON of `--layout colocated` with half the prompts, eta 0 among its turns")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "async_vs_sync.log")
    parser.add_argument("--out", type=Path, help="default: docs/benchmarks/async_vs_sync_LAYOUT.json")
    for name in ("--model", "--url", "--api-key", "--ray-folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    apart = args.layout == "apart"
    args.in_flight = args.in_flight or args.prompts
    args.weights = "float32" if args.cpu else args.weights
    args.engine_gpu, args.trainer_gpu = (None, 0) if args.cpu else (0, 1) if apart else (0, 0)
    args.transport = args.transport or ("disk" if args.cpu else "distributed" if apart else "tensor")
    args.mem_fraction = args.mem_fraction or (0.8 if apart else 0.35)
    args.checkpointing = args.checkpointing or ("none" if args.cpu or (apart and args.shape == "0.6b") else "full")
    args.out = args.out or ROOT / "docs" / "benchmarks" / f"async_vs_sync_{args.layout}.json"
    return args


def server_args(args: argparse.Namespace) -> dict[str, Any]:
    """Of the engine."""
    return {} if args.cpu else {**ON_GPU, "mem_fraction_static": args.mem_fraction}


def worker_command(args: argparse.Namespace, folder: Path, server: SharedServer, seconds: float) -> list[str]:
    """This program again, as the process that trains."""
    (folder / "ray").mkdir()
    where = {"--model": folder / "model", "--url": server.url, "--api-key": server.api_key, "--ray-folder": folder / "ray"}
    words = [str(word) for pair in where.items() for word in pair]
    return [sys.executable, __file__, *sys.argv[1:], "--worker", *words, "--budget-s", str(seconds)]


def with_root() -> str:
    """PYTHONPATH with this repository first."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


# -- what the turns report


def collect(args: argparse.Namespace, command: list[str], server: SharedServer, seconds: float) -> None:
    """Reads the worker's lines until it ends or time is up."""
    turns: dict[str, dict[str, Any]] = {}
    with args.log.open("w+") as log, started_process(command, log, seconds) as process:
        server.watch(lambda cause: give_up(cause, process.pid))
        for line in reports(process.stdout):
            turn = turns.setdefault(line.pop("turn"), {"steps": []})
            if "step" in line:
                turn["steps"].append(line)
                continue
            turn |= line
            write(args, turns)
        code = process.wait()
        log.seek(0)
        unfinished = [name for name, turn in turns.items() if "took_s" not in turn]
        if code or unfinished or not turns:
            logger.warning("ended with code %s, unfinished: %s; the log ends: %s", code, unfinished, log.read()[-3000:])
    write(args, turns)


def give_up(cause: str, pid: int) -> None:
    """Without the server the turns would wait for ever."""
    logger.warning("the server died: %s", cause)
    kill_tree(pid)


def reports(lines: Any) -> Iterator[dict[str, Any]]:
    """The worker's own lines among all that it prints."""
    for line in lines:
        if line.startswith('{"turn"'):
            yield json.loads(line)


def write(args: argparse.Namespace, turns: dict[str, dict[str, Any]]) -> None:
    """JSON and table of what there is."""
    summaries = {name: {**summary(turn["steps"]), **turn} for name, turn in turns.items()}
    if args.rival is not None:
        summaries[RIVAL] = rival(json.loads(args.rival.read_text()))
    document = {**describe(args), "bound_tokens_per_s": bound(summaries), "turns": summaries}
    title = f"Asynchronous against synchronous, {args.layout}"
    write_results(args.out, document, title, document["task"] + ".", table(summaries), LEGEND)
    logger.info("\n%s\n", table(summaries))


def summary(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Of the measured steps: rates over their whole time, means, the median of pauses."""
    steps = [step for step in steps if step["measured"]]
    if not steps:
        return {}
    seconds = sum(step["seconds"] for step in steps)
    columns = {name: [step[name] for step in steps if name in step] for name in (*MEASURES, "answer_tokens")}
    result = {name: mean(values) for name, values in columns.items() if values}
    result["tokens_per_s"] = sum(step["tokens"] for step in steps) / seconds
    result["trainer_idle"] = sum(step["wait_s"] for step in steps) / seconds
    if "engine_idle_s" in steps[0]:
        result["engine_idle"] = max(0.0, sum(step["engine_idle_s"] for step in steps) / seconds)
    if "graphs" in steps[0]:
        result["graphs"] = sum(step["graphs"] for step in steps)
    if "paused_s" in steps[0]:
        result["paused_s"] = median(step["paused_s"] for step in steps)
        result["staleness_max"] = max(step["staleness_max"] for step in steps)
    return {"n_steps": len(steps), **{name: round(value, 4) for name, value in result.items()}}


def bound(summaries: dict[str, dict[str, Any]]) -> float | None:
    """Trained tokens/s of the slower side alone, None as long as one of the two is not measured."""
    alone = [summaries.get(name, {}).get("tokens_per_s") for name in (ENGINE_ALONE, TRAINER_ALONE)]
    known = [rate for rate in alone if rate is not None]
    return min(known) if len(known) == len(alone) else None


def rival(document: dict[str, Any]) -> dict[str, Any]:
    """Two GPUs that both generate and train in turn, each half of the prompts: twice what one of them does."""
    alone = document["turns"]["0"]
    return {"tokens_per_s": 2 * alone["tokens_per_s"], "seconds": alone["seconds"], "command": document["command"]}


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Markdown, one line for each turn."""
    rates = {name: result.get("tokens_per_s") for name, result in summaries.items()}
    others = {"x eta 0": rates.get("0"), "of the bound": bound(summaries)}
    others |= {"x the rival": rates[RIVAL]} if RIVAL in rates else {}
    lines = [f"| turn | {' | '.join([*MEASURES.values(), *others])} |", "|---" * (len(MEASURES) + len(others) + 1) + "|"]
    for name, result in summaries.items():
        cells, rate = [shown(result[key]) if key in result else "-" for key in MEASURES], rates[name]
        is_turn = name[0].isdigit()
        against = [f"{rate / other:.2f}" if rate and other and is_turn else "-" for other in others.values()]
        lines.append(f"| {f'eta {name}' if is_turn else name} | {' | '.join([*cells, *against])} |")
    return "\n".join(lines)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where, when and how the numbers were made."""
    return {
        **describe_machine("async_vs_sync.py", 0 if args.cpu else 1 if args.layout == "colocated" else 2),
        "task": f"Qwen3-{args.shape} shape, random weights; {args.prompts} prompts of 128 tokens x {args.answers} answers a "
        f"step, lengths lognormal with median {args.median_tokens} and sigma {args.sigma}, at most {args.max_tokens} tokens; "
        f"{args.in_flight} prompts in flight; {args.layout}, weights by {args.transport}",
    }


if __name__ == "__main__":
    main()
