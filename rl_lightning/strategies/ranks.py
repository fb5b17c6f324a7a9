"""RayRanks: what every Ray strategy shares, whatever its ranks then do with the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ParallelStrategy

from rl_lightning.strategies.empty_driver import check_saved
from rl_lightning.strategies.environment import Placement, Rank, RayEnvironment, become_rank
from rl_lightning.strategies.progress import replace_bars

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from rl_lightning.strategies.events import EventSender
    from rl_lightning.strategies.stop_gate import StopGate


class RayRanks(ParallelStrategy):
    """Mixed in before one of Lightning's parallel strategies, has its ranks run in Ray actors, over gloo (CPU) or NCCL (GPU).

    The driver joins or starts a Ray cluster, shows the progress and the log of rank 0, and gets results, metrics, callback
    states and counters back, so that the trainer can be asked afterwards as if it had trained itself.  If a rank fails,
    the others are ended and one RayWorkerError names it.  Ctrl-C or SIGTERM at the driver lets the ranks finish
    their step and raises in all of them at the same one, so that callbacks can save.

    Args:
        num_workers: ranks; None is what the trainer's `devices` and `num_nodes` say.
        num_cpus_per_worker: Ray CPUs that each worker takes, above 0.
        num_gpus_per_worker: Ray GPUs that each takes; None is 1 if the trainer's accelerator is CUDA, else 0.
        address: `local` starts a Ray cluster on this machine, `auto` joins the one that runs on it, `host:port` that one;
            null is the environment variable RAY_ADDRESS, else a cluster that runs here is joined or one is started.
        ray_init: other arguments of `ray.init`.
        env_vars: environment variables of the workers.
        placement: of the ranks: on as few nodes as can be (`PACK`) or on one (`STRICT_PACK`), over as many as can be
            (`SPREAD`) or each on another one (`STRICT_SPREAD`). Engines take what the ranks have left.
        start_timeout_s: longest time until all workers are up.
        stop_timeout_s: longest time between a signal and the end of the workers.
        collective_timeout_s: longest time for one collective operation.
        return_weights: whether the driver's module gets the trained weights. Modules built in `configure_model`, as
            AsyncPPOModule and SFTModule, are empty on the driver and get none: use a checkpoint.
        process_group_backend: of torch.distributed; None is gloo or nccl.
        **kwargs: of Lightning's strategy.

    Attributes:
        reserved: the ranks' places on the cluster, kept on the driver between an attempt that failed and the next one.

    Raises:
        ValueError: a size that is not positive.
    """

    num_nodes: int
    _process_group_backend: str | None
    _get_process_group_backend: Callable[[], str]

    def __init__(
        self,
        num_workers: int | None = None,
        num_cpus_per_worker: float = 1.0,
        num_gpus_per_worker: float | None = None,
        address: str | None = None,
        ray_init: dict[str, Any] | None = None,
        env_vars: dict[str, str] | None = None,
        placement: Placement = "PACK",
        start_timeout_s: float = 300.0,
        stop_timeout_s: float = 8.0,
        collective_timeout_s: float = 1800.0,
        return_weights: bool = True,
        process_group_backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("num_workers", num_workers), ("num_cpus_per_worker", num_cpus_per_worker)):
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} of {type(self).__name__} must be above 0")
        timeout = timedelta(seconds=collective_timeout_s)
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **kwargs)  # type: ignore[call-arg]
        self.cluster_environment = RayEnvironment()
        self.num_workers = num_workers
        self.num_cpus_per_worker, self.num_gpus_per_worker = num_cpus_per_worker, num_gpus_per_worker
        self.ray_init: Mapping[str, Any] = {**(ray_init or {}), **({} if address is None else {"address": address})}
        self.env_vars: Mapping[str, str] = dict(env_vars or {})
        self.start_timeout_s, self.stop_timeout_s = start_timeout_s, stop_timeout_s
        self.collective_timeout_s = collective_timeout_s
        self.return_weights, self.placement = return_weights, placement
        self.reserved: PlacementGroup | None = None
        self._rank: Rank | None = None
        self._store: torch.distributed.Store | None = None
        self._sender: EventSender | None = None
        self._gate: StopGate | None = None
        self._aside: tuple[list[Callback], list[Callback]] | None = None

    # -- driver and workers

    @property
    def num_processes(self) -> int:
        """Number of ranks."""
        if self._rank is not None:
            return self._rank.world_size
        return self.num_workers or len(self.parallel_devices or [None]) * self.num_nodes

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_processes

    @property
    def gpus_per_worker(self) -> float:
        """Ray GPUs of each worker."""
        if self.num_gpus_per_worker is not None:
            return self.num_gpus_per_worker
        return 1.0 if isinstance(self.accelerator, CUDAAccelerator) else 0.0

    @property
    def root_device(self) -> torch.device:
        """The worker's device: Ray shows each worker its own GPU only. On the driver always the CPU."""
        return torch.device("cuda", 0) if self._rank is not None and self.gpus_per_worker else torch.device("cpu")

    def set_world_ranks(self) -> None:
        """Ranks are the launcher's business."""
        become_rank(self.global_rank)

    # -- driver

    def adopt(self, before: RayRanks) -> None:
        """Takes the places that the strategy of a failed attempt has kept."""
        self.reserved, before.reserved = before.reserved, None

    def set_callbacks_aside(self, trainer: Trainer) -> None:
        """Keeps the driver's callbacks from `on_exception`: they have had it in the workers, and here they would save nothing."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._aside = callbacks, list(callbacks)
        callbacks.clear()

    def on_exception(self, exception: BaseException) -> None:
        """Lightning calls this right after the callbacks' `on_exception`."""
        if self._aside is not None:
            emptied, callbacks = self._aside
            emptied[:], self._aside = callbacks, None
        super().on_exception(exception)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As in Lightning's strategy; on the driver only of a module that has its weights there."""
        if self._rank is None:
            check_saved(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def __getstate__(self) -> dict[str, Any]:
        """The launcher stays on the driver; in a worker, `trainer.validate()` runs in place."""
        return {**self.__dict__, "_launcher": None}

    # -- workers

    def enter_worker(self, rank: Rank, store: torch.distributed.Store | None, sender: EventSender, gate: StopGate) -> None:
        """Makes this copy the strategy of one rank.

        Args:
            rank: which one.
            store: of the process group, if this rank holds it.
            sender: carries events to the driver.
            gate: stops training when the driver asks for it.
        """
        self._rank, self._store, self._sender, self._gate = rank, store, sender, gate
        self.cluster_environment = RayEnvironment(rank)
        self.parallel_devices = [self.root_device]
        if self.root_device.type == "cuda" and isinstance(self.accelerator, CPUAccelerator):
            self._adopt_gpu()

    def setup_environment(self) -> None:
        """Joins the process group."""
        assert self._sender is not None and self._gate is not None and self.lightning_module is not None
        trainer: Trainer = self.lightning_module.trainer
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self._gate not in callbacks:
            replace_bars(trainer, self._sender)
            callbacks.insert(0, self._gate)
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Initialises torch.distributed over the store that rank 0 has held open since before it was known to the others."""
        assert self._rank is not None
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        if torch.distributed.is_initialized():
            return
        timeout = timedelta(seconds=self.collective_timeout_s)
        store = self._store or torch.distributed.TCPStore(
            self._rank.address, self._rank.port, self._rank.world_size, is_master=False, timeout=timeout
        )
        torch.distributed.init_process_group(
            self._process_group_backend,
            store=store,
            rank=self._rank.index,
            world_size=self._rank.world_size,
            timeout=timeout,
            device_id=self.root_device if self.root_device.type == "cuda" else None,
        )

    def teardown(self) -> None:
        """Lets the optimisers go: Lightning would copy their state to the CPU, tens of GB that end with this process."""
        self.optimizers = []
        super().teardown()

    def _adopt_gpu(self) -> None:
        """The driver had no GPU, so Lightning chose for the CPU."""
        self.accelerator = CUDAAccelerator()
        if isinstance(self.precision_plugin, MixedPrecision):
            self.precision_plugin.device = "cuda"
