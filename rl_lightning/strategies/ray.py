"""RayStrategy: data-parallel training in Ray actors, beside the engines and wherever the cluster has room."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from rl_lightning.strategies.ranks import RayRanks


class RayStrategy(RayRanks, DDPStrategy):
    """Runs `fit`, `validate`, `test` and `predict` in Ray actors, one per rank, over gloo (CPU) or NCCL (GPU).

    The options are those of `RayRanks`, which says what the driver does meanwhile, then those of DDPStrategy and of torch's
    DistributedDataParallel.
    """

    strategy_name = "ray"

    def _configure_launcher(self) -> None:
        from rl_lightning.strategies.launcher import RayLauncher

        self._launcher = RayLauncher(self)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How data is shared out."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def configure_ddp(self) -> None:
        """A single rank needs no gradient buckets."""
        if self.world_size > 1:
            super().configure_ddp()
