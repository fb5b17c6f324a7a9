"""A small model learns on one GPU, asynchronously and synchronously: share of right answers over wall time.

    python benchmarks/gpu/learning.py
    python benchmarks/gpu/learning.py --plot docs/benchmarks/gpu_learning.json    # draws again, on any machine

3 M parameters from scratch on sums of reasoning-gym's `basic_arithmetic`: imitation until a quarter of the sampled answers
are right, then PPO with the engine on the same GPU, at eta 4 and at eta 0, from the same weights, over the same prompts and as
many steps. One SGLang server, which starts while the imitator learns, serves both runs. A run of one step comes before them,
in which kernels compile. Validation is part of the wall time.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from gpu_machine import describe_machine, write_results  # noqa: E402
from learning_imitator import TASK, TASK_OPTIONS, TEMPLATE, imitate, write_model  # noqa: E402
from quiet_trainer import quiet_trainer  # noqa: E402
from shared_server import ON_GPU, SharedServer  # noqa: E402

from rl_lightning import AsyncPPOModule, RolloutDataModule  # noqa: E402
from rl_lightning.engines.engine import Engine  # noqa: E402
from rl_lightning.engines.sglang import SGLangEngine  # noqa: E402
from rl_lightning.engines.torch import TorchEngine  # noqa: E402
from rl_lightning.modules.optimizer import OptimizerConfig  # noqa: E402
from rl_lightning.modules.ppo_config import PPOConfig  # noqa: E402
from rl_lightning.prompts.gym import GymPrompts  # noqa: E402
from rl_lightning.rewards.exact import exact_match  # noqa: E402
from rl_lightning.rewards.reward import WeightedReward  # noqa: E402
from rl_lightning.strategies.cluster import connect, disconnect  # noqa: E402
from rl_lightning.types import Batch, SamplingParams  # noqa: E402

logger = logging.getLogger("learning")

COLOURS = {4: "tab:blue", 0: "tab:orange"}
ANSWER_TOKENS, MINIBATCHES = 8, 2
WARMUP = 0.1
"""Share of the steps in which the rate rises: the first batches all come from the same weights, and Adam knows nothing yet."""

BETWEEN_S = 12.0
"""Seconds that a run takes to start and to end."""


class Curve(pl.Callback):
    """Seconds since the start and what was right then, by step and by validation; ends the run after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []
        self.started_s: float | None = None

    @property
    def now_s(self) -> float:
        """0 before training starts."""
        return 0.0 if self.started_s is None else round(time.monotonic() - self.started_s, 3)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started_s = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        seen = pl_module.step_statistics
        names = ("success_rate", "head_offpolicyness", "head_offpolicyness_max", "importance_weight", "entropy", "grad_norm")
        line = {
            "step": trainer.global_step,
            "seconds": self.now_s,
            "wait_s": batch.wait_s,
            **{n: seen[n] for n in names if n in seen},
        }
        line["update_s"] = seen["time/recompute"] + seen["time/update"]
        line["sync_s"] = float(trainer.callback_metrics.get("time/weight_sync", 0.0))  # of the step before
        self.steps.append({name: round(value, 4) for name, value in line.items()})
        trainer.should_stop = trainer.should_stop or self.now_s > self.seconds

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        self.validations.append({"step": trainer.global_step, "seconds": self.now_s, "accuracy": round(accuracy, 4)})
        logger.info("step %d, %.1f s: %.3f right", trainer.global_step, self.now_s, accuracy)


