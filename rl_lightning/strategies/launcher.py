"""RayLauncher: runs a trainer's function in Ray actors, as if it ran here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from ray.util.placement_group import PlacementGroup, remove_placement_group

from rl_lightning.strategies import cluster
from rl_lightning.strategies.channel import start_channel
from rl_lightning.strategies.companion import Companion, find_companion
from rl_lightning.strategies.demand import ROUNDING, Demand, await_resources
from rl_lightning.strategies.empty_driver import check_start, note_end
from rl_lightning.strategies.group import GroupSettings, WorkerGroup
from rl_lightning.strategies.job import Job, make_job, worker_environment
from rl_lightning.strategies.progress import ProgressView
from rl_lightning.strategies.result import RunResult, restore
from rl_lightning.strategies.stop_signals import StopSignals
from rl_lightning.strategies.watch import Patience, Watch

if TYPE_CHECKING:
    from rl_lightning.strategies.ranks import RayRanks

logger = logging.getLogger(__name__)


class RayLauncher(_Launcher):
    """Created by RayStrategy on the driver; `launch` blocks until the run is over.

    Args:
        strategy: whose options it follows.
    """

    def __init__(self, strategy: RayRanks) -> None:
        self._strategy = strategy

    @property
    def is_interactive_compatible(self) -> bool:
        """Works in notebooks."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Runs `function` in every rank and brings rank 0's results, metrics, progress and callback states back.

        Raises:
            RayWorkerError: a rank failed; names it and its cause.
            ValueError: the module was trained before, and no checkpoint is named to go on with.
            KeyboardInterrupt, SIGTERMException: the driver got the signal; everything has ended.
        """
        assert trainer is not None, "Lightning gives its trainer to every launcher"
        with StopSignals() as signals:
            try:
                result = self._run(trainer, function, args, kwargs, signals)
                if result is not None:
                    restore(trainer, result)
                    note_end(trainer.lightning_module, fitted=trainer.state.fn == TrainerFn.FITTING)
                signals.check()
            except BaseException:
                self._strategy.set_callbacks_aside(trainer)
                if signals.received is not None:
                    cluster.disconnect()
                raise
        assert result is not None
        return result.results

    def kill(self, signum: int) -> None:
        """Nothing: the signals of a run are handled inside `launch`, and no process outlives it."""

    def _run(
        self, trainer: Trainer, function: Callable[..., Any], args: Any, kwargs: Any, signals: StopSignals
    ) -> RunResult | None:
        """Rank 0's result; None where the run was stopped and had to be killed."""
        check_start(trainer.lightning_module, function, args, kwargs)
        companion = find_companion((*args, *kwargs.values()))
        if companion is not None:
            companion.check_on_driver(trainer)
        job = make_job(trainer, (function, args, kwargs), self._strategy.return_weights)
        cluster.connect(self._strategy.ray_init, signals.check)
        signals.install()
        signals.check()
        demand = None if companion is None else companion.demand()
        settings = self._group_settings(demand)
        logger.info("starting %s", settings)
        demands = [settings.demand, *([demand] if demand is not None else [])]
        await_resources(demands, settings.start_timeout_s, signals.check)

        def start_companion(places: PlacementGroup) -> Any:
            if companion is None:
                return None
            return companion.start_on_driver(signals.check, places if settings.beside else None)

        try:
            result = self._train(settings, job, signals, start_companion)
        except BaseException as error:
            self._release(companion, error)
            raise
        self._release(companion, signals.exception() if result is None else None)
        return result

    def _group_settings(self, companion: Demand | None) -> GroupSettings:
        strategy = self._strategy
        beside = companion.each if companion is not None and companion.beside_ranks else {}
        apart = strategy.gpus_per_worker + beside.get("GPU", 0.0) > 1 + ROUNDING  # on GPUs of their own
        return GroupSettings(
            num_workers=strategy.num_processes,
            num_cpus=strategy.num_cpus_per_worker,
            num_gpus=strategy.gpus_per_worker,
            env={**worker_environment(), **strategy.env_vars},
            start_timeout_s=strategy.start_timeout_s,
            placement=strategy.placement,
            beside={} if apart else beside,
        )

    def _train(
        self, settings: GroupSettings, job: Job, signals: StopSignals, start_companion: Callable[[PlacementGroup], Any]
    ) -> RunResult | None:
        channel = start_channel(settings.num_workers)
        try:
            reserved, self._strategy.reserved = self._strategy.reserved, None
            group = WorkerGroup(settings, signals.check, reserved)
            self._strategy.reserved = group.bundles
            try:
                shared = start_companion(group.bundles)
                group.await_workers()
                return self._watch(group, channel, replace(job, shared=shared), signals)
            finally:
                group.stop()
        finally:
            ray.kill(channel)

    def _release(self, companion: Companion | None, error: BaseException | None) -> None:
        """Gives the places of the ranks back, unless the companion waits for another attempt."""
        kept = companion is not None and companion.end_on_driver(error)
        if self._strategy.reserved is not None and not kept:
            remove_placement_group(self._strategy.reserved)
            self._strategy.reserved = None

    def _watch(self, group: WorkerGroup, channel: Any, job: Job, signals: StopSignals) -> RunResult | None:
        ranks = group.ranks(self._strategy.collective_timeout_s)
        reference = ray.put(job)
        runs = {group.workers[rank.index].run.remote(reference, rank, channel): rank.index for rank in ranks}
        patience = Patience(self._strategy.stop_timeout_s, self._strategy.collective_timeout_s)
        watch = Watch(runs, group.places, channel, signals, patience, ProgressView())
        try:
            return watch.until_over()
        finally:
            watch.close()
