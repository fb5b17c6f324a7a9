"""dense_backward: gradients of causal attention over one long segment by cuDNN.

On an H100 it is 1.6 and 1.7 times as fast as FlashAttention 2's backward pass at 16,384 and 32,768 tokens
(docs/gpu_benchmarks.md), for what any kernel's forward pass left behind. cuDNN makes a plan for each length, which takes 0.05 s
once: lengths are rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

STEP = 256
"""Lengths are rounded up to multiples of this."""

LEAST = 4096
"""Shorter ones keep a GPU busier together, in one call of FlashAttention 2."""

MOST_HEAD_DIM = 128
OLDEST_CUDNN = 90100

BEYOND = 1e30
"""Log of the partition sum of rows behind a segment's end: all of their attention is zero, whatever stands there."""


def has_dense_backward(query: Tensor) -> bool:
    """Whether cuDNN can do it, on a GPU where it was measured to be faster.

    Args:
        query: (N, heads, head_dim).
    """
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] % 8 == 0 and query.shape[2] <= MOST_HEAD_DIM
    return fits and query.is_cuda and _is_hopper(query.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return torch.cuda.get_device_capability(device)[0] == 9 and (version or 0) >= OLDEST_CUDNN


def cut_segments(bounds: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Which segments are long, and the runs of short ones between them.

    Args:
        bounds: (K + 1) rows where K segments start, and their end.

    Returns:
        Indices of segments, and (first, behind the last) of them.
    """
    long: list[int] = []
    short: list[tuple[int, int]] = []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end - start >= LEAST:
            long.append(i)
        elif short and short[-1][1] == i:
            short[-1] = short[-1][0], i + 1
        else:
            short.append((i, i + 1))
    return long, short


def dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, sums: Tensor, rows: slice, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one segment.

    Args:
        grad: (N, heads, head_dim), of `output`.
        query: (N, heads, head_dim) float16 or bfloat16.
        key: (N, kv_heads, head_dim).
        value: (N, kv_heads, head_dim).
        output: (N, heads, head_dim).
        sums: (heads, N) float32, logs of the partition sums.
        rows: n of the N, those of the segment.
        scale: factor on the scores.

    Returns:
        (n, heads, head_dim) of query, (n, kv_heads, head_dim) of key and of value.
    """
    n = rows.stop - rows.start
    length = -(-n // STEP) * STEP
    normalizers = sums.new_full((1, sums.shape[0], length, 1), BEYOND)
    normalizers[0, :, :n, 0] = sums[:, rows]
    tensors = (_from(rows.start, length, x) for x in (grad, query, key, value, output))
    no_dropout, no_bias = torch.zeros((), dtype=torch.int64, device=query.device), None
    found = aten._scaled_dot_product_cudnn_attention_backward(
        *tensors, normalizers, no_dropout, no_dropout, no_bias, None, None, length, length, 0.0, True, scale=scale
    )
    d_query, d_key, d_value = (x[0, :, :n].transpose(0, 1) for x in found)
    return d_query, d_key, d_value


def _from(start: int, length: int, x: Tensor) -> Tensor:
    """(1, heads, length, head_dim): rows of `x`, whoever they belong to, and zeros where there are no more."""
    rows = x[start : start + length]
    rows = F.pad(rows, (0, 0, 0, 0, 0, length - len(rows))) if len(rows) < length else rows
    return rows.transpose(0, 1).unsqueeze(0)