def main() -> None:
    """The command line."""
    started = time.monotonic()
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if args.plot is not None:
        plot(json.loads(args.plot.read_text()), args.plot.with_suffix(".png"))
        return
    torch.set_num_threads(1 if args.cpu else 8)
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model = write_model(folder / "random", cpu=args.cpu)
        if args.cpu:
            learn(args, folder, model, TorchEngine(), started)
            return
        server_args = {**ON_GPU, "context_length": 256, "mem_fraction_static": 0.3}
        with SharedServer(model, args.log, 0, server_args) as server:
            engine = SGLangEngine(url=server.url, api_key=server.api_key, sync_timeout_s=60)
            learn(args, folder, model, engine, started)


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--etas", type=int, nargs="+", default=[4, 0])
    parser.add_argument("--steps", type=int, default=200, help="of reinforcement learning, for each eta")
    parser.add_argument("--prompts", type=int, default=64, help="per step")
    parser.add_argument("--answers", type=int, default=8, help="to each prompt")
    parser.add_argument("--lr", type=float, default=1e-4, help="3e-4 is too much: some runs forget what imitation taught")
    parser.add_argument("--target", type=float, default=0.25, help="share of right answers at which imitation ends")
    parser.add_argument("--sft-seconds", type=float, default=110.0, help="at most")
    parser.add_argument("--validate-every", type=int, default=10, help="steps")
    parser.add_argument("--budget-s", type=float, default=460.0, help="seconds of the whole program")
    parser.add_argument("--cpu", action="store_true", help="try the program on a machine without GPUs, with TorchEngine")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw what was measured before")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "learning.server", help="of the server")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu_learning.json")
    return parser.parse_args()


def learn(args: argparse.Namespace, folder: Path, model: Path, engine: Engine, started: float) -> None:
    """Imitation, then every run, the time that is left divided among them; JSON after each."""
    document: dict[str, Any] = {**describe_machine("learning.py", 0 if args.cpu else 1), "settings": settings(args), "runs": {}}
    document["imitation"] = imitate(model, folder / "imitator", target=args.target, seconds=args.sft_seconds, cpu=args.cpu)
    logger.info("imitation: %s", document["imitation"]["curve"][-1:])
    save(args, document)
    ray_init = {"address": "local", "num_cpus": 8, "num_gpus": 0, "include_dashboard": False}
    connect({**ray_init, "object_store_memory": 200 * 2**20, "_temp_dir": str(folder / "ray")})
    one_step = argparse.Namespace(**{**vars(args), "steps": 1, "validate_every": 1})
    run(one_step, folder / "imitator", engine, 0, Curve(0.0))  # kernels compile here
    for place, eta in enumerate(args.etas):
        left_s = args.budget_s - (time.monotonic() - started)
        curve = Curve(left_s / (len(args.etas) - place) - BETWEEN_S)
        try:
            run(args, folder / "imitator", engine, eta, curve)
        except Exception as error:  # the other run is worth having
            logger.exception("eta %d failed", eta)
            document["runs"][eta] = {"failure": f"{type(error).__name__}: {error}"}
        document["runs"].setdefault(eta, {}).update(validations=curve.validations, steps=curve.steps)
        save(args, document)
        gc.collect()
    disconnect()
    if importlib.util.find_spec("matplotlib") is not None:
        plot(json.loads(args.out.read_text()), args.out.with_suffix(".png"))


def run(args: argparse.Namespace, model: Path, engine: Engine, eta: int, curve: Curve) -> None:
    """PPO at one eta, to the last step or as long as there is time."""
    pl.seed_everything(1)
    ppo = PPOConfig(n_minibatches=MINIBATCHES, group_adv_norm=True)
    optimizer = OptimizerConfig(lr=args.lr, schedule="linear", warmup_steps_proportion=WARMUP)
    module = AsyncPPOModule(str(model), optimizer=optimizer, ppo=ppo, compile=False)  # which takes longer than it saves here
    validation: dict[str, Any] = {"val_check_interval": args.validate_every, "num_sanity_val_steps": 1}
    trainer = quiet_trainer(args.cpu, [curve], max_steps=args.steps, **validation)
    trainer.fit(module, datamodule=make_data(args, model, engine, eta))


