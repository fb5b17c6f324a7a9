"""ragged_backward: gradients of attention over packed segments by cuDNN, all segments in one call.

cuDNN makes a plan for each shape, which takes a twentieth of a second or more. PyTorch's own entry for packed segments makes it
at every call; here plans are kept, which takes cuDNN's frontend for Python (nvidia-cudnn-frontend; SGLang brings it along).
Lengths and offsets are tensors on the device and no part of a plan. What is part of it is rounded up, so that few are made.
"""

from __future__ import annotations

import logging
import threading
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LEAST_SEGMENTS = 4
LEAST_LENGTH = 256
"""Segments and the longest of them are rounded up to powers of two from here on; segments that are not there are empty."""

STEP = 4096
"""Tokens are rounded up to multiples of this: only the workspace grows with them."""

MOST_PLANS = 512
"""That are kept: shared prompts make many shapes."""

MOST_HEAD_DIM = 128
OLDEST_CUDNN = 91900

INPUTS = ("q", "k", "v", "o", "do", "stats", "q_lengths", "kv_lengths", "q_offsets", "kv_offsets", "stats_offsets")
UIDS = {name: uid for uid, name in enumerate((*INPUTS, "dq", "dk", "dv"), start=1)}
"""Tensors of a plan, in the order in which they are given to it."""


class _Shape(NamedTuple):
    """What a plan is made for; numbers of segments, queries and keys are upper bounds."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    segments: int
    most_queries: int
    most_keys: int
    queries: int
    keys: int
    causal: bool
    scale: float


class _Plan(NamedTuple):
    graph: Any
    workspace_bytes: int


def has_ragged_backward(query: Tensor) -> bool:
    """Whether cuDNN and its frontend are there, on a GPU for which it was measured.

    Args:
        query: (N, heads, head_dim).
    """
    fits = query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] % 16 == 0 and query.shape[2] <= MOST_HEAD_DIM
    return fits and query.is_cuda and _frontend(query.device) is not None


def ragged_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    most_queries: int,
    most_keys: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients for what any kernel's forward pass left behind; only where `has_ragged_backward`.

    Args:
        grad: (N, heads, head_dim), of `output`.
        query: (N, heads, head_dim) float16 or bfloat16.
        key: (M, kv_heads, head_dim).
        value: (M, kv_heads, head_dim).
        output: (N, heads, head_dim).
        sums: (heads, N) float32, logs of the partition sums.
        query_starts: (K + 1,) int32 on the device, rows where the K segments of queries start, and N.
        key_starts: (K + 1,) int32 on the device, rows where the keys that they see start, and M.
        most_queries: of a segment.
        most_keys: of a segment.
        causal: a query sees no later key of its segment.
        scale: factor on the scores.

    Returns:
        (N, heads, head_dim) of query, (M, kv_heads, head_dim) of key and of value; None where cuDNN makes no plan for them.
    """
    (n, heads, head_dim), (m, kv_heads, _) = query.shape, key.shape
    segments = _power_of_two(len(query_starts) - 1, LEAST_SEGMENTS)
    longest = _power_of_two(most_queries, LEAST_LENGTH), _power_of_two(most_keys, LEAST_LENGTH)
    totals = -(-n // STEP) * STEP, -(-m // STEP) * STEP
    plan = _plan(_Shape(query.device, query.dtype, heads, kv_heads, head_dim, segments, *longest, *totals, causal, scale))
    if plan is None:
        return None
    q_lengths, (q_offsets, stats_offsets) = places(query_starts, segments, heads * head_dim, heads)
    kv_lengths, (kv_offsets,) = places(key_starts, segments, kv_heads * head_dim)
    inputs = (*(x.contiguous() for x in (query, key, value, output, grad)), sums.t().contiguous())
    found = torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.empty_like(inputs[2])
    tensors = (*inputs, q_lengths, kv_lengths, q_offsets, kv_offsets, stats_offsets, *found)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=query.device)
    plan.graph.execute(dict(zip(UIDS.values(), tensors, strict=True)), workspace, handle=_handle_on_stream(query.device))
    return found


def places(starts: Tensor, segments: int, *widths: int) -> tuple[Tensor, Tensor]:
    """Where segments lie in tensors of several widths.

    Args:
        starts: (K + 1,) int32, the first row of each segment, and the end.
        segments: at least K; those that are not there are empty.
        widths: elements of a row.

    Returns:
        (segments,) int32 lengths, and (len(widths), at least segments + 1) int64 offsets in elements, each row of which lies at a
        multiple of 16 bytes.
    """
    room = segments + 2 - segments % 2
    padded = torch.cat([starts, starts[-1:].expand(room - len(starts))])
    return padded[: segments + 1].diff(), padded * _column(starts.device, widths)


