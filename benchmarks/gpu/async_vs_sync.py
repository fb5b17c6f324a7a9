"""The same training at several bounds of staleness, trainer and SGLang on a GPU each, with answers of long-tailed length.

    python benchmarks/gpu/async_vs_sync.py --shape 0.6b --etas 0 4 --steps 12

The model has a real one's shape and random weights, so an answer never ends by itself: its length is drawn from a lognormal
distribution, a function of (seed, group, answer).  Weights travel by NCCL.  Each bound runs in a fresh process with its own
server; the first steps, in which kernels compile and the pipeline fills, are not measured.  A step's rate counts the tokens
trained on, prompts included, over the wall time from the end of the step before.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from echo_task import StepReporter  # noqa: E402
from turn import TurnError, take_turn  # noqa: E402

logger = logging.getLogger("async_vs_sync")

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (256, 4, 4, 2, 512),
    "0.6b": (1024, 28, 16, 8, 3072),
    "1.7b": (2048, 28, 16, 8, 6144),
}
"""Width, layers, heads, key/value heads and width of the MLP: Qwen3's published shapes, and one for a try on a CPU."""

MEASURES = {
    "tokens_per_s": "trained tokens/s",
    "seconds": "s/step",
    "wait_s": "waiting for rollouts",
    "update_s": "recompute + update",
    "sync_s": "weight sync",
    "paused_s": "generation paused",
    "engine_idle": "engine idle",
    "staleness": "staleness",
    "logprob_diff": "engine - trainer (nats)",
}
VERSIONS = ("torch", "ray", "transformers", "sglang")


def main() -> None:
    """Runs each bound in turn and writes table and JSON."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.worker:
        train(args)
        return
    runs: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as folder:
        write_model(Path(folder), args.shape)
        for eta in args.etas:
            runs[eta] = run(args, eta, folder)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({**describe(args), "runs": runs}, indent=1) + "\n")
            logger.info("\n%s\n", table(runs))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--etas", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each bound")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--prompts", type=int, default=16, help="per step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--median-tokens", type=int, default=256, help="median length of an answer")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of the length")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longest answer")
    parser.add_argument("--attention-backend", default="fa3")
    parser.add_argument("--cpu", action="store_true", help="try the program on a machine without GPUs")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds of one bound")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "async_vs_sync.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, shape: str) -> None:
    """A random Qwen3 with one token per character; a real shape has a real vocabulary's size too."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rl_lightning.models.tiny import character_tokenizer

    tokenizer = character_tokenizer()
    width, layers, heads, kv_heads, mlp_width = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=len(tokenizer) if shape == "tiny" else 151936,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp_width,
        head_dim=64 if shape == "tiny" else 128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(args: argparse.Namespace, eta: int, model: str) -> dict[str, Any]:
    """One bound in processes of its own: means over its measured steps, the median of pauses."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", "--model", model, "--etas", str(eta)]
    try:
        turn = take_turn(command, args.warmup, args.steps, args.timeout)
    except TurnError as error:
        logger.warning("eta %d failed: %s", eta, error)
        return {"failure": str(error)}
    columns = {name: [step[name] for step in turn.steps if name in step] for name in MEASURES}
    summary = {name: round(mean(values), 4) for name, values in columns.items() if values}
    summary["tokens_per_s"] = round(turn.tokens_per_s, 1)
    summary["paused_s"] = round(median(step["paused_s"] for step in turn.steps), 4)
    return {**summary, "steps": turn.steps}


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where, when and how the numbers were made."""
    import torch

    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMMIT", commit),
        "command": f"python benchmarks/gpu/async_vs_sync.py {' '.join(sys.argv[1:])}",
        "machine": f"{len(gpus)} x {gpus[0]}" if gpus else platform.processor(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "task": f"Qwen3-{args.shape} shape, random weights; {args.prompts} prompts x {args.answers} answers a step, lengths "
        f"lognormal with median {args.median_tokens} and sigma {args.sigma}, at most {args.max_tokens} tokens",
    }


