"""The turns of `async_vs_sync.py`, one after another in one process: each side alone, then the loop at every bound.

Prints a line of JSON for every step, and one that ends or fails a turn.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from long_tail import LongTail, RandomPrompts, no_reward
from quiet_trainer import quiet_trainer

from rl_lightning import AsyncPPOModule, RolloutDataModule
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.rewards.reward import WeightedReward
from rl_lightning.strategies.cluster import connect, disconnect
from rl_lightning.types import Batch, SamplingParams

logger = logging.getLogger("async_vs_sync_turns")

ENGINE_ALONE, TRAINER_ALONE = "engine alone", "trainer alone"
ALONE_S = 25.0
"""Most seconds of a turn of one side alone, from its first measured step on: layers compile in the first steps."""

CACHE_KEPT = " cache kept"
"""Ends the name of a turn in which answers keep their keys and values over weight updates."""

KEPT = 8
"""Batches of the engine's turn that the trainer's turn trains on, again and again."""

UNBOUNDED = 10**6
STUCK_S = 100.0
"""Time-out of whatever waits inside a turn: a turn that is stuck fails and the next one begins."""


class Untrained(AsyncPPOModule):
    """Takes batches and counts steps, and that is all: what is measured is the engine and the path of its answers."""

    def configure_callbacks(self) -> Sequence[pl.Callback]:
        """No weights are sent."""
        return [Announcer()]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing is learnt."""
        with self.one_counted_step():
            pass


class Announcer(pl.Callback):
    """Tells the controller that the engine's weights are those of every step."""

    def on_train_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        self._announce(trainer, trainer.datamodule.fleet.wait_for_workers())

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *args: Any) -> None:
        self._announce(trainer, trainer.datamodule.fleet.call("workers"))

    def _announce(self, trainer: Any, workers: Sequence[tuple[str, Any]]) -> None:
        trainer.datamodule.fleet.call("publish", trainer.global_step, [name for name, _ in workers])


class Replay:
    """The same batches again and again, none of them waited for. It has a length, as rollouts have."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return UNBOUNDED

    def __iter__(self) -> Iterator[Batch]:
        return (replace(batch, wait_s=0.0) for batch in itertools.cycle(self.batches))


class Reports(pl.Callback):
    """Prints what each step took; ends the turn after `steps` measured ones, or with the first that is over time.

    Args:
        turn: its name.
        warmup: steps that are not measured.
        steps: measured ones, at most.
        seconds: of the turn.
        keep: list that gets the last batches, if any are wanted.
    """

    def __init__(self, turn: str, warmup: int, steps: int, seconds: float, keep: list[Batch] | None = None) -> None:
        self.turn, self.warmup, self.steps, self.seconds, self.keep = turn, warmup, steps, seconds, keep
        self.number, self.busy_s, self.last_s, self.deadline = 0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last_s = time.monotonic()
        self.deadline = self.last_s + self.seconds

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, self.number = time.monotonic(), self.number + 1
        if self.number == self.warmup and self.turn in (ENGINE_ALONE, TRAINER_ALONE):
            self.deadline = now + self.seconds
        seconds, self.last_s = now - self.last_s, now
        line = {"seconds": seconds, "tokens": len(batch.token_ids), "answer_tokens": int(batch.loss_mask.sum())}
        line |= {"wait_s": batch.wait_s, **training_times(trainer, pl_module), **self.idleness(trainer, seconds)}
        line = {name: round(value, 4) for name, value in line.items()}
        report(turn=self.turn, step=self.number, measured=self.number > self.warmup, **line)
        if self.keep is not None:
            self.keep[:] = [*self.keep, batch][-KEPT:]
        is_over = self.number >= self.warmup + self.steps or (now > self.deadline and self.number > self.warmup)
        trainer.should_stop = trainer.should_stop or is_over

    def idleness(self, trainer: Any, seconds: float) -> dict[str, float]:
        """Share of the step in which the engine had nothing to do; its counters come once a second."""
        if trainer.datamodule is None:
            return {}
        busy_s = trainer.datamodule.statistics()["engine_busy_s"]
        spent, self.busy_s = busy_s - self.busy_s, busy_s
        return {"engine_idle_s": seconds - spent}


def training_times(trainer: Any, pl_module: Any) -> dict[str, float]:
    """Seconds and versions of the step that ended; of the weights' way, those of the step before."""
    seen, synced = pl_module.step_statistics, trainer.callback_metrics
    if not seen:
        return {}
    training = {"update_s": seen["time/recompute"] + seen["time/update"], "graphs": seen["compiled_graphs"]}
    if trainer.datamodule is None:
        return training
    names = {"staleness": "head_offpolicyness", "staleness_max": "head_offpolicyness_max", "logprob_diff": "engine_logprob_diff"}
    return {
        **training,
        "sync_s": float(synced.get("time/weight_sync", 0.0)),
        "paused_s": float(synced.get("time/generation_paused", 0.0)),
        **{name: seen[source] for name, source in names.items() if source in seen},
    }


