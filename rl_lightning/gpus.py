"""`run.allocation_mode` on the command line: which options follow from it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace

from rl_lightning.strategies.allocation import Allocation, check_heads, check_size, check_supported, parse_allocation

SGLANG, TORCH = "rl_lightning.engines.sglang.SGLangEngine", "rl_lightning.engines.torch.TorchEngine"
RAY, RAY_MODEL_PARALLEL = "rl_lightning.strategies.ray.RayStrategy", "rl_lightning.strategies.RayModelParallelStrategy"

TRAINER_SHARE, ENGINE_SHARE = 0.6, 0.4
"""Of a GPU, for Ray. Two trainer ranks do not fit on one: ranks, which are placed first, leave room for an engine on each."""

NAMED = {"ray": RAY, "ray_model_parallel": RAY_MODEL_PARALLEL}

T = TypeVar("T", int, float)

logger = logging.getLogger(__name__)


def apply_allocation(config: Any) -> None:
    """Sets engines, their GPUs and the strategy's size from `run.allocation_mode`.

    Raises:
        ValueError: the mode does not parse, does not fit the GPUs asked for or the model, or contradicts another option.
    """
    mode = config.run.allocation_mode
    allocation = parse_allocation(mode)
    check_size(allocation, config.run.n_nodes, config.run.n_gpus_per_node)
    check_supported(allocation)
    model_config = _model_config(config)
    if model_config is not None:
        check_heads(allocation, model_config)
    data = config.data.get("init_args", Namespace())
    if "num_engines" in data:
        if allocation.generation is None:
            raise ValueError(
                f"run.allocation_mode={mode} has no generation part, which {config.data.class_path} needs: "
                f"write sglang.d1p1m1+{mode}"
            )
        if allocation.colocated and config.run.n_nodes > 1:
            raise ValueError(
                f"run.allocation_mode={mode} has engines beside ranks on n_nodes={config.run.n_nodes} nodes, where weights reach "
                f"only those of the first rank's node: give each side GPUs of its own with '+', or take one node"
            )
        _apply_generation(data, allocation, mode)
        if config.trainer.accelerator != "cpu":
            _apply_engine_gpus(data, allocation, mode)
    _apply_training(config.trainer, allocation, mode)


def leave_gpus_to_ranks(trainer: Any) -> None:
    """Has ranks in Ray actors ask for GPUs that this machine, a cluster's head for example, lacks: Lightning refuses them.

    Args:
        trainer: its options.
    """
    import torch

    if trainer.accelerator not in ("cuda", "gpu") or torch.cuda.is_available():
        return
    if isinstance(strategy := trainer.strategy, str):
        if strategy not in NAMED:
            return
        strategy = trainer.strategy = Namespace(class_path=NAMED[strategy], init_args=Namespace())
    if strategy.class_path.rpartition(".")[2].startswith("Ray"):
        trainer.accelerator = "auto"
        if strategy.init_args.get("num_gpus_per_worker") is None:
            strategy.init_args.num_gpus_per_worker = 1.0


def _apply_generation(data: Any, allocation: Allocation, mode: str) -> None:
    layout = allocation.generation
    assert layout is not None
    data.num_engines = _agreed("data.num_engines", data.num_engines, layout.data, (1,), mode)
    gpus = layout.tensor * layout.pipeline
    if allocation.colocated and layout.data > 1 and data.weight_transport == "auto":
        data.weight_transport = "disk"  # each engine sees another GPU than the one that rank 0 has its weights on
    if data.engine == "auto":
        data.engine = Namespace(class_path=TORCH if allocation.engine == "torch" else SGLANG, init_args=Namespace())
    if data.engine.class_path == SGLANG:
        _apply_server_sizes(data.engine.init_args, layout.tensor, layout.pipeline, mode)
        if allocation.colocated:
            data.engine.init_args.colocated = True
    elif gpus > 1:
        raise ValueError(
            f"run.allocation_mode={mode} wants engines of {gpus} GPUs, which only SGLangEngine spans, but data.engine is "
            f"{data.engine.class_path}: write d{layout.size}p1m1, or data.engine: {SGLANG}"
        )


def _apply_engine_gpus(data: Any, allocation: Allocation, mode: str) -> None:
    """What Ray is asked for; an engine of one GPU is what the data module asks for by itself."""
    layout = allocation.generation
    assert layout is not None
    needed = ENGINE_SHARE if allocation.colocated else layout.tensor * layout.pipeline
    if needed != 1:
        data.gpus_per_engine = _agreed("data.gpus_per_engine", data.gpus_per_engine, needed, (None,), mode)


def _apply_server_sizes(init: Any, tensor: int, pipeline: int, mode: str) -> None:
    from rl_lightning.engines.sglang_args import PIPELINE_SIZE, TENSOR_SIZE, parallel_sizes

    args = dict(init.get("server_args") or {})
    for names, given, needed in zip((TENSOR_SIZE, PIPELINE_SIZE), parallel_sizes(args), (tensor, pipeline), strict=True):
        if any(name.replace("-", "_") in names for name in args):
            _agreed(f"{names[0]} in data.engine.server_args", given, needed, (), mode)
        elif needed > 1:
            args[names[0]] = needed
    if args:
        init.server_args = args


def _apply_training(trainer: Any, allocation: Allocation, mode: str) -> None:
    layout, strategy = allocation.training, trainer.strategy
    if strategy in ("ray", "ray_model_parallel"):
        split = layout.tensor > 1 or strategy == "ray_model_parallel"
        strategy = trainer.strategy = Namespace(class_path=RAY_MODEL_PARALLEL if split else RAY, init_args=Namespace())
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if layout.tensor > 1 and name != "RayModelParallelStrategy":
        raise ValueError(
            f"run.allocation_mode={mode} splits every layer over m{layout.tensor} ranks, which trainer.strategy={name} does not: "
            f"set trainer.strategy=ray_model_parallel, or write d{layout.size}p1m1"
        )
    if isinstance(strategy, str) or not name.startswith("Ray"):
        trainer.devices = _agreed("trainer.devices", trainer.devices, layout.size, ("auto",), mode)
        return
    init = strategy.init_args
    init.num_workers = _agreed(f"num_workers of {name}", init.get("num_workers"), layout.size, (None,), mode)
    if allocation.colocated and trainer.accelerator != "cpu":
        given = init.get("num_gpus_per_worker")
        init.num_gpus_per_worker = _agreed(f"num_gpus_per_worker of {name}", given, TRAINER_SHARE, (None,), mode)
    if name == "RayModelParallelStrategy":
        given = init.get("tensor_parallel_size")
        init.tensor_parallel_size = _agreed(f"tensor_parallel_size of {name}", given, layout.tensor, (None, 1), mode)


def _model_config(config: Any) -> Any:
    """The language model's configuration, None where it cannot be had without a network."""
    path = config.model.get("init_args", Namespace()).get("path")
    if not isinstance(path, str) or (Path(path).is_dir() and not (Path(path) / "config.json").exists()):
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    except (OSError, ValueError) as error:
        logger.debug("the heads of %s are not compared with run.allocation_mode: %s", path, error)
        return None


def _agreed(option: str, value: Any, needed: T, free: tuple[Any, ...], mode: str) -> T:
    if value not in (*free, needed):
        raise ValueError(
            f"run.allocation_mode={mode} needs {option}={needed}, but it is set to {value}: leave one of the two out"
        )
    return needed
