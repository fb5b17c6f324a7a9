"""dense_backward: gradients of causal attention over long segments by cuDNN, which takes segments of one length only.

On an H100 it is 1.6 to 1.8 times as fast as FlashAttention 2's backward pass from 2,048 tokens on (docs/gpu_benchmarks.md), for
what any kernel's forward pass left behind. Each length needs a plan, which takes 0.05 s once: lengths are rounded up, and as
many segments of one length as a power of two go together.
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

LEAST = 2048
"""Shorter ones, rounded up, are not worth a call of their own."""

MOST_TOGETHER = 8
MOST_HEAD_DIM = 128
OLDEST_CUDNN = 90100

BEYOND = 1e30
"""Log of the partition sum of rows behind a segment's end: all of their attention is zero, whatever stands there."""

Segment = tuple[int, int]
"""First row and number of rows."""


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


def cut_segments(bounds: Sequence[int]) -> tuple[list[tuple[int, Sequence[Segment]]], list[tuple[int, int]]]:
    """Long segments by rounded length, in calls of `dense_backward`; and runs of short ones between them.

    Args:
        bounds: (K + 1) rows where K segments start, and their end.

    Returns:
        [(rounded length, segments)] and [(first segment, segment behind the last)].
    """
    by_length: dict[int, list[Segment]] = {}
    short: list[tuple[int, int]] = []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        length = -(-(end - start) // STEP) * STEP
        if length >= LEAST:
            by_length.setdefault(length, []).append((start, end - start))
        elif short and short[-1][1] == i:
            short[-1] = short[-1][0], i + 1
        else:
            short.append((i, i + 1))
    return [(length, part) for length, segments in by_length.items() for part in _powers_of_two(segments)], short


def _powers_of_two(segments: Sequence[Segment]) -> list[Sequence[Segment]]:
    parts: list[Sequence[Segment]] = []
    size = MOST_TOGETHER
    while segments:
        while size > len(segments):
            size //= 2
        parts.append(segments[:size])
        segments = segments[size:]
    return parts


def dense_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    segments: Sequence[Segment],
    length: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows of `segments`.

    Args:
        grad: (N, heads, head_dim), of `output`.
        query: (N, heads, head_dim) float16 or bfloat16.
        key: (N, kv_heads, head_dim).
        value: (N, kv_heads, head_dim).
        output: (N, heads, head_dim).
        sums: (heads, N) float32, logs of the partition sums.
        segments: B of them.
        length: rows of each in the result, no fewer than of the longest.
        scale: factor on the scores.

    Returns:
        (B, length, heads, head_dim) of query, (B, length, kv_heads, head_dim) of key and of value.
    """
    normalizers = sums.new_full((len(segments), sums.shape[0], length, 1), BEYOND)
    for own, (start, n) in zip(normalizers, segments, strict=True):
        own[:, :n, 0] = sums[:, start : start + n]
    tensors = (_batch(x, segments, length).transpose(1, 2) for x in (grad, query, key, value, output))
    no_dropout, no_bias = torch.zeros((), dtype=torch.int64, device=query.device), None
    found = aten._scaled_dot_product_cudnn_attention_backward(
        *tensors, normalizers, no_dropout, no_dropout, no_bias, None, None, length, length, 0.0, True, scale=scale
    )
    d_query, d_key, d_value = (x.transpose(1, 2) for x in found)
    return d_query, d_key, d_value


def _batch(x: Tensor, segments: Sequence[Segment], length: int) -> Tensor:
    """(B, length, heads, head_dim): `length` rows of `x` from the start of each segment on, whoever they belong to."""
    rows = [x[start : start + length] for start, _ in segments]
    rows = [F.pad(own, (0, 0, 0, 0, 0, length - len(own))) if len(own) < length else own for own in rows]
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