def make_data(args: argparse.Namespace, model: Path, engine: Engine, eta: int) -> RolloutDataModule:
    """The task, without the questions of imitation."""
    return RolloutDataModule(
        GymPrompts(TASK, size=args.steps * args.prompts, seed=21, options=TASK_OPTIONS, template=TEMPLATE),
        [WeightedReward(exact_match)],
        str(model),
        batch_size=args.prompts,
        group_size=args.answers,
        generation=SamplingParams(max_new_tokens=ANSWER_TOKENS),
        engine=engine,
        gpus_per_engine=0,
        max_head_offpolicyness=eta,
        max_concurrent_rollouts=args.prompts // 2 if eta else args.prompts,  # fewer to interrupt; a batch at once at eta 0
        weight_transport="auto" if args.cpu else "disk",
        batch_timeout_s=120,
        validation_prompts=GymPrompts(TASK, size=256, seed=22, options=TASK_OPTIONS, template=TEMPLATE),
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What both runs share."""
    names = ("steps", "prompts", "answers", "lr", "validate_every")
    return {"task": TASK, "options": TASK_OPTIONS, **{name: getattr(args, name) for name in names}}


def save(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """JSON and table of what there is."""
    picture = f"![share of right answers over seconds and steps]({args.out.stem}.png)"
    write_results(args.out, document, "Learning on one GPU", about(args, document["imitation"]), table(document["runs"]), picture)
    logger.info("\n%s\n", table(document["runs"]))


def about(args: argparse.Namespace, imitation: dict[str, Any]) -> str:
    """What was done, in a paragraph."""
    end, size = imitation["curve"][-1], imitation["parameters"] / 1e6
    return (
        f"A model of {size:.1f} M parameters, from scratch on sums of two numbers of two digits, reasoning-gym's `{TASK}`. "
        f"Imitation ended after {end['seconds']:.0f} s, at a mean probability of the right answer of {end['accuracy']:.2f}. Then "
        f"PPO, {args.prompts} prompts x {args.answers} answers and {MINIBATCHES} updates a step, learning rate {args.lr:g} after "
        f"a warm-up and falling to 0, engine and trainer on one device. Right is the share of 256 questions of another seed, "
        f"of 8,100 that there are, answered once each; validation is part of the seconds."
    )


def table(runs: dict[Any, dict[str, Any]]) -> str:
    """Markdown, one line for each run."""
    lines = [
        "| eta | steps | seconds | s/step | right before | right after | seconds to .5 | to .8 | staleness at most |",
        "|---" * 9 + "|",
    ]
    for eta, measured in runs.items():
        steps, validations = measured["steps"], measured["validations"]
        if not steps or not validations:
            lines.append(f"| {eta} |{' - |' * 8}")
            continue
        seconds, oldest = steps[-1]["seconds"], max(step["head_offpolicyness_max"] for step in steps)
        reached = [next((f"{v['seconds']:.1f}" for v in validations if v["accuracy"] >= share), "-") for share in (0.5, 0.8)]
        mean_s, ends = seconds / len(steps), f"{validations[0]['accuracy']:.3f} | {validations[-1]['accuracy']:.3f}"
        lines.append(f"| {eta} | {len(steps)} | {seconds:.1f} | {mean_s:.2f} | {ends} | {' | '.join(reached)} | {oldest:.0f} |")
    return "\n".join(lines)


def plot(document: dict[str, Any], path: Path) -> None:
    """Share right over wall time, validations as a line and the steps' own answers as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for eta, measured in document["runs"].items():
        for panel, axis in zip(panels, ("seconds", "step"), strict=True):
            validations, steps, colour = measured["validations"], measured["steps"], COLOURS.get(int(eta), "tab:green")
            panel.plot([v[axis] for v in validations], [v["accuracy"] for v in validations], color=colour, label=f"eta {eta}")
            panel.scatter([s[axis] for s in steps], [s["success_rate"] for s in steps], color=colour, s=6, alpha=0.3)
    for panel, label in zip(panels, ("seconds of training", "training steps"), strict=True):
        panel.set(xlabel=label, ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share right, sampled")
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
