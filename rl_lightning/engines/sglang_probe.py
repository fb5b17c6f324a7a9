"""Lets an SGLang server show the first values of any parameter under its Hugging Face name.

SGLang's own `/get_weights_by_name` knows only a few model families and turns whole matrices into lists.  Inside servers
that were started by `sglang_server`, a request whose name begins with `FIRST_VALUES` is answered here instead: for every
model family, and with as many values as were asked for.  Added through SGLang's plugin hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST_VALUES = "rl_lightning.first_values"
"""Written before the space-separated names of the parameters."""

TARGET = "sglang.srt.model_executor.model_runner_components.weight_exporter.WeightExporter.get_weights_by_name"

PACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Projections that SGLang keeps in one matrix, in this order of rows."""


def register_probe() -> None:
    """Registers the hook; SGLang applies it when its scheduler starts."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, _answer, HookType.AROUND)


def _answer(original: Any, exporter: Any, name: str, truncate_size: int = 100) -> Any:
    marker, _, names = name.partition(" ")
    if marker != FIRST_VALUES:
        return original(exporter, name, truncate_size)
    found = [find_parameter(exporter.get_model(), each) for each in names.split()]
    return [[] if tensor is None else tensor.reshape(-1)[:truncate_size].float().cpu().tolist() for tensor in found]


def find_parameter(model: nn.Module, name: str) -> Tensor | None:
    """This rank's part of the parameter with a Hugging Face `name`, or None; a view, first values first."""
    own = dict(model.named_parameters())
    if name == "lm_head.weight" and name not in own:
        name = "model.embed_tokens.weight"
    if name in own:
        return own[name].data
    module_name, _, kind = name.rpartition(".")
    parent, _, projection = module_name.rpartition(".")
    packed = f"{parent}.{PACKED.get(projection, '')}"
    if f"{packed}.{kind}" not in own:
        return None
    sizes = _row_counts(model.get_submodule(packed))
    order = [part for part, into in PACKED.items() if into == PACKED[projection]]
    return own[f"{packed}.{kind}"].data[sum(sizes[: order.index(projection)]) :]


def _row_counts(layer: Any) -> list[int]:
    """Rows of each projection in a packed layer of SGLang."""
    if hasattr(layer, "q_proj_shard_size"):
        return [layer.q_proj_shard_size, layer.kv_proj_shard_size, layer.kv_proj_shard_size]
    return list(layer.output_partition_sizes)
