"""Where training runs: RayStrategy, also by name as `Trainer(strategy="ray")`."""

from lightning.pytorch.strategies import StrategyRegistry

from rl_lightning.strategies.ray import RayStrategy

if "ray" not in StrategyRegistry:
    StrategyRegistry.register("ray", RayStrategy, description="Data-parallel training in Ray actors")

__all__ = ["RayStrategy"]