def table(runs: dict[int, dict[str, Any]]) -> str:
    """Markdown, one line for each bound."""
    lines = [f"| eta | {' | '.join(MEASURES.values())} | x eta {next(iter(runs))} |", "|---" * (len(MEASURES) + 2) + "|"]
    base = next(iter(runs.values())).get("tokens_per_s")
    for eta, result in runs.items():
        cells = [f"{result[name]:,.4g}" if name in result else "-" for name in MEASURES]
        ratio = f"{result['tokens_per_s'] / base:.2f}" if base and "tokens_per_s" in result else "-"
        lines.append(f"| {eta} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines)


# -- one bound


class Lengths:
    """A workflow whose answers have lognormal lengths, whatever the model says.

    Args:
        median: of the length in tokens.
        sigma: of its logarithm.
        longest: most tokens.
    """

    def __init__(self, median: int, sigma: float, longest: int) -> None:
        self.median, self.sigma, self.longest = median, sigma, longest

    async def run(self, lease: Any, engine: Any, score: Any, decode: Any) -> Any:
        """See `Workflow.run`."""
        import numpy as np

        from rl_lightning.rollout.workflow import sample_seed
        from rl_lightning.types import GenerationRequest, Rollout, RolloutGroup

        async def answer(sample: int) -> Any:
            seed = sample_seed(lease.seed, lease.index, sample)
            drawn = self.median * math.exp(self.sigma * np.random.default_rng(seed).standard_normal())
            length = max(1, min(self.longest, round(drawn)))
            params = replace(lease.params, max_new_tokens=length, min_new_tokens=length)
            name = f"train-{lease.index}-{lease.submission}-{sample}"
            return await engine.generate(GenerationRequest(name, lease.prompt.token_ids, params, seed))

        completions = await asyncio.gather(*(answer(i) for i in range(lease.group_size)))
        rewards = [float(int(c.token_ids.sum()) % 2) for c in completions]  # anything with spread
        rollouts = [
            Rollout(c, "", reward, {}, np.ones(len(c), dtype=bool)) for c, reward in zip(completions, rewards, strict=True)
        ]
        return RolloutGroup(lease.index, lease.prompt, tuple(rollouts))


class RandomPrompts:
    """Prompts of 128 random tokens."""

    def __init__(self, size: int) -> None:
        self.size = size

    def setup(self, tokenizer: Any, /) -> None:
        """Nothing is read."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int, /) -> Any:
        import random

        from rl_lightning.types import Prompt

        return Prompt(str(i), "", tuple(random.Random(i).choices(range(3, 48), k=128)))


def no_reward(prompt: Any, answer: str) -> float:
    """The workflow scores."""
    return 0.0


def train(args: argparse.Namespace) -> None:
    """Trains at one bound and prints one line of JSON for every step."""
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module, data = make_parts(args)
    steps = args.warmup + args.steps
    trainer = pl.Trainer(
        accelerator="cpu" if args.cpu else "gpu",
        devices=1 if args.cpu else [1],
        max_steps=steps + args.etas[0] + 1,
        max_epochs=-1,
        precision="32-true" if args.cpu else "bf16-mixed",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[make_reports(steps)],
    )
    trainer.fit(module, datamodule=data)


def make_parts(args: argparse.Namespace) -> tuple[Any, Any]:
    """Module and data; Ray is told of one GPU, the first, and gives it to the engine. The trainer has the second."""
    from rl_lightning import AsyncPPOModule, RolloutDataModule
    from rl_lightning.engines.sglang import SGLangEngine
    from rl_lightning.modules.ppo_config import PPOConfig
    from rl_lightning.rewards.reward import WeightedReward
    from rl_lightning.types import SamplingParams

    on_gpu = {
        "mem_fraction_static": 0.7,
        "attention_backend": args.attention_backend,
        "cuda_graph_max_bs": 256,
        "cuda_graph_backend_prefill": "disabled",
        "mm_feature_transport": "cpu",
        "context_length": 4096,
    }
    ray_init: dict[str, Any] = {"address": "local", "include_dashboard": False, "object_store_memory": 500 * 2**20}
    ray_init |= {"num_cpus": 4, "num_gpus": 0 if args.cpu else 1, "_temp_dir": tempfile.mkdtemp(prefix="ray", dir="/tmp")}
    data = RolloutDataModule(
        RandomPrompts(args.prompts * 1000),
        [WeightedReward(no_reward)],
        args.model,
        batch_size=args.prompts,
        group_size=args.answers,
        generation=SamplingParams(max_new_tokens=args.max_tokens),
        engine=SGLangEngine(server_args={} if args.cpu else on_gpu),
        gpus_per_engine=0 if args.cpu else 1,
        max_head_offpolicyness=args.etas[0],
        max_concurrent_rollouts=args.prompts * 2,
        workflow=Lengths(args.median_tokens, args.sigma, args.max_tokens),
        ray_init=ray_init,
    )
    ppo = PPOConfig(n_minibatches=1, group_adv_norm=True)
    return AsyncPPOModule(args.model, ppo=ppo, max_tokens_per_mb=16384, gradient_checkpointing=not args.cpu), data


def make_reports(steps: int) -> Any:
    """The callback that prints every step and ends the run after `steps`, while the engine still has work."""
    import lightning.pytorch as pl

    class Reports(pl.Callback):
        def __init__(self) -> None:
            self.reporter = StepReporter()

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.reporter.restart()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen, synced = pl_module.step_statistics, trainer.callback_metrics
            agreement = {"logprob_diff": seen["engine_logprob_diff"]} if "engine_logprob_diff" in seen else {}
            self.reporter.step(
                len(batch.token_ids),
                seen["task_reward"],
                wait_s=batch.wait_s,
                update_s=seen["time/recompute"] + seen["time/update"],
                sync_s=float(synced.get("time/weight_sync", 0.0)),  # of the step before
                paused_s=float(synced.get("time/generation_paused", 0.0)),
                engine_idle=trainer.datamodule.statistics()["engine_idle_share"],
                staleness=seen["head_offpolicyness"],
                staleness_max=seen["head_offpolicyness_max"],
                **agreement,
            )
            trainer.should_stop = self.reporter.steps >= steps

    return Reports()


if __name__ == "__main__":
    main()
