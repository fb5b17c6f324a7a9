"""fused_logprobs: log-probabilities on a GPU, where the output layer of a small model is a fifth of the work.

The logits of a chunk of rows exist once, in the type of the product; one compiled kernel reads them for log-probability,
partition sum and entropy, and one turns them into their gradient in place.  The backward pass computes the logits again, except
those of chunks that memory had room for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lightning.models.memory import spare_gpu_bytes

HEADROOM = 6 * 2**30
"""Bytes of the GPU that kept logits leave free."""

ROW_MULTIPLE = 128
"""Chunks of many rows have a multiple of it: what matrix products work by."""


def fused_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_rows: int,
    keep_bytes: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `token_logprobs`; each row of `hidden` predicts one target.

    Args:
        hidden: (M, D).
        weight: (V, D), of the same type.
        targets: (M,) int64.
        bias: (V,), of the same type.
        temperature: divides the logits.
        chunk_rows: most rows of logits at once.
        keep_bytes: most logits kept for the backward pass; None: what the GPU has to spare now.

    Returns:
        (M,) log-probabilities and (M,) entropies, the latter without gradient, float32 (float64 for float64 input).
    """
    if keep_bytes is None:
        keep_bytes = spare_gpu_bytes(hidden.device) - HEADROOM if hidden.is_cuda else 0.0
    return _FusedLogprobs.apply(hidden, weight, bias, targets, temperature, chunk_rows, keep_bytes)


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_rows: int,
        keep_bytes: float,
    ) -> tuple[Tensor, Tensor]:
        wants_gradient, scale = any(ctx.needs_input_grad[:3]), 1.0 / temperature
        parts, ctx.kept, found = even_parts(len(hidden), chunk_rows), {}, []
        for part in parts:
            logits = F.linear(hidden[part], weight, bias)
            found.append(_kernel(row_statistics, hidden.device.type)(logits, targets[part], scale))
            keep_bytes -= logits.nbytes
            if wants_gradient and keep_bytes >= 0:
                ctx.kept[part.start] = logits
        logprobs, normalizers, entropies = (torch.cat(values) for values in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.scale, ctx.parts = scale, parts
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = _Total(normalizers.dtype if len(ctx.parts) > 1 else weight.dtype) if wants_weight else None
        grad_bias = torch.zeros(len(weight), dtype=normalizers.dtype, device=weight.device) if wants_bias else None
        for part in ctx.parts:
            logits = ctx.kept.pop(part.start, None)
            if logits is None:
                logits = F.linear(hidden[part], weight, bias)
            options = targets[part], normalizers[part], grads[0][part] * ctx.scale, ctx.scale
            _kernel(turn_into_slopes, hidden.device.type)(logits, *options)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.add(logits, hidden[part])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
        totals = (None if total is None else total.to(weight.dtype) for total in (grad_weight, grad_bias))
        return grad_hidden, *totals, None, None, None, None


def even_parts(n_rows: int, most: int) -> list[slice]:
    """`n_rows` in as few parts of at most `most` as it takes, about equally large: no short one that wants code of its own."""
    n_parts = max(1, -(-n_rows // most))
    size = max(1, -(-n_rows // n_parts))
    rounded = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
    if n_parts > 1 and n_parts * ROW_MULTIPLE < size and rounded <= most:
        size = rounded
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)] or [slice(0, 0)]


def row_statistics(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) log-probability of each row's target, log of its partition sum, and entropy, of (n, V) `logits` times `scale`."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    highest = scaled.amax(1, keepdim=True)
    weights = (scaled - highest).exp()
    total = weights.sum(1)
    normalizer = highest.squeeze(1) + total.log()
    entropy = normalizer - (weights * scaled).sum(1) / total
    return scaled.gather(1, targets.unsqueeze(1)).squeeze(1) - normalizer, normalizer, entropy


def turn_into_slopes(logits: Tensor, targets: Tensor, normalizers: Tensor, grads: Tensor, scale: float) -> None:
    """Overwrites (n, V) `logits` with their gradient, where `grads` are those of the rows' log-probabilities times `scale`."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    probabilities = (scaled - normalizers.unsqueeze(1)).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets.unsqueeze(1)
    logits.copy_((is_target.to(probabilities.dtype) - probabilities) * grads.unsqueeze(1))


class _Total:
    """Sum of a' b over chunks, (V, D): in float32 at least, added up by the matrix product itself where the device can."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.value: Tensor | None = None

    def add(self, a: Tensor, b: Tensor) -> None:
        """Adds a' b for a (n, V) and b (n, D)."""
        mixed = a.is_cuda and a.dtype != self._dtype
        if self.value is None:
            self.value = torch.mm(a.t(), b, out_dtype=self._dtype) if mixed else torch.mm(a.t(), b).to(self._dtype)
        elif mixed:
            torch.addmm(self.value, a.t(), b, out_dtype=self._dtype, out=self.value)
        else:
            self.value.add_(torch.mm(a.t(), b))

    def to(self, dtype: torch.dtype) -> Tensor:
        """The sum; at least one product was added."""
        assert self.value is not None
        return self.value.to(dtype)


@cache
def _kernel(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function`, compiled on a GPU for any number of rows."""
    if device == "cpu":
        return function
    compiled = torch.compile(function)

    def run(logits: Tensor, *arguments: Any) -> Any:
        for tensor in (logits, *(x for x in arguments if isinstance(x, Tensor))):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, *arguments)

    return run