@cache
def _column(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, device=device).unsqueeze(1)


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n > 1 else least


@cache
def _frontend(device: torch.device) -> Any | None:
    """The module, None where it is not to be had."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        import cudnn

        return cudnn if cudnn.backend_version() >= OLDEST_CUDNN else None
    except (ImportError, RuntimeError):  # the second: it finds no libcudnn
        return None


@cache
def _handle(device: torch.device, thread: int) -> Any:
    """A handle serves one thread at a time."""
    with torch.cuda.device(device):
        return _frontend(device).create_handle()  # type: ignore[union-attr]


def _handle_on_stream(device: torch.device) -> Any:
    handle = _handle(device, threading.get_ident())
    _frontend(device).set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)  # type: ignore[union-attr]
    return handle


@lru_cache(MOST_PLANS)
def _plan(shape: _Shape) -> _Plan | None:
    """Takes long, once for each shape. None where cuDNN refuses: some versions of the frontend do not fit some of cuDNN."""
    cudnn = _frontend(shape.device)
    assert cudnn is not None
    try:
        return _build(cudnn, shape)
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as error:
        versions = f"nvidia-cudnn-frontend {cudnn.__version__} with cuDNN {cudnn.backend_version()}"
        logger.warning("%s makes no plan for %s, PyTorch's kernels do it; another frontend may: %s", versions, shape, error)
        return None


def _build(cudnn: Any, shape: _Shape) -> _Plan:
    kinds = cudnn.data_type
    io_type = kinds.BFLOAT16 if shape.dtype == torch.bfloat16 else kinds.HALF
    types = {"io_data_type": io_type, "intermediate_data_type": kinds.FLOAT, "compute_data_type": kinds.FLOAT}
    graph = cudnn.pygraph(**types, handle=_handle_on_stream(shape.device))
    _describe(graph, kinds, io_type, shape)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return _Plan(graph, graph.get_workspace_size())


def _describe(graph: Any, kinds: Any, io_type: Any, shape: _Shape) -> None:
    """All tensors of `UIDS`, and the operation between them."""
    n, d = shape.segments, shape.head_dim
    q_size, kv_size = (n, shape.heads, shape.most_queries, d), (n, shape.kv_heads, shape.most_keys, d)

    def tensor(name: str, size: tuple[int, ...], kind: Any, strides: tuple[int, ...] = (1, 1, 1, 1)) -> Any:
        return graph.tensor(name=name, dim=size, stride=strides, data_type=kind, uid=UIDS[name])

    q_offsets, kv_offsets, stats_offsets = (
        tensor(name, (n + 1, 1, 1, 1), kinds.INT64) for name in ("q_offsets", "kv_offsets", "stats_offsets")
    )
    q, o, do = (tensor(name, q_size, io_type, _packed(q_size)) for name in ("q", "o", "do"))
    k, v = (tensor(name, kv_size, io_type, _packed(kv_size)) for name in ("k", "v"))
    stats = tensor("stats", (*q_size[:3], 1), kinds.FLOAT, _packed((*q_size[:3], 1)))
    dq, dk, dv = graph.sdpa_backward(
        name="ragged_backward",
        **{"q": q, "k": k, "v": v, "o": o, "dO": do, "stats": stats},
        attn_scale=shape.scale,
        use_causal_mask=shape.causal,
        use_padding_mask=True,
        seq_len_q=tensor("q_lengths", (n, 1, 1, 1), kinds.INT32),
        seq_len_kv=tensor("kv_lengths", (n, 1, 1, 1), kinds.INT32),
        max_total_seq_len_q=shape.queries,
        max_total_seq_len_kv=shape.keys,
    )
    for name, found, size in (("dq", dq, q_size), ("dk", dk, kv_size), ("dv", dv, kv_size)):
        found.set_uid(UIDS[name]).set_output(True).set_data_type(io_type).set_dim(size).set_stride(_packed(size))
    for x in (q, o, do, dq):
        x.set_ragged_offset(q_offsets)
    for x in (k, v, dk, dv):
        x.set_ragged_offset(kv_offsets)
    stats.set_ragged_offset(stats_offsets)


def _packed(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (segments, heads, rows, width) whose rows lie (rows, heads, width) in memory."""
    _, heads, rows, width = size
    return rows * heads * width, width, heads * width, 1
