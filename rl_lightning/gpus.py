"""`run.allocation_mode` on the command line: which options follow from it."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from rl_lightning.strategies.allocation import check_size, check_supported, parse_allocation


def apply_allocation(config: Any) -> None:
    """Sets `data.num_engines` and the strategy's size from `run.allocation_mode`.

    Raises:
        ValueError: the mode does not parse, does not fit the GPUs asked for, or contradicts another option.
    """
    mode = config.run.allocation_mode
    allocation = parse_allocation(mode)
    check_size(allocation, config.run.n_nodes, config.run.n_gpus_per_node)
    check_supported(allocation)
    data = config.data.get("init_args", Namespace())
    if "num_engines" in data:
        if allocation.generation is None:
            raise ValueError(
                f"run.allocation_mode={mode} has no generation part, which {config.data.class_path} needs: "
                f"write sglang.d1p1m1+{mode}"
            )
        data.num_engines = _agreed("data.num_engines", data.num_engines, allocation.generation.data, (1,), mode)
    strategy = config.trainer.strategy
    if strategy == "ray":
        strategy = config.trainer.strategy = Namespace(
            class_path="rl_lightning.strategies.ray.RayStrategy", init_args=Namespace()
        )
    if not isinstance(strategy, str) and "RayStrategy" in strategy.class_path:
        init = strategy.init_args
        init.num_workers = _agreed("num_workers of RayStrategy", init.get("num_workers"), allocation.training.size, (None,), mode)
    else:
        config.trainer.devices = _agreed("trainer.devices", config.trainer.devices, allocation.training.size, ("auto",), mode)


def _agreed(option: str, value: Any, needed: int, free: tuple[Any, ...], mode: str) -> int:
    if value not in (*free, needed):
        raise ValueError(
            f"run.allocation_mode={mode} needs {option}={needed}, but it is set to {value}: leave one of the two out"
        )
    return needed
