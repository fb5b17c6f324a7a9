"""varlen_attention: causal attention over segments that lie end to end, as one operator that torch.compile does not look into.

On CUDA it is the flash attention that PyTorch carries; keys and values may have fewer heads than queries. On a Hopper with
SGLang's kernels installed the forward pass is their FlashAttention 3, twice as fast, which has no backward pass. On the CPU
each segment goes through PyTorch's CPU kernel, so that compiled models run there too. On a Hopper the backward pass is cuDNN's
where its frontend for Python is installed.

Answers that share a prompt see it in a second call of the same kernel, all answers of a group at once and without a mask. What
both calls give is merged by their partition sums; the backward pass of each gets the merged output and sums, as in ring
attention (arXiv 2310.01889), and their gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_lightning.batching.spans import Spans
from rl_lightning.models.ragged_backward import has_ragged_backward, ragged_backward

aten = torch.ops.aten

FLASH3_HEAD_DIMS = (64, 128, 256)
"""Those for which every build of it has a kernel."""


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float, window: int | None = None) -> Tensor:
    """Each token sees itself, the earlier tokens of its segment and the prompt that the segment answers. Differentiable.

    Args:
        query: (N, heads, head_dim); float16 or bfloat16 on CUDA.
        key: (N, kv_heads, head_dim).
        value: (N, kv_heads, head_dim).
        spans: the segments of the N tokens.
        scale: factor on the scores.
        window: a token sees only so many last positions, itself among them; None for all.

    Returns:
        (N, heads, head_dim).

    Raises:
        ValueError: `window` where prompts are shared, for which there is no kernel.
    """
    return _attend(query, key, value, list(spans), scale, -1 if window is None else window - 1)[0]


class _Call(NamedTuple):
    """One call of a kernel: rows of queries and of keys, cut into as many segments of each that see each other.

    Attributes:
        queries: rows of all queries.
        keys: rows of all keys and values.
        query_starts: int32 on the device, from the first of these rows on.
        key_starts: likewise.
        most_queries: of a segment.
        most_keys: of a segment.
        causal: both are the same rows, and a query sees no later key; otherwise it sees all of its segment.
        scale: factor on the scores.
        reach: how far back a query sees, -1 for all.
    """

    queries: slice
    keys: slice
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int
    causal: bool
    scale: float
    reach: int = -1


def _within_segments(spans: Spans, scale: float, reach: int) -> _Call:
    longest, everything = int(spans.longest), slice(None)
    return _Call(everything, everything, spans.starts, spans.starts, longest, longest, True, scale, reach)


def _to_prompts(spans: Spans, scale: float, reach: int) -> _Call | None:
    """Answers to their prompts; None where no prompt is shared."""
    n_groups, n_prompt_tokens = int(spans.n_groups), int(spans.n_prompt_tokens)
    if not n_groups:
        return None
    if reach >= 0:
        raise ValueError("there is no kernel for a sliding window over shared prompts: set share_prompts=False")
    answers = slice(n_prompt_tokens, n_prompt_tokens + int(spans.n_answer_tokens))
    starts = spans.answer_starts[: n_groups + 1], spans.prompt_starts[: n_groups + 1]
    most = max(2, int(spans.longest_answers))  # with one query a segment PyTorch's kernel would return sums in another shape
    return _Call(answers, slice(n_prompt_tokens), *starts, most, int(spans.longest_prompt), False, scale)


INPUTS = "Tensor query, Tensor key, Tensor value"
LAYOUT = "Tensor[] spans, float scale, int reach"


@torch.library.custom_op("rl_lightning::varlen_attention", mutates_args=(), schema=f"({INPUTS}, {LAYOUT}) -> (Tensor, Tensor)")
def _attend(query: Tensor, key: Tensor, value: Tensor, spans: list[Tensor], scale: float, reach: int) -> tuple[Tensor, Tensor]:
    """Output, and (heads, N) log of the partition sums; `reach` is how far back a token sees, -1 for all.

    Contiguous, whatever the kernel: compiled code counts on what `register_fake` says.
    """
    output, sums = _forward(query, key, value, _within_segments(Spans(*spans), scale, reach))
    to_prompts = _to_prompts(Spans(*spans), scale, reach)
    if to_prompts is not None:
        answers = to_prompts.queries
        _merge(output[answers], sums[:, answers], *_forward(query, key, value, to_prompts))
    return output.contiguous(), sums


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, spans: list[Tensor], scale: float, reach: int) -> tuple[Tensor, Tensor]:
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
    spans: list[Tensor],
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous."""
    saved = grad, query, key, value, output, sums
    grads = _backward(*saved, _within_segments(Spans(*spans), scale, reach))
    to_prompts = _to_prompts(Spans(*spans), scale, reach)
    if to_prompts is not None:
        rows = to_prompts.queries, to_prompts.keys, to_prompts.keys
        for whole, part, more in zip(grads, rows, _backward(*saved, to_prompts), strict=True):
            whole[part] += more
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    spans: list[Tensor],
    scale: float,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return query, key, value


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, spans, ctx.scale, ctx.reach = inputs
    ctx.save_for_backward(query, key, value, *output, *spans)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    query, key, value, output, sums, *spans = ctx.saved_tensors
    found = _attend_backward(grad.contiguous(), query, key, value, output, sums, spans, ctx.scale, ctx.reach)
    return (*found, [None] * len(spans), None, None)


