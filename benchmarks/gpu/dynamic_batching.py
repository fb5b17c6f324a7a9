"""Micro-batches filled to a token budget against a fixed number of micro-batches, on answers of long-tailed length.

    python benchmarks/gpu/dynamic_batching.py --shape 0.6b

All train the same batches with the same model in one run, taking turns.  The first rival's fixed number is the smallest for
which no micro-batch of these batches passes the budget when sequences are dealt equally in the order in which they come: what
it takes not to run out of memory, known in hindsight; a real run has to choose it larger.  The second has 32, as AReaL's had.
Speed and gain are medians over the batches: code is compiled for the first small micro-batch, which may come late, and a row
counts it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from gpu_machine import benchmark_parser, describe_machine  # noqa: E402
from rollouts import random_batch  # noqa: E402
from shapes import SHAPES, lognormal_lengths  # noqa: E402
from trainer import Plan, Step, make_trainer, synchronized  # noqa: E402

from rl_lightning.batching.micro_batch import MicroBatch, make_micro_batch  # noqa: E402
from rl_lightning.models.layers import compiled_graphs  # noqa: E402
from rl_lightning.modules.async_ppo import AsyncPPOModule  # noqa: E402
from rl_lightning.modules.optimizer import OptimizerConfig  # noqa: E402
from rl_lightning.modules.ppo_config import PPOConfig  # noqa: E402
from rl_lightning.types import Batch  # noqa: E402

logger = logging.getLogger("dynamic_batching")


class Dealt(AsyncPPOModule):
    """AsyncPPOModule that cuts minibatches as each step of the plan says.

    Args:
        path: folder of the model.
        plan: steps whose variant is `dynamic`, or a number of micro-batches.
        **options: of AsyncPPOModule.
    """

    def __init__(self, path: str, plan: Plan, **options: Any) -> None:
        super().__init__(path, **options)
        self.plan, self.n_micro_batches = plan, 0

    def configure_callbacks(self) -> list[pl.Callback]:
        """No engines."""
        return []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """The step, between two synchronisations."""
        step = self.plan.steps[batch_idx]
        self.n_micro_batches = 0 if step.variant == "dynamic" else int(step.variant)
        graphs, started = compiled_graphs(), synchronized(self.device)
        super().training_step(batch, batch_idx)
        step.seconds, step.packing = synchronized(self.device) - started, self.step_statistics["packing_efficiency"]
        step.graphs = compiled_graphs() - graphs
        logger.info("%s %.3f s%s", step.variant, step.seconds, " (warm-up)" if step.warmup else "")

    def micro_batches(self, batch: Batch, sequences: Sequence[int], max_tokens: int) -> Iterator[MicroBatch]:
        """By token budget, or a fixed number of them."""
        if not self.n_micro_batches:
            yield from super().micro_batches(batch, sequences, max_tokens)
            return
        for part in filter(len, deal(sequences, self.n_micro_batches)):
            yield make_micro_batch(batch, part, device=self.device)


def deal(sequences: Sequence[int], n_parts: int) -> list[Sequence[int]]:
    """Contiguous parts of about equally many sequences."""
    bounds = [round(i * len(sequences) / n_parts) for i in range(n_parts + 1)]
    return [sequences[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def fixed_number(batches: Sequence[Sequence[int]], budget: int) -> int:
    """Micro-batches that it takes, dealing equally many sequences, for none of them to pass `budget` tokens."""
    n_parts = 1
    while any(sum(part) > budget for lengths in batches for part in deal(lengths, n_parts)):
        n_parts += 1
    return n_parts


def main() -> None:
    """Trains in turns and writes table and JSON."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {"median": args.median, "sigma": args.sigma, "longest": args.longest}
    lengths = [lognormal_lengths(args.tokens, seed=seed, **options) for seed in range(args.warmup + args.steps)]
    rivals = sorted({number or fixed_number(lengths, args.budget) for number in args.fixed})
    plan, variants = Plan(), ("dynamic", *map(str, rivals))
    for i, sequence_lengths in enumerate(lengths):
        batch = random_batch(sequence_lengths, vocabulary=SHAPES[args.shape].vocabulary, seed=i)
        plan.steps += [Step("", variant, batch, args.budget, 0.0, i < args.warmup) for variant in variants]
    started = time.perf_counter()
    train(args, plan)
    rows = [summary(variant, plan) for variant in variants]
    for row in rows:
        ratios = [theirs / ours for theirs, ours in zip(row["seconds_of_steps"], rows[0]["seconds_of_steps"], strict=True)]
        row["gain_of_dynamic"] = round(median(ratios) - 1, 4)
    result = {**describe(args), "rows": rows, "wall_s": round(time.perf_counter() - started, 1)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows) + "\n")
    logger.info("\n%s\n", table(rows))


def train(args: argparse.Namespace, plan: Plan) -> None:
    """Takes all steps of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        module = Dealt(
            SHAPES[args.shape].write(Path(folder)),
            plan,
            optimizer=OptimizerConfig(lr=1e-6),
            ppo=PPOConfig(n_minibatches=1),
            max_tokens_per_mb=args.budget,
            dtype=args.weights,
            gradient_checkpointing="auto",
            compile=False if args.cpu else None,
        )
        make_trainer(args).fit(module, plan)


def summary(variant: str, plan: Plan) -> dict[str, Any]:
    """What the measured steps of one variant say."""
    steps = [s for s in plan.steps if s.variant == variant and not s.warmup]
    return {
        "micro_batches": "filled to the budget" if variant == "dynamic" else f"always {variant}",
        "tokens_per_s": round(median(len(s.batch.token_ids) / s.seconds for s in steps), 1),
        "seconds_of_steps": [round(s.seconds, 4) for s in steps],
        "packing_efficiency": round(mean(s.packing for s in steps), 4),
        "compiled_graphs": [s.graphs for s in steps],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["micro-batches", "tokens/s", "of the budget filled", "compiled meanwhile", "filling the budget gains"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        gain = "" if row is rows[0] else f"{row['gain_of_dynamic']:+.1%}"
        cells = [row["micro_batches"], f"{row['tokens_per_s']:,.0f}", f"{row['packing_efficiency']:.1%}"]
        lines.append(f"| {' | '.join(cells)} | {sum(row['compiled_graphs'])} | {gain} |")
    return "\n".join(lines)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the numbers were made."""
    return {
        **describe_machine("dynamic_batching.py", 0 if args.cpu else 1),
        "task": f"Qwen3-{args.shape} shape, {args.tokens} tokens a step in sequences of lognormal length, median {args.median}, "
        f"sigma {args.sigma}, at most {args.longest}; budget of {args.budget} tokens a micro-batch",
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__, "gpu_dynamic_batching.json")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--tokens", type=int, default=262144, help="of a step")
    parser.add_argument("--budget", type=int, default=32768, help="tokens of a micro-batch")
    parser.add_argument("--median", type=float, default=1024.0, help="of a sequence's length")
    parser.add_argument("--sigma", type=float, default=1.0, help="of its logarithm")
    parser.add_argument("--longest", type=int, default=16384)
    parser.add_argument("--fixed", type=int, nargs="+", default=[0, 32], help="micro-batches of the rivals; 0: as few as fit")
    parser.add_argument("--warmup", type=int, default=1, help="batches that are not measured")
    parser.add_argument("--steps", type=int, default=5, help="measured batches")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
