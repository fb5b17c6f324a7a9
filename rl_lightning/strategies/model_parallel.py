"""RayModelParallelStrategy: a model cut into pieces over its ranks, in Ray actors."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

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
        **kwargs: of `RayRanks`, all but `return_weights`.

    Raises:
        ValueError: a size that is not positive, or that does not divide the ranks.
    """

    strategy_name = "ray_model_parallel"

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        num_workers = kwargs.get("num_workers")
        if tensor_parallel_size < 1 or (num_workers or tensor_parallel_size) % tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} of RayModelParallelStrategy must be at least 1 and divide the "
                f"number of ranks (num_workers={num_workers})"
            )
        super().__init__(
            data_parallel_size="auto",  # what tensor parallelism leaves of the ranks
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            return_weights=False,  # the driver's module is empty, and the whole model may fit nowhere
            **kwargs,
        )
        self.cpu_offload = cpu_offload

    def _configure_launcher(self) -> None:
        from rl_lightning.strategies.launcher import RayLauncher

        self._launcher = RayLauncher(self)

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
