"""Faster float32 matrix products on CPUs whose default BLAS leaves half of the vector units idle.

PyTorch multiplies float32 matrices with MKL, which stays on AVX2 on processors that are not Intel's.  oneDNN, which PyTorch
also carries, uses AVX-512 there: the same float32 arithmetic at about twice the speed.  Results differ by rounding only.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 16
"""Below this many rows of small matrices the call overhead of oneDNN outweighs its speed."""

FEW_WEIGHTS = 1 << 18
"""What counts as a small matrix."""


@lru_cache(maxsize=1)
def onednn_pays() -> bool:
    """Whether this processor has AVX-512 that MKL does not use. The same answer on every run of one machine."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """y = x W^T + b with all three products of forward and backward in oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        rows = x.reshape(-1, weight.shape[1])
        grad_x = _product(grad, weight.t()).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = _product(grad.t(), rows.t()) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` through oneDNN where that is faster and exact; differentiable.

    Args:
        x: (..., in), any dtype and device.
        weight: (out, in).
        bias: (out,) or None.
    """
    few = weight.numel() < FEW_WEIGHTS and x.numel() < FEW_ROWS * weight.shape[1]
    if few or x.numel() == 0 or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _OneDnnLinear.apply(x, weight, bias)
    return _of_few_sizes(x, weight, bias)


def _of_few_sizes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of rows filled up with zeros to the next of 16 sizes in each power of two.

    oneDNN keeps code for every number of rows that it has seen, hundreds of megabytes of it where engines batch as it comes.
    """
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, (1 << len(rows).bit_length()) // 32)
    missing = -len(rows) % step
    if not missing:
        return _product(x, weight, bias)
    return _product(F.pad(rows, (0, 0, 0, missing)), weight, bias)[: len(rows)].view(*x.shape[:-1], -1)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def accelerate_linears(model: nn.Module) -> int:
    """Routes the plain `nn.Linear` layers of `model` through `linear` where this processor gains by it.

    Parameters, names and state dict stay as they are. Returns the number of layers changed (0 on other processors).
    """
    if not onednn_pays():
        return 0
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)
