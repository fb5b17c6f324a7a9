"""Lets an SGLang server show sampled values of any parameter under its Hugging Face name, from all of its GPUs.

SGLang's own `/get_weights_by_name` knows only a few model families, turns whole matrices into lists and answers for one GPU.
Inside servers that were started by `sglang_server`, a request whose name begins with `SAMPLES` is answered here instead.
Added through SGLang's plugin hooks.

Every rank of the server gets the request and looks up what its shard holds of the sampled positions.  The ranks of later
pipeline stages get it only when the first stage has answered, so nobody can wait for all: each leaves its part in the
store of the server's process group, and the first rank answers with nothing until all parts are there; whoever wants to
know asks again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SAMPLES = "rl_lightning.samples"
"""Written before the question: JSON of `nonce` (new for every question) and `shapes` (full shape of each parameter)."""

TARGET = "sglang.srt.model_executor.model_runner_components.weight_exporter.WeightExporter.get_weights_by_name"

PACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Projections that SGLang keeps in one matrix, in this order of rows."""

STAGE_WAIT_S = 1.0
"""Longest wait for ranks that work on the question at the same time."""

Part = list[dict[int, float]]
"""For each parameter: index in the sample -> value, as far as one rank holds it."""


def register_probe() -> None:
    """Registers the hook; SGLang applies it when its scheduler starts."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, _answer, HookType.AROUND)


def _answer(original: Any, exporter: Any, name: str, truncate_size: int = 100) -> Any:
    """A list for each parameter, index and value by turns; an empty list where not all ranks have spoken yet."""
    marker, _, question = name.partition(" ")
    if marker != SAMPLES:
        return original(exporter, name, truncate_size)
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    asked = json.loads(question)
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    own = [held_values(exporter.get_model(), name, shape, rank, size) for name, shape in asked["shapes"].items()]
    parts = exchange_parts(asked["nonce"], own, stage_size=size)
    merged = [{index: value for part in parts for index, value in part[i].items()} for i in range(len(own))] if parts else []
    return [[float(x) for item in sorted(values.items()) for x in item] for values in merged]


def exchange_parts(nonce: str, own: Part, stage_size: int) -> list[Part]:
    """The parts of all ranks, on rank 0 and as soon as all are there; else nothing."""
    from torch import distributed
    from torch.distributed import distributed_c10d

    world = distributed.get_world_size() if distributed.is_initialized() else 1
    if world == 1:
        return [own]
    rank, store = distributed.get_rank(), distributed_c10d._get_default_store()
    keys = [f"{SAMPLES}/{i}" for i in range(world)]
    store.set(keys[rank], json.dumps({"nonce": nonce, "part": [list(values.items()) for values in own]}))
    if rank:
        return []
    deadline = time.monotonic() + STAGE_WAIT_S
    while len(parts := _parts(store, keys, nonce)) < stage_size and time.monotonic() < deadline:
        time.sleep(0.001)
    return parts if len(parts) == world else []


def _parts(store: Any, keys: Sequence[str], nonce: str) -> list[Part]:
    """Those that answer this question, not an earlier one."""
    spoken = [json.loads(store.get(key)) for key in keys if store.check([key])]
    return [[dict(items) for items in said["part"]] for said in spoken if said["nonce"] == nonce]


def held_values(model: nn.Module, name: str, shape: Sequence[int], rank: int, size: int) -> dict[int, float]:
    """What this rank's shard holds of a parameter's sample: index in the sample -> value.

    Args:
        model: of SGLang.
        name: of Hugging Face.
        shape: of the full parameter.
        rank, size: of tensor parallelism.
    """
    import torch

    from rl_lightning.weights.fingerprint import sampled_positions

    shard = find_parameter(model, name)
    if shard is None or shard.dim() != len(shape):
        return {}
    starts = shard_starts(shard.shape, shape, rank, size, _vocabulary_start(model, name))
    places = torch.tensor(sampled_positions(math.prod(shape)), dtype=torch.int64)
    local = torch.stack(torch.unravel_index(places, tuple(shape))) - torch.tensor(starts)[:, None]
    inside = ((local >= 0) & (local < torch.tensor(shard.shape)[:, None])).all(0)
    values = shard[tuple(local[:, inside].to(shard.device))].float().cpu().tolist()
    return dict(zip(inside.nonzero()[:, 0].tolist(), values, strict=True))


def shard_starts(
    shard: Sequence[int], full: Sequence[int], rank: int, size: int, vocabulary_start: int | None = None
) -> list[int]:
    """Where a rank's shard begins in the full parameter, by dimension. Fewer shards than ranks are copied to neighbours."""
    starts = []
    for dimension, (own, whole) in enumerate(zip(shard, full, strict=True)):
        if vocabulary_start is not None and dimension == 0:
            starts.append(vocabulary_start)
        else:
            starts.append(rank * max(1, whole // own) // size * own)
    return starts


def find_parameter(model: nn.Module, name: str) -> Tensor | None:
    """This rank's shard of the parameter with a Hugging Face `name`, or None."""
    own = dict(model.named_parameters())
    if name in own:
        return own[name].data
    module_name, _, kind = name.rpartition(".")
    parent, _, projection = module_name.rpartition(".")
    packed = f"{parent}.{PACKED.get(projection, '')}"
    if f"{packed}.{kind}" not in own:
        return None
    sizes = _row_counts(model.get_submodule(packed))
    place = [part for part, into in PACKED.items() if into == PACKED[projection]].index(projection)
    return own[f"{packed}.{kind}"].data[sum(sizes[:place]) : sum(sizes[: place + 1])]


def _vocabulary_start(model: nn.Module, name: str) -> int | None:
    """First token of this rank's rows, where the rows are tokens: SGLang pads them, so that shapes do not tell."""
    module: Any = model
    for step in name.split(".")[:-1]:
        module = getattr(module, step, None)
    indices = getattr(module, "shard_indices", None)
    return None if indices is None else int(indices.org_vocab_start_index)


def _row_counts(layer: Any) -> list[int]:
    """Rows of each projection in a packed layer of SGLang."""
    if hasattr(layer, "q_proj_shard_size"):
        return [layer.q_proj_shard_size, layer.kv_proj_shard_size, layer.kv_proj_shard_size]
    return list(layer.output_partition_sizes)
