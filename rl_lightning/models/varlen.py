"""varlen_attention: causal attention over sequences that lie end to end, as one operator that torch.compile does not look into.

On CUDA it is the flash attention that PyTorch carries; keys and values may have fewer heads than queries. On a Hopper with
SGLang's kernels installed the forward pass is their FlashAttention 3, twice as fast, which has no backward pass. On the CPU
each sequence goes through PyTorch's CPU kernel, so that compiled models run there too. The longest length travels as a
tensor: as a number it would be part of the compiled code, which would be made again for the next batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

FLASH3_HEAD_DIMS = (64, 128, 256)
"""Those for which every build of it has a kernel."""


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Each token sees itself and the earlier tokens of its sequence. Differentiable.

    Args:
        query: (N, heads, head_dim); float16 or bfloat16 on CUDA.
        key: (N, kv_heads, head_dim).
        value: (N, kv_heads, head_dim).
        starts: (K + 1,) int32, where each sequence starts, and N.
        longest: () int64 on the CPU, at least the length of the longest sequence.
        scale: factor on the scores.
        window: a token sees only so many last positions, itself among them; None for all.

    Returns:
        (N, heads, head_dim).
    """
    return _attend(query, key, value, starts, longest, scale, -1 if window is None else window - 1)[0]


INPUTS = "Tensor query, Tensor key, Tensor value"
LAYOUT = "Tensor starts, Tensor longest, float scale, int reach"


@torch.library.custom_op("rl_lightning::varlen_attention", mutates_args=(), schema=f"({INPUTS}, {LAYOUT}) -> (Tensor, Tensor)")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: Tensor, scale: float, reach: int
) -> tuple[Tensor, Tensor]:
    """Output, and (heads, N) log of the partition sums; `reach` is how far back a token sees, -1 for all."""
    if query.is_cuda:
        most, span = int(longest), {"window_size_left": reach, "window_size_right": 0}
        if query.dtype == torch.bfloat16 and query.shape[2] in FLASH3_HEAD_DIMS and (flash3 := _flash3(query.device)):
            window = (reach, 0) if reach >= 0 else (-1, -1)
            options = {"softmax_scale": scale, "causal": True, "window_size": window, "return_softmax_lse": True}
            return flash3(query, key, value, starts, starts, most, most, **options)[:2]
        forward = aten._flash_attention_forward
        return forward(query, key, value, starts, starts, most, most, 0.0, reach < 0, False, scale=scale, **span)[:2]
    output, sums = torch.empty_like(query, memory_format=torch.contiguous_format), []
    for part in _parts(starts):
        q, k, v = _heads_first(query[part]), _heads_first(key[part], query), _heads_first(value[part], query)
        mask = _window_mask(q, reach)
        attended, normalizer = _cpu_forward(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
        output[part] = attended[0].transpose(0, 1)
        sums.append(normalizer[0])  # (heads, length)
    return output, torch.cat(sums, 1).to(_wide(query))


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: Tensor, scale: float, reach: int
) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    return output, query.new_empty((query.shape[1], query.shape[0]), dtype=_wide(query))


@torch.library.custom_op(
    "rl_lightning::varlen_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {INPUTS}, Tensor output, Tensor sums, {LAYOUT}) -> (Tensor, Tensor, Tensor)",
)
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    starts: Tensor,
    longest: Tensor,
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    if query.is_cuda:
        most, span = int(longest), {"window_size_left": reach, "window_size_right": 0}
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        saved = (grad, query, key, value, output, sums, starts, starts, most, most, 0.0, reach < 0, *no_dropout)
        return aten._flash_attention_backward(*saved, scale=scale, **span)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for part in _parts(starts):
        q, k, v = _heads_first(query[part]), _heads_first(key[part], query), _heads_first(value[part], query)
        mask, inputs = _window_mask(q, reach), (_heads_first(grad[part]), q, k, v, _heads_first(output[part]))
        normalizer = sums[:, part].unsqueeze(0)
        found = _cpu_backward(*inputs, normalizer, 0.0, mask is None, attn_mask=mask, scale=scale)
        for whole, share in zip(grads, found, strict=True):
            grouped = share[0].transpose(0, 1).unflatten(1, (whole.shape[1], -1))
            whole[part] = grouped.sum(2)
    return grads


@_attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    starts: Tensor,
    longest: Tensor,
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, starts, longest, ctx.scale, ctx.reach = inputs
    ctx.save_for_backward(query, key, value, *output, starts, longest)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _attend_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.reach)
    return (*found, None, None, None, None)


_attend.register_autograd(_differentiate, setup_context=_keep)

ATTENTION_OP = torch.ops.rl_lightning.varlen_attention.default
"""The operator, for policies of activation checkpointing."""

_cpu_forward = aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward


@cache
def _flash3(device: torch.device) -> Callable[..., Any] | None:
    """The forward pass of FlashAttention 3, None where it is not to be had."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _parts(starts: Tensor) -> list[slice]:
    bounds = starts.tolist()
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def _heads_first(x: Tensor, like: Tensor | None = None) -> Tensor:
    """(1, heads, length, head_dim) of (length, heads, head_dim), with as many heads as `like` has."""
    repeats = 1 if like is None else like.shape[1] // x.shape[1]
    return x.repeat_interleave(repeats, 1).transpose(0, 1).unsqueeze(0)


def _window_mask(query: Tensor, reach: int) -> Tensor | None:
    """(length, length) additive, None where plain causal attention does."""
    length = query.shape[2]
    if reach < 0 or reach >= length - 1:
        return None
    seen = torch.ones(length, length, dtype=torch.bool).tril_().triu_(-reach)
    return torch.zeros(length, length, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
