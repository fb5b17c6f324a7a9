"""The trainer's own kernels on a GPU: the same numbers as plain PyTorch, and no compilation after the first lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl_lightning.batching.spans import Spans
from rl_lightning.models.fused_logprobs import fused_logprobs
from rl_lightning.models.logprobs import token_logprobs
from rl_lightning.models.ragged_backward import has_ragged_backward, ragged_backward
from rl_lightning.models.varlen import ATTENTION_OP, varlen_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


GROUPS = [200, 1, 130, 300, 3, 500, 1, 64, 130], [0, 1, 2, 0, 0, 1, 1, 2, 2]
"""Segments and their parents: three groups, one with a prompt of one token."""


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "parents", "window"),
    [
        ([300, 1, 777, 64], [0, 1, 2, 3], None),
        ([300, 1, 777, 64], [0, 1, 2, 3], 100),
        (*GROUPS, None),
        ([*GROUPS[0], 700, 1], [*GROUPS[1], 9, 10], None),
        ([5, 1, 1], [0, 1, 0], None),  # one answer token to a prompt
        ([30, 4096, 100, 2047, 5000, 40, 4200], list(range(7)), None),  # long ones have another backward pass
        ([4300, 900, 4100, 60], [0, 1, 0, 1], None),
    ],
)
def test_varlen_attention_with_grouped_heads(
    lengths: list[int], parents: list[int], window: int | None, dtype: torch.dtype, head_dim: int
) -> None:
    torch.manual_seed(0)
    inputs = [random(sum(lengths), heads, head_dim, dtype=dtype) for heads in (8, 2, 2)]
    upstream, scale = torch.randn_like(inputs[0]), head_dim**-0.5
    got = varlen_attention(inputs[0], inputs[1], inputs[2], Spans.of(lengths, parents, "cuda"), scale, window)
    on_cpu = [x.detach().float().cpu().requires_grad_() for x in inputs]
    expected = varlen_attention(on_cpu[0], on_cpu[1], on_cpu[2], Spans.of(lengths, parents), scale, window)
    torch.testing.assert_close(got.float().cpu(), expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad((got * upstream).sum(), inputs)
    wanted = torch.autograd.grad((expected * upstream.float().cpu()).sum(), on_cpu)
    for gradient, reference in zip(found, wanted, strict=True):
        difference = (gradient.float().cpu() - reference).norm() / reference.norm()
        assert float(difference) < 0.02


@pytest.mark.parametrize("lengths", [[1], [256], [257, 4096], [100] * 5, [1, 2, 63, 64, 65, 2000], [500] * 33])
def test_ragged_backward(lengths: list[int]) -> None:
    """At and beside the sizes that plans are made for, with what must not be read behind the last token."""
    torch.manual_seed(0)
    n, head_dim = sum(lengths), 128
    whole = [torch.randn(n + 256, heads, head_dim, device="cuda", dtype=torch.bfloat16) for heads in (8, 8, 2, 2)]
    grad, query, key, value = (x[:n] for x in whole)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("measured on Hopper GPUs only, and used on no other")
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend, which SGLang brings along")
    assert has_ragged_backward(query)
    for x in whole:
        x[n:] = float("nan")
    spans, scale = Spans.of(lengths, range(len(lengths)), "cuda"), head_dim**-0.5
    output, sums = ATTENTION_OP(query, key, value, list(spans), scale, -1)
    ragged = spans.starts, spans.starts, max(lengths), max(lengths)
    found = ragged_backward(grad, query, key, value, output, sums, *ragged, True, scale)
    assert found is not None
    on_cpu = [x.float().cpu().requires_grad_() for x in (query, key, value)]
    expected = varlen_attention(on_cpu[0], on_cpu[1], on_cpu[2], Spans.of(lengths, range(len(lengths))), scale)
    wanted = torch.autograd.grad(expected, on_cpu, grad.float().cpu())
    for gradient, reference in zip(found, wanted, strict=True):
        difference = (gradient.float().cpu() - reference).norm()
        assert float(difference) < 0.02 * float(reference.norm()) + 1e-3  # of a single token query and key have none


@pytest.mark.parametrize("keep_bytes", [0.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_logprobs(keep_bytes: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = random(700, 256, dtype=dtype), random(5000, 256, dtype=dtype)
    targets, upstream = torch.randint(0, 5000, (700,), device="cuda"), torch.randn(700, device="cuda")
    got, entropy = fused_logprobs(hidden, weight, targets, temperature=16.0, chunk_rows=256, keep_bytes=keep_bytes)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = (wide[0] @ wide[1].t() / 16.0).log_softmax(1)
    limit = 0.05 if dtype == torch.bfloat16 else 0.01
    torch.testing.assert_close(got.double(), logprobs.gather(1, targets.unsqueeze(1)).squeeze(1), rtol=0, atol=limit)
    torch.testing.assert_close(entropy.double(), -(logprobs.exp() * logprobs).sum(1), rtol=0, atol=limit)
    found = torch.autograd.grad((got * upstream).sum(), (hidden, weight))
    wanted = torch.autograd.grad((logprobs.gather(1, targets.unsqueeze(1)).squeeze(1) * upstream).sum(), wide)
    for gradient, reference in zip(found, wanted, strict=True):
        difference = (gradient.double() - reference).norm() / reference.norm()
        assert float(difference) < limit


def test_rows_that_predict_several_targets() -> None:
    torch.manual_seed(0)
    hidden, weight = random(500, 256), random(5000, 256)
    targets, upstream = torch.randint(0, 5000, (700,), device="cuda"), torch.randn(700, device="cuda")
    rows = torch.randint(0, 500, (700,), device="cuda").sort().values
    on_cpu = [x.detach().float().cpu().requires_grad_() for x in (hidden, weight)]
    got, entropy = token_logprobs(hidden, weight, targets, rows=rows, temperature=16.0, with_entropy=True)
    wanted = token_logprobs(on_cpu[0], on_cpu[1], targets.cpu(), rows=rows.cpu(), temperature=16.0, with_entropy=True)
    assert entropy is not None and wanted[1] is not None
    torch.testing.assert_close((got.cpu(), entropy.cpu()), wanted, rtol=0, atol=0.05)
    found = torch.autograd.grad((got * upstream).sum(), (hidden, weight))
    expected = torch.autograd.grad((wanted[0] * upstream.cpu()).sum(), on_cpu)
    for gradient, reference in zip(found, expected, strict=True):
        assert float((gradient.float().cpu() - reference).norm() / reference.norm()) < 0.02


def test_compiled_layers_are_compiled_once(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rl_lightning.batching.layout import PackedLayout
    from rl_lightning.models.attention import register_packed_attention
    from rl_lightning.models.checkpointing import checkpoint_layers
    from rl_lightning.models.layers import compile_layers, compiled_graphs

    shape = {"hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = Qwen3Config(vocab_size=1000, intermediate_size=768, attn_implementation=register_packed_attention(), **shape)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to("cuda", torch.bfloat16).train()

    def run(lengths: list[int], parents: list[int]) -> tuple[Tensor, Tensor]:
        layout = PackedLayout(lengths, parents, "cuda")
        ids = torch.arange(sum(lengths), device="cuda") % 1000
        model.zero_grad()
        hidden = model.base_model(
            input_ids=ids.unsqueeze(0), position_ids=layout.positions.unsqueeze(0), layout=layout, use_cache=False
        ).last_hidden_state
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
        (hidden.float() * direction).sum().backward()  # a norm comes last: squares of its output would have no gradient
        return hidden.detach(), model.base_model.layers[0].mlp.up_proj.weight.grad.clone()

    lengths = [[1000, 280, 3000], [2651], [17, 1000, 3, 40, 1800], [2500, 2500]]
    cases = [(x, list(range(len(x)))) for x in lengths]
    cases += [([1000, 280, 1000, 900, 40], [0, 1, 0, 0, 1]), ([1500, 700, 1, 900], [0, 0, 0, 3])]
    plain = [run(*case) for case in cases]
    compile_layers(model)
    for level in ("none", "selective", "full"):
        checkpoint_layers(model, level)
        run(*cases[0])
        graphs = compiled_graphs()
        for case, (hidden, gradient) in zip(cases, plain, strict=True):
            got_hidden, got_gradient = run(*case)
            assert float((got_hidden - hidden).norm() / hidden.norm()) < 0.03
            assert float((got_gradient - gradient).norm() / gradient.norm()) < 0.05
        assert compiled_graphs() == graphs, level
