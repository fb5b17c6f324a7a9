"""One cell of `learning_matrix.py`: asynchronous PPO of a small imitator on one-digit sums, validated as it learns.

    python benchmarks/learning_cell.py --model FOLDER --eta 4 --loss decoupled --seed 1

Everything but these options is the same in every cell.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from echo_task import StepReporter

from rl_lightning import AsyncPPOModule, RolloutDataModule
from rl_lightning.engines.torch import TorchEngine
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.prompts.arithmetic import ArithmeticPrompts
from rl_lightning.rewards.exact import exact_match
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.types import Batch, SamplingParams

PROMPTS, ANSWERS, MINIBATCHES = 16, 8, 4
"""Of one training step. Each minibatch is an optimiser update, so that the ratio leaves 1 also where nothing is stale."""

STEPS, INTERVAL = 200, 20
"""Training steps, and those between two validations."""

LEARNING_RATE = 5e-4
VALIDATION = {"prompts": 128, "answers": 4}
LOSSES: dict[str, dict[str, Any]] = {
    "decoupled": {"use_decoupled_loss": True, "recompute_logprob": True},
    "plain": {"use_decoupled_loss": False, "recompute_logprob": False},
}
AVERAGED = ("head_offpolicyness", "importance_weight", "actor_clip_ratio", "entropy", "grad_norm")
"""Statistics whose mean over the steps since the last validation is reported."""


class Reports(pl.Callback):
    """Reports every validation of the newest weights, the one before training first, with the training steps before it."""

    def __init__(self, reporter: StepReporter) -> None:
        self.reporter = reporter
        self.trained: list[dict[str, float]] = []
        self.answers = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.trained.append(dict(pl_module.step_statistics))
        self.answers += batch.n_seqs

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps, self.trained = self.trained, []
        self.reporter.step(
            int(sum(step["n_valid_tokens"] for step in steps)),
            float(trainer.callback_metrics["val_reward"]),
            answers=self.answers,
            right=float(trainer.callback_metrics["val_accuracy"]),
            staleness_max=max((step["head_offpolicyness_max"] for step in steps), default=0.0),
            skipped=sum(step["skipped_minibatches"] for step in steps),
            **{name: fmean(step.get(name, 0.0) for step in steps) for name in AVERAGED if steps},
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the imitator")
    parser.add_argument("--eta", type=int, required=True, help="max_head_offpolicyness")
    parser.add_argument("--loss", choices=list(LOSSES), required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as ray_folder:
        train(args, ray_folder)


def train(args: argparse.Namespace, ray_folder: str) -> None:
    """All steps of a cell."""
    import ray
    import transformers

    pl.seed_everything(args.seed)
    reporter = StepReporter(
        lightning=pl.__version__, ray=ray.__version__, transformers=transformers.__version__, torch=torch.__version__
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=INTERVAL,
        num_sanity_val_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Reports(reporter)],
    )
    trainer.fit(make_module(args), datamodule=make_data(args, ray_folder))


def make_module(args: argparse.Namespace) -> AsyncPPOModule:
    """The model and what is optimised."""
    ppo = PPOConfig(n_minibatches=MINIBATCHES, **LOSSES[args.loss])
    return AsyncPPOModule(args.model, optimizer=OptimizerConfig(lr=LEARNING_RATE), ppo=ppo, seed=args.seed)


def make_data(args: argparse.Namespace, ray_folder: str) -> RolloutDataModule:
    """Sums, answered by an engine that may run as far ahead as eta allows."""
    return RolloutDataModule(
        ArithmeticPrompts(shots=0, size=STEPS * PROMPTS, seed=args.seed),
        [WeightedReward(exact_match)],
        args.model,
        batch_size=PROMPTS,
        group_size=ANSWERS,
        generation=SamplingParams(max_new_tokens=4),
        engine=TorchEngine(),
        max_head_offpolicyness=args.eta,
        max_concurrent_rollouts=PROMPTS * (args.eta + 1),
        seed=args.seed,
        validation_prompts=ArithmeticPrompts(shots=0, size=VALIDATION["prompts"], seed=1000),
        validation_group_size=VALIDATION["answers"],
        ray_init={
            "address": "local",
            "num_cpus": 4,
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
            "_temp_dir": ray_folder,
        },
    )


def settings() -> dict[str, Any]:
    """What all cells share, as plain data: a cell measured under other settings is another cell."""
    return {
        "prompts": PROMPTS, "answers": ANSWERS, "minibatches": MINIBATCHES, "steps": STEPS, "interval": INTERVAL,
        "lr": LEARNING_RATE, "validation": VALIDATION,
    }  # fmt: skip


if __name__ == "__main__":
    main()
