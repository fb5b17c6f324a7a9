"""Asynchronous reinforcement learning of language models for people who know `Trainer.fit`.

Importing this package is cheap: torch, Lightning, Ray and the engines load when a name that needs them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_lightning.modules.async_ppo import AsyncPPOModule as AsyncPPOModule
    from rl_lightning.modules.sft import SFTModule as SFTModule
    from rl_lightning.rollout.datamodule import RolloutDataModule as RolloutDataModule
    from rl_lightning.strategies.ray import RayStrategy as RayStrategy

__version__ = "0.1.0"

_HOME = {
    "AsyncPPOModule": "rl_lightning.modules.async_ppo",
    "SFTModule": "rl_lightning.modules.sft",
    "RolloutDataModule": "rl_lightning.rollout.datamodule",
    "RayStrategy": "rl_lightning.strategies.ray",
}

__all__ = ["AsyncPPOModule", "RayStrategy", "RolloutDataModule", "SFTModule", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads a public class from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'rl_lightning' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
