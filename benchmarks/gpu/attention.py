"""Kernels of causal attention over packed sequences: TFLOP/s of forward and backward pass on one GPU.

    python benchmarks/gpu/attention.py

16 query heads, 8 key/value heads of 128, bfloat16, 32,768 tokens. A causal forward pass counts 2 len^2 heads head_dim for each
sequence, a backward pass 2.5 times that. A kernel that cannot run here says why.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from gpu_machine import describe_machine  # noqa: E402
from shapes import lognormal_lengths  # noqa: E402

from rl_lightning.batching.spans import Spans  # noqa: E402
from rl_lightning.models.varlen import varlen_attention  # noqa: E402

logger = logging.getLogger("attention")

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 16, 8, 128, 32768
SCALE = HEAD_DIM**-0.5
aten = torch.ops.aten

CASES = {
    "16 x 2048": [2048] * 16,
    "2 x 16384": [16384] * 2,
    "1 x 32768": [32768],
    "lognormal": lognormal_lengths(TOKENS, median=1024, sigma=1.0, longest=16384, seed=0),
}
Pass = Callable[[], Any]


def library(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, grad: Tensor) -> tuple[Pass, Pass]:
    """What the library runs here."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    lengths = starts.diff().tolist()
    spans = Spans.of(lengths, range(len(lengths)), q.device)
    output = varlen_attention(inputs[0], inputs[1], inputs[2], spans, SCALE)
    forward = torch.no_grad()(lambda: varlen_attention(q, k, v, spans, SCALE))
    return forward, lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def flash2(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, grad: Tensor) -> tuple[Pass, Pass]:
    """PyTorch's own flash attention with grouped heads."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def attend(*tensors: Tensor) -> Tensor:
        return aten._flash_attention_forward(*tensors, starts, starts, longest, longest, 0.0, True, False, scale=SCALE)[0]

    output = attend(*inputs)
    return lambda: attend(q, k, v), lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def flash2_expanded(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, grad: Tensor) -> tuple[Pass, Pass]:
    """The same with keys and values repeated for each query head."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    return flash2(q, k, v, starts, longest, grad)


def cudnn(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, grad: Tensor) -> tuple[Pass, Pass]:
    """cuDNN's ragged attention, which makes a plan for each (sequences, longest length)."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def attend(*tensors: Tensor) -> Tensor:
        ragged = (starts, starts, longest, longest)
        return aten._cudnn_attention_forward(*tensors, None, *ragged, True, 0.0, True, False, scale=SCALE)[0]

    output = attend(*inputs)
    return lambda: attend(q, k, v), lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def flash3(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, grad: Tensor) -> tuple[Pass, Pass | None]:
    """FlashAttention 3 as SGLang ships it: forward only."""
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    options = {"softmax_scale": SCALE, "causal": True, "return_softmax_lse": True}
    return lambda: flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options), None


KERNELS: dict[str, Callable[..., tuple[Pass, Pass | None]]] = {
    "the library's": library,
    "flash2": flash2,
    "flash2 expanded": flash2_expanded,
    "cudnn": cudnn,
    "flash3 (sgl_kernel)": flash3,
}


def seconds(run: Pass, repeats: int = 10) -> float:
    """Of one call, after three to warm up."""
    for _ in range(3):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def measure(name: str, lengths: list[int]) -> dict[str, Any]:
    """One kernel on sequences of `lengths`."""
    n, starts = sum(lengths), torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    shapes = [(n, HEADS, HEAD_DIM), (n, KV_HEADS, HEAD_DIM), (n, KV_HEADS, HEAD_DIM), (n, HEADS, HEAD_DIM)]
    q, k, v, grad = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    flops = 2.0 * HEADS * HEAD_DIM * sum(x * x for x in lengths)
    try:
        forward, backward = KERNELS[name](q, k, v, starts, max(lengths), grad)
        row: dict[str, Any] = {"forward_tflops": round(flops / seconds(forward) / 1e12, 1)}
        if backward is not None:
            row["backward_tflops"] = round(2.5 * flops / seconds(backward) / 1e12, 1)
        expected = varlen_attention(q, k, v, Spans.of(lengths, range(len(lengths)), "cuda"), SCALE)
        got = forward()
        row["difference"] = round(float(((got if isinstance(got, Tensor) else got[0]) - expected).abs().max()), 5)
    except (RuntimeError, ImportError, TypeError, ValueError) as error:  # a rival that is not to be had here
        return {"failure": str(error).partition("\n")[0][:200]}
    return row


def main() -> None:
    """Measures every kernel on every case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "gpu_attention.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for case, lengths in CASES.items():
        for name in KERNELS:
            rows.append({"case": case, "kernel": name, **measure(name, lengths)})
            logger.info("%s", rows[-1])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**describe_machine("attention.py", 1), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
