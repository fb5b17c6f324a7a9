"""Tokens per second, MFU and memory of `AsyncPPOModule.training_step` under a Lightning Trainer, without rollouts.

    python benchmarks/gpu/trainer.py --shapes 1.7b 0.6b --budget-s 400

One fit for each shape; inside it the variants alternate step by step on the same batch, so that they share the machine's
moods. `mixed` are long-tailed lengths (lognormal, median 1,024, sigma 1), packed by the library. Tokens per second count
the tokens run over the wall time of whole steps: micro-batches, forward and backward passes, clipping, AdamW, statistics.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from gpu_machine import benchmark_parser, describe_machine  # noqa: E402
from quiet_trainer import quiet_trainer  # noqa: E402
from rollouts import random_batch  # noqa: E402
from shapes import FORMULA, PEAK_FLOPS, SHAPES, Shape, lognormal_lengths  # noqa: E402
from step_profile import profile_step  # noqa: E402
from trainer_report import report, table  # noqa: E402

from rl_lightning.models.checkpointing import Checkpointing, Level, activation_bytes, checkpoint_layers, plan_levels  # noqa: E402
from rl_lightning.models.layers import compiled_graphs, decoder_layers  # noqa: E402
from rl_lightning.modules.async_ppo import AsyncPPOModule  # noqa: E402
from rl_lightning.modules.master_weights import MasterWeights  # noqa: E402
from rl_lightning.modules.optimizer import OptimizerConfig  # noqa: E402
from rl_lightning.modules.ppo_config import PPOConfig  # noqa: E402
from rl_lightning.types import Batch  # noqa: E402

logger = logging.getLogger("trainer")

VARIANTS: dict[str, tuple[bool, Checkpointing]] = {
    "eager": (False, "none"),
    "eager+full": (False, "full"),
    "compiled": (True, "none"),
    "compiled+light": (True, "light"),
    "compiled+selective": (True, "selective"),
    "compiled+full": (True, "full"),
    "compiled+auto": (True, "auto"),
}
"""By name, whether layers are compiled and how activations are checkpointed."""


@dataclass
class Step:
    """One step to take: the batch, how to run it, and what came out."""

    case: str
    variant: str
    batch: Batch
    micro_tokens: int
    flops: float
    warmup: bool
    profiled: bool = False
    seconds: float = 0.0
    peak_bytes: int = 0
    retries: int = 0
    graphs: int = 0
    packing: float = 0.0
    profile: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


@dataclass
class Plan:
    """Steps in the order in which they are taken; an endless loader until the time is up."""

    steps: list[Step] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        return iter([step.batch for step in self.steps])


class Measured(AsyncPPOModule):
    """AsyncPPOModule that takes the steps of a plan and measures each."""

    def __init__(self, path: str, plan: Plan, deadline: float, **options: Any) -> None:
        super().__init__(path, **options)
        self.plan, self.deadline, self.optimizer_bytes = plan, deadline, 0
        self.planned: dict[int, list[Level]] = {}

    def configure_callbacks(self) -> list[pl.Callback]:
        """No engines."""
        return []

    def on_fit_start(self) -> None:
        """Decides what `auto` means for each size of micro-batches, while only the weights are in memory."""
        super().on_fit_start()
        spare = activation_bytes([self.model], self.device) if self.device.type == "cuda" else 1e12
        sizes = {step.micro_tokens for step in self.plan.steps}
        self.planned = {size: plan_levels(self.model, size, spare) for size in sizes}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """The step, between two synchronisations."""
        step = self.plan.steps[batch_idx]
        failed = any(s.failure for s in self.plan.steps if (s.case, s.variant) == (step.case, step.variant))
        if failed or time.perf_counter() > self.deadline:
            step.failure = step.failure or ("" if failed else "no time left")
            return
        self.max_tokens_per_mb = step.micro_tokens
        set_variant(self, step.variant)
        graphs, retries, started = compiled_graphs(), allocation_retries(), synchronized(self.device, reset_peak=True)
        try:
            if step.profiled:
                step.profile = profile_step(lambda: super(Measured, self).training_step(batch, batch_idx))
                return
            super().training_step(batch, batch_idx)
        except torch.OutOfMemoryError:
            step.failure = "out of memory"
            self.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return
        step.seconds = synchronized(self.device) - started
        step.packing = self.step_statistics.get("packing_efficiency", 0.0)
        step.graphs, step.retries = compiled_graphs() - graphs, allocation_retries() - retries
        if self.device.type == "cuda":
            step.peak_bytes, self.optimizer_bytes = (
                torch.cuda.max_memory_allocated(),
                optimizer_bytes(self.trainer.optimizers[0]),
            )
        logger.info("%s %s %.3f s%s", step.case, step.variant, step.seconds, " (warm-up)" if step.warmup else "")


class Cases(pl.Callback):
    """Calls `ended` after the last step of each case, so that a run that is cut short leaves those behind it."""

    def __init__(self, ended: Callable[[Measured, str], None]) -> None:
        self.ended = ended

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        step, *behind = pl_module.plan.steps[batch_idx : batch_idx + 2]
        if not behind or behind[0].case != step.case:
            self.ended(pl_module, step.case)


def set_variant(module: Measured, variant: str) -> None:
    """Runs `module` as `variant` from now on."""
    compiled, level = VARIANTS[variant]
    checkpoint_layers(module.model, module.planned[module.max_tokens_per_mb] if level == "auto" else level)
    for layer in decoder_layers(module.model):
        layer.compiled = getattr(layer, "compiled", layer._compiled_call_impl)
        layer._compiled_call_impl = layer.compiled if compiled else None


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Moments, and float32 copies of the weights where there are any."""
    moments = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    return moments + (sum(x.nbytes for x in optimizer.masters) if isinstance(optimizer, MasterWeights) else 0)


