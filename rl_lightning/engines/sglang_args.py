"""The command line of an SGLang server."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_lightning.engines.sglang_server import API_KEY

logger = logging.getLogger(__name__)

SERVER_MODULE = "rl_lightning.engines.sglang_server"

EVERYWHERE: dict[str, Any] = {
    "host": "127.0.0.1",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "log_level": "warning",
    "log_level_http": "error",
    "skip_server_warmup": True,  # we sample a token; its greedy one slows the sampling of all beside it
}

ON_CPU: dict[str, Any] = {
    "attention_backend": "torch_native",
    "disable_overlap_schedule": True,  # overlap is for a device beside the CPU; on the CPU it ends the server
    "sleep_on_idle": True,  # else the scheduler keeps a core busy doing nothing
    "max_total_tokens": 32768,  # else the KV cache takes most of the machine's memory
}

SOCKET_FOLDER = 80
"""Longest folder, in characters, in which the server can make its sockets."""

TENSOR_SIZE = ("tp_size", "tensor_parallel_size", "tp")
PIPELINE_SIZE = ("pp_size", "pipeline_parallel_size", "pp")
DATA_SIZE = ("dp_size", "data_parallel_size", "dp")
"""What SGLang calls the three, the usual name first."""

SHARED_FRACTION, SHARED_FRACTION_KEPT = 0.4, 0.2
"""Part of the GPU for weights and KV cache of a server beside a trainer: where it can let go of it, and where it cannot."""

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables with settings of PyTorch's allocator."""

OWNED = ("model_path", "port", "host", "api_key", "admin_api_key", "device", "dtype")
"""Arguments that SGLangEngine has settings for, or must choose itself."""


def check_server_args(server_args: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments that the engine sets itself, and for servers of several copies, which take no weights."""
    if clash := [name for name in server_args if name.replace("-", "_") in OWNED]:
        raise ValueError(
            f"server_args must not contain {', '.join(clash)}: SGLangEngine sets that; use its own arguments instead"
        )
    if (copies := _size(server_args, DATA_SIZE)) > 1:
        raise ValueError(
            f"SGLangEngine cannot bring new weights into the {copies} copies of a server with {DATA_SIZE[0]}={copies}: leave it "
            f"out of server_args and have so many engines (data.num_engines)"
        )


def server_command(model_path: str, port: int, device: str, dtype: str, server_args: Mapping[str, Any]) -> list[str]:
    """Program and arguments. `server_args` win over our defaults and are otherwise passed on as they are.

    True becomes a bare flag; False and None leave the argument out; a list becomes several words.
    """
    chosen = {
        **EVERYWHERE,
        **(ON_CPU if device == "cpu" else {}),
        **{name.replace("-", "_"): value for name, value in server_args.items()},
        "model_path": model_path,
        "port": port,
        "device": device,
        "dtype": dtype,
    }
    words = [word for name, value in chosen.items() for word in _flag(name, value)]
    return [sys.executable, "-m", SERVER_MODULE, *words]


def parallel_sizes(server_args: Mapping[str, Any]) -> tuple[int, int]:
    """(tensor, pipeline) parallel size that `server_args` ask for.

    Raises:
        ValueError: one of them is not a positive number, or is given under two names.
    """
    tensor, pipeline = (_size(server_args, names) for names in (TENSOR_SIZE, PIPELINE_SIZE))
    return tensor, pipeline


def _size(server_args: Mapping[str, Any], names: Sequence[str]) -> int:
    given = {name: value for name, value in server_args.items() if name.replace("-", "_") in names and value is not None}
    if len(given) > 1 or not all(str(value).isdecimal() and int(value) for value in given.values()):
        raise ValueError(f"server_args has {given}: give {names[0]} once, as a whole number above 0")
    return int(next(iter(given.values()), 1))


def pick_device(device: str) -> str:
    """`device`, or what this machine has."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> str:
    """`dtype`, or what suits the device."""
    return dtype if dtype != "auto" else "float32" if device == "cpu" else "bfloat16"


def transports_for(url: str | None, device: str, server_args: Mapping[str, Any], *, colocated: bool) -> tuple[str, ...]:
    """Weight transports of a server, owned if `url` is None: those that it can receive, preferred first."""
    _, pipeline_size = parallel_sizes(server_args)
    if pipeline_size > 1:
        return ("disk",)  # SGLang's pipeline stages cannot join a process group
    if colocated:
        return ("tensor", "disk")  # NCCL takes a GPU only once
    if url is None and pick_device(device) == "cpu":
        return ("disk", "tensor", "distributed")  # memory files are faster than gloo
    return ("distributed", "disk", "tensor")


def saver_installed() -> bool:
    """Whether SGLang can give memory back and take it again."""
    return importlib.util.find_spec("torch_memory_saver") is not None


def sharing_args(device: str, *, saver: bool) -> dict[str, Any]:
    """Arguments of a server that shares its GPU with a trainer."""
    if device == "cpu":
        return {}
    if saver:
        return {"enable_memory_saver": True, "mem_fraction_static": SHARED_FRACTION}
    logger.warning(
        "torch_memory_saver is not installed: SGLang keeps its memory while the trainer works, and by default takes %g of the "
        "GPU for weights and KV cache (mem_fraction_static in server_args)",
        SHARED_FRACTION_KEPT,
    )
    return {"mem_fraction_static": SHARED_FRACTION_KEPT}


def server_env(device: str, api_key: str, folder: Path, n_ranks: int = 1, *, saver: bool = False) -> dict[str, str]:
    """Changes to the environment that a server needs.

    Args:
        device: `cuda` or `cpu`.
        api_key: see `SGLangProcess`.
        folder: for what it leaves behind, save for compiled kernels.
        n_ranks: processes that compute.
        saver: it shall be able to let go of its memory, which torch_memory_saver refuses beside expandable segments.
    """
    env = {
        API_KEY: api_key,
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"
        ),
    }
    if len(str(folder)) <= SOCKET_FOLDER:
        env["TMPDIR"] = str(folder)
    if saver:
        chosen = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
        env |= {name: re.sub(r"(expandable_segments\s*:)\s*\w+", r"\1False", value) for name, value in chosen.items()}
    return env | (_cpu_env(n_ranks) if device == "cpu" else {})


def _cpu_env(n_ranks: int) -> dict[str, str]:
    env = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    if n_ranks == 1:
        return env
    cores = sorted(os.sched_getaffinity(0))
    # Split embeddings are compiled, which wants a real triton.
    return {
        **env,
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[i % len(cores)]) for i in range(n_ranks)),
    }


def _flag(name: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return [flag]
    return [flag, *map(str, value)] if isinstance(value, list | tuple) else [flag, str(value)]
