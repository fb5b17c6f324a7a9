"""Where training runs: RayStrategy and RayModelParallelStrategy, also by name as `Trainer(strategy="ray")`."""

from lightning.pytorch.strategies import StrategyRegistry

from rl_lightning.strategies.model_parallel import RayModelParallelStrategy
from rl_lightning.strategies.ray import RayStrategy

if "ray" not in StrategyRegistry:
    StrategyRegistry.register("ray", RayStrategy, description="Data-parallel training in Ray actors")
    StrategyRegistry.register(
        "ray_model_parallel", RayModelParallelStrategy, description="FSDP2 and tensor-parallel training in Ray actors"
    )

__all__ = ["RayModelParallelStrategy", "RayStrategy"]
