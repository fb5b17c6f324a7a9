"""Prompts run once for their answers against prompts run with each of them: whole optimiser steps of PPO.

    python benchmarks/gpu/shared_prompts.py --shapes 0.6b 1.7b

All answers of a step have the same length, all prompts too. Both ways train the same batches with the same model and the same
token budget of a micro-batch in one run, taking turns. Tokens per second count a prompt once for each answer either way. With
`--cpu` the seconds are those of the processor, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from gpu_machine import describe_machine, shown, write_results  # noqa: E402
from rollouts import group_batch  # noqa: E402
from shapes import SHAPES, Shape  # noqa: E402
from trainer import VARIANTS, Measured, Plan, Step, make_trainer, summary  # noqa: E402

from rl_lightning.batching.micro_batch import saved_by_sharing  # noqa: E402
from rl_lightning.modules.optimizer import OptimizerConfig  # noqa: E402
from rl_lightning.modules.ppo_config import PPOConfig  # noqa: E402
from rl_lightning.types import Batch  # noqa: E402

logger = logging.getLogger("shared_prompts")

WAYS = ("repeated", "shared")
KEPT = ("seconds", "seconds_of_steps", "tokens_per_s", "peak_gib", "packing_efficiency", "recompilations", "failure")
"""What a row tells of each way."""


class Sharing(Measured):
    """Takes the steps of a plan; a step's case ends in how it runs prompts."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """The step; on the CPU its seconds are those of the processor."""
        step = self.plan.steps[batch_idx]
        self.share_prompts = step.case.endswith("shared")
        started = time.process_time()
        super().training_step(batch, batch_idx)
        if self.device.type == "cpu" and step.seconds:
            step.seconds = time.process_time() - started


def make_batch(case: str, args: argparse.Namespace, shape: Shape) -> Batch:
    """Groups of a case as `2048:512`, tokens of prompt and answer, that take about `args.tokens` if prompts are repeated."""
    n_prompt, n_answer = map(int, case.split(":"))
    n_groups = max(1, args.tokens // ((n_prompt + n_answer) * args.group_size))
    return group_batch(n_groups, args.group_size, n_prompt, n_answer, vocabulary=shape.vocabulary)


def make_plan(args: argparse.Namespace, batches: dict[str, Batch], variant: str) -> Plan:
    """By case: rounds of one step each way, on one batch."""
    plan = Plan()
    for case, batch in batches.items():
        for turn in range(args.warmup + args.steps):
            options: dict[str, Any] = {"flops": 0.0, "warmup": turn < args.warmup}
            plan.steps += [Step(f"{case} {way}", variant, batch, args.micro_tokens, **options) for way in WAYS]
    return plan


def run(args: argparse.Namespace, name: str, deadline: float) -> list[dict[str, Any]]:
    """All cases of one shape."""
    shape, variant = SHAPES[name], "eager" if args.cpu else args.variant
    batches = {case: make_batch(case, args, shape) for case in args.cases}
    plan = make_plan(args, batches, variant)
    with tempfile.TemporaryDirectory() as folder:
        module = Sharing(
            shape.write(Path(folder)),
            plan,
            deadline,
            optimizer=OptimizerConfig(lr=1e-6),
            ppo=PPOConfig(n_minibatches=1),
            max_tokens_per_mb=args.micro_tokens,
            dtype="float32" if args.cpu else "bfloat16",
            compile=not args.cpu,
        )
        make_trainer(argparse.Namespace(cpu=args.cpu, weights="bfloat16")).fit(module, plan)  # computes in the weights' type
    return [row(name, case, batch, plan, variant) for case, batch in batches.items()]


def row(name: str, case: str, batch: Batch, plan: Plan, variant: str) -> dict[str, Any]:
    """One case: both ways, and how much faster sharing is."""
    found = {way: summary(name, f"{case} {way}", variant, plan, 0) for way in WAYS}
    ways = {way: {key: value for key, value in result.items() if key in KEPT} for way, result in found.items()}
    rates = [float(ways[way].get("tokens_per_s", 0.0)) for way in WAYS]
    return {
        "shape": name,
        "case": case,
        "sequences": batch.n_seqs,
        "tokens": len(batch.token_ids),
        "saved": round(saved_by_sharing(batch, range(batch.n_seqs)), 4),
        **ways,
        **({"gain": round(rates[1] / rates[0], 3)} if all(rates) else {}),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each case."""
    head = ["shape", "prompt : answer", "tokens that sharing saves", "tokens/s repeated", "shared", "times as fast", "by tokens"]
    lines = [f"| {' | '.join([*head, 'peak GiB repeated', 'shared', 'recompilations'])} |", "|---" * 10 + "|"]
    for row in rows:
        repeated, shared = (row[way] for way in WAYS)
        cells = [row["shape"], row["case"].replace(":", " : "), f"{row['saved']:.0%}"]
        cells += [shown(way["tokens_per_s"]) if "tokens_per_s" in way else way["failure"] for way in (repeated, shared)]
        cells += [f"{row['gain']:.2f}" if "gain" in row else "", f"{1 / (1 - row['saved']):.2f}"]
        cells += [f"{way['peak_gib']:.1f}" if way.get("peak_gib") else "-" for way in (repeated, shared)]
        cells += [str(sum(way.get("recompilations", 0) for way in (repeated, shared)))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """JSON and page."""
    task = (
        f"{args.group_size} answers to a prompt, about {args.tokens} tokens a step where prompts are repeated, micro-batches of "
        f"{args.micro_tokens} tokens, one PPO update of all weights, {args.steps} measured steps each way"
    )
    timed = "processor time, float32, not compiled" if args.cpu else f"wall time, bfloat16, {args.variant}"
    document = {**describe_machine(Path(__file__).name, 0 if args.cpu else 1), "task": task, "timed": timed, "rows": rows}
    note = "By tokens: if a step took the time of the tokens that it runs, whatever they attend to."
    write_results(args.out, document, "Prompts shared by their answers", f"{task}; {timed}.", table(rows), note)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["0.6b", "1.7b"])
    parser.add_argument("--cases", nargs="+", default=["512:512", "2048:512", "128:1024", "2048:2048"], help="prompt:answer")
    parser.add_argument("--group-size", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--tokens", type=int, default=131072, help="of a step, with prompts repeated")
    parser.add_argument("--micro-tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--variant", choices=list(VARIANTS), default="compiled", help="as in trainer.py; not with --cpu")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each case and way that are not measured")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each case and way")
    parser.add_argument("--budget-s", type=float, default=420.0, help="no step is begun after so many seconds")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu_shared_prompts.json")
    return parser.parse_args()


def main() -> None:
    """Measures shape by shape; table and JSON are written after each."""
    args, started = parse(), time.perf_counter()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(args.shapes):
        gc.collect()  # the shape before, whose parts know each other
        rows += run(args, name, started + args.budget_s * (i + 1) / len(args.shapes))
        write(args, rows)
        logger.info("\n%s\n", table(rows))


if __name__ == "__main__":
    main()
