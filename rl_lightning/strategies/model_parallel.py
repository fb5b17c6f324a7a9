"""RayModelParallelStrategy: a model cut into pieces over its ranks, in Ray actors."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from rl_lightning.strategies.environment import Placement
from rl_lightning.strategies.ranks import RayRanks

CPU_AND_GPU = "cpu:gloo,cuda:nccl"
"""Weights that wait on the CPU need sums there too."""


class RayModelParallelStrategy(RayRanks, ModelParallelStrategy):
    """Every rank holds a share of weights, gradients and optimiser: FSDP2 over the data-parallel ranks, each layer's matrices
    split over the tensor-parallel ones.

    `AsyncPPOModule` and `SFTModule` spread themselves in `configure_model`; other modules do so there with
    `self.device_mesh`, as for Lightning's own `ModelParallelStrategy`.

    Args:
        tensor_parallel_size: ranks that share every layer's matrices; must divide the ranks and the model's heads.
        cpu_offload: keep weights and optimiser in the machine's memory and bring a layer to the GPU while it runs.
        save_distributed_checkpoint: each rank saves its own share, and a checkpoint is a folder; false: one file, whole.
        num_workers: ranks, and with them the other options that follow: see `RayStrategy`.

    Raises:
        ValueError: a size that is not positive, or that does not divide the ranks.
    """

    strategy_name = "ray_model_parallel"

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
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
        process_group_backend: str | None = None,
    ) -> None:
        if tensor_parallel_size < 1 or (num_workers or tensor_parallel_size) % tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} of RayModelParallelStrategy must be at least 1 and divide the "
                f"number of ranks (num_workers={num_workers})"
            )
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        self.cpu_offload = cpu_offload
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
            placement=placement,
            return_weights=False,  # the driver's module is empty, and the whole model may fit nowhere
        )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How data is shared out: over the data-parallel ranks; the driver counts as the first."""
        if self._device_mesh is not None:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self.world_size // self._tensor_size, "rank": 0}

    def setup_environment(self) -> None:
        """Joins the process group and lays the ranks out in rows of `tensor_parallel_size`."""
        if self.world_size % self._tensor_size:
            raise ValueError(f"tensor_parallel_size={self._tensor_size} does not divide the {self.world_size} ranks")
        self._data_parallel_size = self.world_size // self._tensor_size
        super().setup_environment()

    @property
    def _tensor_size(self) -> int:
        assert isinstance(self._tensor_parallel_size, int), "the constructor takes a number"
        return self._tensor_parallel_size

    def model_to_device(self) -> None:
        """Moves what is not offloaded."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.root_device)

    def _setup_distributed(self) -> None:
        self.setup_distributed()

    def _get_process_group_backend(self) -> str:
        if self._process_group_backend is None and self.cpu_offload and self.root_device.type == "cuda":
            return CPU_AND_GPU
        return super()._get_process_group_backend()

    def _determine_device_ids(self) -> list[int]:
        return [self.root_device.index or 0]

    def barrier(self, name: str | None = None) -> None:
        """Waits for all ranks."""
        if torch.distributed.is_initialized() and torch.distributed.get_backend() != "nccl":
            torch.distributed.barrier()
        else:
            super().barrier(name)
