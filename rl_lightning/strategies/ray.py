"""RayStrategy: data-parallel training in Ray actors, beside the engines and wherever the cluster has room."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from rl_lightning.strategies.environment import Placement
from rl_lightning.strategies.ranks import RayRanks


class RayStrategy(RayRanks, DDPStrategy):
    """Runs `fit`, `validate`, `test` and `predict` in Ray actors, one per rank, over gloo (CPU) or NCCL (GPU).

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
        return_weights: whether the driver's module gets the trained weights. Modules built in `configure_model` are
            empty on the driver and get none: use a checkpoint.
        process_group_backend: of torch.distributed; None is gloo or nccl.
        **kwargs: of DDPStrategy and of torch's DistributedDataParallel.

    Raises:
        ValueError: a size that is not positive.
    """

    strategy_name = "ray"

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
        super().__init__(process_group_backend=process_group_backend, timeout=timedelta(seconds=collective_timeout_s), **kwargs)
        self.configure_ranks(
            num_workers=num_workers,
            num_cpus_per_worker=num_cpus_per_worker,
            num_gpus_per_worker=num_gpus_per_worker,
            address=address,
            ray_init=ray_init,
            env_vars=env_vars,
            start_timeout_s=start_timeout_s,
            stop_timeout_s=stop_timeout_s,
            collective_timeout_s=collective_timeout_s,
            return_weights=return_weights,
            placement=placement,
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How data is shared out."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def configure_ddp(self) -> None:
        """A single rank needs no gradient buckets."""
        if self.world_size > 1:
            super().configure_ddp()
