"""The trainer's own kernels on a GPU: the same numbers as plain PyTorch, and no compilation after the first lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rl_lightning.models.fused_logprobs import fused_logprobs
from rl_lightning.models.varlen import varlen_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()


@pytest.mark.parametrize("window", [None, 100])
def test_varlen_attention_with_grouped_heads(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [300, 1, 777, 64]
    inputs = random(sum(lengths), 8, 128), random(sum(lengths), 2, 128), random(sum(lengths), 2, 128)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    upstream = torch.randn_like(inputs[0])
    got = varlen_attention(*inputs, starts, torch.tensor(1024), 128**-0.5, window)
    on_cpu = [x.detach().float().cpu().requires_grad_() for x in inputs]
    expected = varlen_attention(on_cpu[0], on_cpu[1], on_cpu[2], starts.cpu(), torch.tensor(1024), 128**-0.5, window)
    torch.testing.assert_close(got.float().cpu(), expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad((got * upstream).sum(), inputs)
    wanted = torch.autograd.grad((expected * upstream.float().cpu()).sum(), on_cpu)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.float().cpu(), reference, rtol=0.05, atol=0.05)


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

    def run(lengths: list[int]) -> tuple[Tensor, Tensor]:
        layout = PackedLayout(lengths, list(range(len(lengths))), "cuda")
        ids = torch.arange(sum(lengths), device="cuda") % 1000
        model.zero_grad()
        hidden = model.base_model(
            input_ids=ids.unsqueeze(0), position_ids=layout.positions.unsqueeze(0), layout=layout, use_cache=False
        ).last_hidden_state
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
        (hidden.float() * direction).sum().backward()  # a norm comes last: squares of its output would have no gradient
        return hidden.detach(), model.base_model.layers[0].mlp.up_proj.weight.grad.clone()

    lengths = [[100, 28, 300], [65], [17, 1000, 3, 40, 8], [500, 500]]
    plain = [run(x) for x in lengths]
    compile_layers(model)
    for level in ("none", "selective", "full"):
        checkpoint_layers(model, level)
        run(lengths[0])
        graphs = compiled_graphs()
        for x, (hidden, gradient) in zip(lengths, plain, strict=True):
            got_hidden, got_gradient = run(x)
            assert float((got_hidden - hidden).norm() / hidden.norm()) < 0.03
            assert float((got_gradient - gradient).norm() / gradient.norm()) < 0.05
        assert compiled_graphs() == graphs, level