def report(**line: Any) -> None:
    """One line of JSON, at once."""
    print(json.dumps(line), flush=True)


def run_turns(args: argparse.Namespace, ends_at: float) -> None:
    """All turns, the time until `ends_at` (of time.monotonic) divided among those that are left."""
    torch.set_num_threads(1 if args.cpu else 8)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ray_init = {"address": "local", "num_cpus": 8, "num_gpus": 0, "include_dashboard": False}
    connect({**ray_init, "object_store_memory": 500 * 2**20, "_temp_dir": args.ray_folder})
    kept: list[Batch] = []
    turns = [ENGINE_ALONE, TRAINER_ALONE, *map(str, args.etas), *(f"{eta}{CACHE_KEPT}" for eta in args.kept)]
    for place, turn in enumerate(turns):
        seconds = (ends_at - time.monotonic()) / (len(turns) - place) - args.between_s
        started = time.monotonic()
        try:
            run_turn(args, turn, seconds, kept)
            report(turn=turn, took_s=round(time.monotonic() - started, 1))
        except Exception as error:  # the other turns are worth having
            logger.exception("turn %s failed", turn)
            report(turn=turn, failure=f"{type(error).__name__}: {error}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    disconnect()


def run_turn(args: argparse.Namespace, turn: str, seconds: float, kept: list[Batch]) -> None:
    """One turn of `seconds`, counted from the first step on."""
    if turn == ENGINE_ALONE:
        reports = Reports(turn, args.warmup, args.steps, min(seconds, ALONE_S), keep=kept)
        make_trainer(args, reports).fit(make_module(args, Untrained), datamodule=make_data(args, UNBOUNDED))
    elif turn == TRAINER_ALONE:
        reports = Reports(turn, 2, args.steps, min(seconds, ALONE_S))
        make_trainer(args, reports).fit(make_module(args, AsyncPPOModule), train_dataloaders=Replay(kept))
    else:
        eta, keep = int(turn.removesuffix(CACHE_KEPT)), turn.endswith(CACHE_KEPT)
        reports = Reports(turn, args.warmup if eta else 1, args.steps, seconds)
        make_trainer(args, reports).fit(make_module(args, AsyncPPOModule), datamodule=make_data(args, eta, keep_cache=keep))


def make_trainer(args: argparse.Namespace, reports: Reports) -> pl.Trainer:
    """The trainer has the second GPU, or the only one."""
    devices = 1 if args.cpu else [args.trainer_gpu]
    return quiet_trainer(args.cpu, [reports], args.weights == "float32", devices=devices, max_steps=UNBOUNDED)


def make_module(args: argparse.Namespace, kind: type[AsyncPPOModule]) -> AsyncPPOModule:
    """One update a batch, so that pi_prox needs no pass of its own."""
    ppo = PPOConfig(n_minibatches=1, group_adv_norm=True)
    return kind(
        args.model,
        ppo=ppo,
        max_tokens_per_mb=args.max_tokens_per_mb,
        dtype=args.weights,
        gradient_checkpointing=args.checkpointing,
    )


def make_data(args: argparse.Namespace, eta: int, *, keep_cache: bool = False) -> RolloutDataModule:
    """The engine is the server that runs already."""
    engine = SGLangEngine(url=args.url, api_key=args.api_key, keep_cache=keep_cache, start_timeout_s=300, sync_timeout_s=60)
    return RolloutDataModule(
        RandomPrompts(args.prompts * 10_000),
        [WeightedReward(no_reward)],
        args.model,
        batch_size=args.prompts,
        group_size=args.answers,
        generation=SamplingParams(max_new_tokens=args.max_tokens),
        engine=engine,
        gpus_per_engine=0,
        max_head_offpolicyness=eta,
        max_concurrent_rollouts=args.in_flight,
        workflow=LongTail(args.median_tokens, args.sigma, args.max_tokens),
        weight_transport=args.transport,
        sync_timeout_s=60,
        batch_timeout_s=STUCK_S,
    )