_attend.register_autograd(_differentiate, setup_context=_keep)

ATTENTION_OP = torch.ops.rl_lightning.varlen_attention.default
"""The operator, for policies of activation checkpointing."""


def _merge(output: Tensor, sums: Tensor, other: Tensor, other_sums: Tensor) -> None:
    """Makes (n, heads, head_dim) `output` and (heads, n) `sums` over some keys those over these and the keys of `other`."""
    share = torch.sigmoid(other_sums - sums).t().unsqueeze(2)
    output.addcmul_(other - output, share)  # in the wider type of `share`, rounded once
    sums.copy_(torch.logaddexp(sums, other_sums))


def _forward(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    """Output (n, heads, head_dim) and sums (heads, n) of the n queries of `call`."""
    q, k, v = query[call.queries], key[call.keys], value[call.keys]
    if not query.is_cuda:
        return _cpu_forward(q, k, v, call)
    ragged = call.query_starts, call.key_starts, call.most_queries, call.most_keys
    if query.dtype == torch.bfloat16 and query.shape[2] in FLASH3_HEAD_DIMS and (flash3 := _flash3(query.device)):
        window = (call.reach, 0) if call.reach >= 0 else (-1, -1)
        options = {"softmax_scale": call.scale, "causal": call.causal, "window_size": window, "return_softmax_lse": True}
        return flash3(q, k, v, *ragged, **options)[:2]
    is_causal, span = _masking(call)
    return aten._flash_attention_forward(q, k, v, *ragged, 0.0, is_causal, False, scale=call.scale, **span)[:2]


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values of `call`, for whatever keys `output` and `sums` are over."""
    q, k, v, normalizers = query[call.queries], key[call.keys], value[call.keys], sums[:, call.queries].contiguous()
    if not query.is_cuda:
        return _cpu_backward(grad[call.queries], q, k, v, output[call.queries], normalizers, call)
    is_causal, span = _masking(call)
    ragged = call.query_starts, call.key_starts, call.most_queries, call.most_keys
    if call.reach < 0 and has_ragged_backward(query):
        tensors = grad[call.queries], q, k, v, output[call.queries], normalizers
        if (found := ragged_backward(*tensors, *ragged, call.causal, call.scale)) is not None:
            return found
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    saved = (grad[call.queries], q, k, v, output[call.queries], normalizers, *ragged, 0.0, is_causal, *no_dropout)
    return aten._flash_attention_backward(*saved, scale=call.scale, **span)


def _masking(call: _Call) -> tuple[bool, dict[str, int]]:
    """Which keys a query sees, in PyTorch's words."""
    return call.causal and call.reach < 0, {"window_size_left": call.reach, "window_size_right": 0 if call.causal else -1}


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


# -- the same by PyTorch's kernels for the CPU, segment by segment


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    output, sums = torch.empty_like(query, memory_format=torch.contiguous_format), []
    for rows, columns in _parts(call):
        q, k, v = _heads_first(query[rows]), _heads_first(key[columns], query), _heads_first(value[columns], query)
        is_causal, mask = _cpu_masking(q, call)
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        attended, normalizers = kernel(q, k, v, 0.0, is_causal, attn_mask=mask, scale=call.scale)
        output[rows] = attended[0].transpose(0, 1)
        sums.append(normalizers[0])  # (heads, length)
    return output, torch.cat(sums, 1).to(_wide(query))


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for rows, columns in _parts(call):
        q, k, v = _heads_first(query[rows]), _heads_first(key[columns], query), _heads_first(value[columns], query)
        is_causal, mask = _cpu_masking(q, call)
        inputs = _heads_first(grad[rows]), q, k, v, _heads_first(output[rows]), sums[:, rows].unsqueeze(0)
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = kernel(*inputs, 0.0, is_causal, attn_mask=mask, scale=call.scale)
        for whole, part, share in zip(grads, (rows, columns, columns), found, strict=True):
            whole[part] = share[0].transpose(0, 1).unflatten(1, (whole.shape[1], -1)).sum(2)
    return grads


def _parts(call: _Call) -> Iterator[tuple[slice, slice]]:
    """Rows of queries and of keys, segment by segment."""
    cuts = ((slice(a, b) for a, b in zip(x, x[1:], strict=False)) for x in (call.query_starts.tolist(), call.key_starts.tolist()))
    return zip(*cuts, strict=True)


def _heads_first(x: Tensor, like: Tensor | None = None) -> Tensor:
    """(1, heads, length, head_dim) of (length, heads, head_dim), with as many heads as `like` has."""
    repeats = 1 if like is None else like.shape[1] // x.shape[1]
    return x.repeat_interleave(repeats, 1).transpose(0, 1).unsqueeze(0)


def _cpu_masking(query: Tensor, call: _Call) -> tuple[bool, Tensor | None]:
    """Whether the kernel's own causal mask does, and the additive mask (length, length) where it does not."""
    length, reach = query.shape[2], call.reach
    if reach < 0 or reach >= length - 1:
        return call.causal, None
    seen = torch.ones(length, length, dtype=torch.bool).tril_().triu_(-reach)
    return False, torch.zeros(length, length, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