def allocation_retries() -> int:
    """How often PyTorch gave memory back to the GPU to find room; each time costs milliseconds."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if torch.cuda.is_available() else 0


def synchronized(device: torch.device, *, reset_peak: bool = False) -> float:
    """The time when the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset_peak:
            torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def make_plan(args: argparse.Namespace, shape: Shape) -> Plan:
    """By length: rounds of one step of each variant, on one batch."""
    plan = Plan()
    for case in args.lengths:
        lengths = case_lengths(case, args)
        batch = random_batch(lengths, vocabulary=shape.vocabulary)
        scored = int(batch.loss_mask.sum())
        share = 1.0 + (args.minibatches - 1) / args.minibatches / 3.0  # forward only, of all minibatches but the first
        flops = shape.flops(lengths, scored) * share
        micro = max(args.micro_tokens, *lengths)
        for turn in range(args.warmup + args.steps):
            plan.steps += [Step(case, variant, batch, micro, flops, turn < args.warmup) for variant in args.variants]
        wanted = [variant for variant in args.variants if f"{case}:{variant}" in args.profile]
        plan.steps += [Step(case, variant, batch, micro, flops, False, profiled=True) for variant in wanted]
    return plan


def case_lengths(case: str, args: argparse.Namespace) -> list[int]:
    """Tokens run of each sequence of a step."""
    total = args.tokens * args.minibatches
    if case != "mixed":
        return [int(case)] * max(args.minibatches, total // int(case))
    longest = min(16384, args.tokens)
    return lognormal_lengths(total, median=longest / 16, sigma=1.0, longest=longest, seed=0)


def run(args: argparse.Namespace, name: str, deadline: float, save: Callable[[list[dict[str, Any]]], None]) -> None:
    """All cases and variants of one shape; saves the rows of each case when it ends."""
    shape = SHAPES[name]
    plan = make_plan(args, shape)
    with tempfile.TemporaryDirectory() as folder:
        path = shape.write(Path(folder))
        module = Measured(
            path,
            plan,
            deadline,
            optimizer=OptimizerConfig(lr=1e-6),
            ppo=PPOConfig(n_minibatches=args.minibatches),
            max_tokens_per_mb=args.micro_tokens,
            dtype=args.weights,
            compile=any(VARIANTS[variant][0] for variant in args.variants),
        )

        def ended(module: Measured, case: str) -> None:
            save([summary(name, case, variant, plan, module.optimizer_bytes) for variant in args.variants])

        make_trainer(args, Cases(ended)).fit(module, plan)


def make_trainer(args: argparse.Namespace, *callbacks: pl.Callback) -> pl.Trainer:
    """Goes over the plan once."""
    return quiet_trainer(args.cpu, callbacks, args.weights == "float32", max_epochs=1)


def summary(name: str, case: str, variant: str, plan: Plan, optimizer: int) -> dict[str, Any]:
    """What the measured steps of one cell say."""
    steps = [s for s in plan.steps if (s.case, s.variant) == (case, variant)]
    row: dict[str, Any] = {"shape": name, "case": case, "variant": variant}
    failure = next((s.failure for s in steps if s.failure), "")
    measured = [s for s in steps if not s.warmup and s.seconds]
    if not measured:
        return {**row, "failure": failure or "no time left"}
    seconds, n_tokens = mean(s.seconds for s in measured), len(steps[0].batch.token_ids) - steps[0].batch.n_seqs
    return {
        **row,
        "tokens": n_tokens,
        "sequences": steps[0].batch.n_seqs,
        "seconds": round(seconds, 4),
        "seconds_of_steps": [round(s.seconds, 4) for s in measured],
        "tokens_per_s": round(n_tokens / seconds, 1),
        "mfu": round(steps[0].flops / seconds / PEAK_FLOPS, 4),
        "peak_gib": round(max(s.peak_bytes for s in measured) / 2**30, 2),
        "optimizer_gib": round(optimizer / 2**30, 2),
        "micro_tokens": steps[0].micro_tokens,
        "packing_efficiency": round(measured[-1].packing, 4),
        "graphs_warmup": sum(s.graphs for s in steps if s.warmup),
        "allocation_retries": sum(s.retries for s in measured),
        "recompilations": sum(s.graphs for s in measured),
        **next(({"profile": s.profile} for s in steps if s.profile), {}),
    }


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how the numbers were made."""
    return {
        **describe_machine("trainer.py", 0 if args.cpu else 1),
        "formula": FORMULA,
        "peak_flops": PEAK_FLOPS,
        "weights": args.weights,
        "step": f"{args.tokens} tokens in each of {args.minibatches} minibatches, prompts of at most 128 tokens among them; "
        f"micro-batches of {args.micro_tokens} tokens or one sequence; "
        "pi_prox of the first comes from its own forward pass, of the others from a separate one",
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__, "gpu_trainer.json", budget_s=420.0)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1.7b", "0.6b"])
    parser.add_argument("--lengths", nargs="+", default=["2048", "16384", "8192", "32768", "mixed"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS)[1:])
    parser.add_argument("--tokens", type=int, default=32768, help="of a minibatch: one optimiser step")
    parser.add_argument("--micro-tokens", type=int, default=16384, help="of a micro-batch, or the longest sequence")
    parser.add_argument("--minibatches", type=int, default=1, help="PPO minibatches of a step")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="bfloat16", help="bfloat16: with float32 copies")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each cell that are not measured")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each cell")
    parser.add_argument("--profile", nargs="*", default=[], metavar="CASE:VARIANT", help="profile one more step of these cells")
    return parser.parse_args()


def main() -> None:
    """Measures shape by shape; table and JSON are written after each case."""
    args, started = parse(), time.perf_counter()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def save(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        args.out.write_text(json.dumps({**describe(args), "rows": rows}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(report(rows) + "\n")
        logger.info("\n%s\n", table(rows))

    for i, name in enumerate(args.shapes):
        gc.collect()  # the shape before, whose parts know each other
        run(args, name, started + args.budget_s * (i + 1) / len(args.shapes), save)


if __name__ == "__main__":
    main()
