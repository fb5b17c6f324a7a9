"""packed_attention: attention over a flat micro-batch that never crosses sequences.

Registered with transformers under `PACKED_ATTENTION`, so that every model that uses its attention interface takes it.
The layout reaches it as the keyword `layout` of the model's forward:

    model(input_ids=tokens[None], position_ids=layout.positions[None], layout=layout, use_cache=False)

Half precision on CUDA, and compiled layers on the CPU, go through `varlen_attention`; everything else, and shared prompts under
a sliding window, through `scaled_dot_product_attention` over the layout's blocks, which torch.compile leaves out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_lightning.batching.layout import PackedLayout
from rl_lightning.models.varlen import varlen_attention

PACKED_ATTENTION = "rl_lightning_packed"

HALVES = (torch.float16, torch.bfloat16)
"""What flash attention computes in on CUDA."""


def register_packed_attention() -> str:
    """Makes `PACKED_ATTENTION` known to transformers and returns it. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    return PACKED_ATTENTION


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, in the signature that transformers calls.

    Args:
        module: the attention layer.
        query: (1, heads, N, head_dim).
        key: (1, kv_heads, N, head_dim).
        value: (1, kv_heads, N, head_dim).
        attention_mask: None with a layout, which says which token sees which.
        scaling: factor on the scores.
        sliding_window: a token sees only so many last positions.
        layout: of the N tokens; without one the tokens are plain causal sequences.

    Returns:
        (1, N, heads, head_dim) and None (no attention weights).

    Raises:
        ValueError: the layer asks for soft-capping, attention sinks or a mask of its own, which packed attention does not have.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__} asks for soft-capped attention or attention sinks, which packed attention lacks"
        )
    if layout is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} chooses what a token sees by a mask of its own, which packed attention lacks")
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    fused = query.dtype in HALVES if query.is_cuda else torch.compiler.is_compiling()
    if not fused or (sliding_window is not None and layout.shared):
        return _block_attention(*rows, layout, scale, sliding_window).unsqueeze(0), None
    return varlen_attention(*rows, layout.spans, scale, sliding_window).unsqueeze(0), None


@torch.compiler.disable
def _block_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float, window: int | None) -> Tensor:
    """Attention of rows (N, heads, head_dim) block by block."""
    outputs = []
    for block, bias in zip(layout.blocks, layout.biases(window, query.dtype), strict=True):
        q, k, v = query[block.queries], key[block.keys], value[block.keys]
        heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        output = F.scaled_dot_product_attention(*heads_first, bias, is_causal=bias is None, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.inverse)
