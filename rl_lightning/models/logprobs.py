"""token_logprobs: log-probabilities and entropy of chosen tokens, never more logits at once than a fixed amount.

With a vocabulary of 150,000 the logits of one long micro-batch are larger than the model.  They are computed by chunks
of rows; the backward pass computes them again, unless one chunk held them all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lightning.models.fused_logprobs import fused_logprobs
from rl_lightning.models.linear import linear, onednn_pays

CHUNK_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 30}
"""Most logits at once by device type: 128 MiB of float32 on the CPU, 2 GiB of bfloat16 on a GPU."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden weight' / temperature) at `targets`.

    Args:
        hidden: (R, D) last hidden states.
        weight: (V, D) of the output embedding.
        targets: (M,) int64 token ids.
        rows: (M,) int64, the row of `hidden` that predicts each target; None where M = R and they correspond.
        bias: (V,) of the output embedding.
        temperature: divides the logits.
        with_entropy: also return the entropy.
        chunk_logits: most logits held at once; by device type if None.

    Returns:
        (M,) float32 log-probabilities (float64 for float64 input), and the (M,) entropy in nats, without gradient, of the
        distributions that the targets were drawn from.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chunk_rows = max(1, (chunk_logits or CHUNK_LOGITS.get(hidden.device.type, 1 << 26)) // len(weight))
    if hidden.is_cuda:
        predictors = hidden if rows is None else repeated(hidden, rows)
        fused = fused_logprobs(predictors, weight, targets, bias=bias, temperature=temperature, chunk_rows=chunk_rows)
        return fused[0], (fused[1] if with_entropy else None)
    if rows is None:
        rows = torch.arange(len(targets), device=targets.device)
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, bias, targets, rows, temperature, with_entropy, chunk_rows)
    return logprobs, (entropy if with_entropy else None)


def repeated(hidden: Tensor, rows: Tensor) -> Tensor:
    """(M, D) chosen `rows` of `hidden`, each as often as it is asked for; gradients of one row are added up in float32.

    On the CPU that costs up to two fifths more time where answers have two to four tokens, of which the first share a row.
    """
    return F.embedding(rows, hidden)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = _product(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, by whatever multiplies fastest here."""
    return linear(x, weight, bias) if onednn_pays() else F.linear(x, weight, bias)


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps one number a row (log of the partition sum); the softmax too if it came in a single chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        normalizers = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropies = torch.zeros_like(normalizers)
        logprobs = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        keep = len(hidden) <= chunk_rows and any(ctx.needs_input_grad[:3])
        probabilities = None
        for start in range(0, len(hidden), chunk_rows):
            logits = _logits(hidden[start : start + chunk_rows], weight, bias, temperature)
            chosen = _within(rows, start, len(logits))
            logprobs[chosen] = logits[rows[chosen] - start, targets[chosen]]
            normalizer = torch.logsumexp(logits, 1)
            normalizers[start : start + chunk_rows] = normalizer
            if keep or with_entropy:
                expected = logits.clone() if with_entropy else None
                probabilities = logits.sub_(normalizer.unsqueeze(1)).exp_()
                if expected is not None:
                    entropies[start : start + chunk_rows] = normalizer - torch.linalg.vecdot(probabilities, expected)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, normalizers, probabilities if keep else None)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        entropy = entropies[rows]
        ctx.mark_non_differentiable(entropy)
        return logprobs.sub_(normalizers[rows]), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, rows, normalizers, probabilities = ctx.saved_tensors
        grad = grads[0] / ctx.temperature
        row_grads = torch.zeros_like(normalizers).index_add_(0, rows, grad)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros_like(bias) if wants_bias else None
        for start in range(0, len(hidden), ctx.chunk_rows):
            part = slice(start, start + ctx.chunk_rows)
            if probabilities is None:
                logits = _logits(hidden[part], weight, bias, ctx.temperature)
                slope = logits.sub_(normalizers[part].unsqueeze(1)).exp_()
            else:
                slope = probabilities
            slope = slope * -row_grads[part].unsqueeze(1)
            chosen = _within(rows, start, len(slope))
            slope.index_put_((rows[chosen] - start, targets[chosen]), grad[chosen], accumulate=True)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = _product(slope, weight.t())
            if wants_weight:
                share = _product(slope.t(), hidden[part].t())
                grad_weight = share if grad_weight is None else grad_weight.to(normalizers.dtype).add_(share)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _within(rows: Tensor, start: int, count: int) -> Tensor:
    """Which entries of `rows` lie in `start .. start + count`, as indices."""
    return torch.nonzero((rows >= start) & (rows < start + count)).squeeze(1)
