"""The benchmark's task in rl_lightning: asynchronous PPO with one update per batch and group advantages.

python benchmarks/rl_lightning_loop.py --model FOLDER --steps 12 --engine torch --eta 2
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import tempfile
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while an engine works are many times slower

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from echo_task import ANSWERS, LEARNING_RATE, NEW_TOKENS, PROMPTS, StepReporter, prompt_texts, share_of_first_letter

from rl_lightning import AsyncPPOModule, RolloutDataModule
from rl_lightning.modules.optimizer import OptimizerConfig
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.types import Batch, Prompt, SamplingParams


class EchoPrompts:
    """The task's prompts, tokenised."""

    def __init__(self, steps: int) -> None:
        self.texts = prompt_texts(steps)

    def setup(self, tokenizer: Any, /) -> None:
        self.ids = [tuple(ids) for ids in tokenizer(self.texts, add_special_tokens=False)["input_ids"]]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int, /) -> Prompt:
        return Prompt(str(i), self.texts[i], self.ids[i])


def reward(prompt: Prompt, answer: str) -> float:
    """The task's reward."""
    return share_of_first_letter(prompt.text, answer)


class Reports(pl.Callback):
    """Reports every step, and where its time went; ends the run after `steps`, while the engines still have work."""

    def __init__(self, reporter: StepReporter, steps: int) -> None:
        self.reporter, self.steps = reporter, steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reporter.restart()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        measured = pl_module.step_statistics
        self.reporter.step(
            int(batch.loss_mask.sum()),
            measured["task_reward"],
            wait_s=batch.wait_s,
            update_s=measured["time/recompute"] + measured["time/update"],
            sync_s=float(trainer.callback_metrics.get("time/weight_sync", 0.0)),  # of the step before
            staleness=measured["head_offpolicyness"],
        )
        trainer.should_stop = self.reporter.steps >= self.steps


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--engine", choices=["torch", "sglang"], default="torch")
    parser.add_argument("--eta", type=int, default=0, help="max_head_offpolicyness")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of the trainer")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as ray_folder:
        train(args, ray_folder)


def train(args: argparse.Namespace, ray_folder: str) -> None:
    """Runs `args.steps` steps of one optimiser update each."""
    import ray
    import transformers

    max_steps = args.steps + args.eta + 1
    data = RolloutDataModule(
        EchoPrompts(max_steps),
        [WeightedReward(reward)],
        args.model,
        batch_size=PROMPTS,
        group_size=ANSWERS,
        generation=SamplingParams(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS),
        engine=make_engine(args.engine),
        num_engines=args.engines,
        max_head_offpolicyness=args.eta,
        ray_init={"address": "local", "num_cpus": 4, "object_store_memory": 100 * 2**20, "_temp_dir": ray_folder},
    )
    module = AsyncPPOModule(
        args.model,
        optimizer=OptimizerConfig(lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        ppo=PPOConfig(n_minibatches=1, group_adv_norm=True),
    )
    reporter = StepReporter(
        **engine_version(args.engine),
        lightning=pl.__version__,
        ray=ray.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        threads=args.threads,
        engines=args.engines,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Reports(reporter, args.steps)],
    )
    trainer.fit(module, datamodule=data)


def make_engine(name: str) -> Any:
    """The engine called `torch` or `sglang`."""
    if name == "torch":
        from rl_lightning.engines.torch import TorchEngine

        return TorchEngine()
    from rl_lightning.engines.sglang import SGLangEngine

    return SGLangEngine()


def engine_version(name: str) -> dict[str, str]:
    """SGLang's version where it is the engine."""
    return {"sglang": importlib.metadata.version("sglang")} if name == "sglang" else {}


if __name__ == "__main__":
    main()
