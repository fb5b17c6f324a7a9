"""Answers that share a prompt: the operator against dense attention, its order of segments, and when it is used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from training_samples import Alone, make_batch, padded_logprobs, write_model

from rl_lightning.batching.micro_batch import make_micro_batch, pack_micro_batches, saved_by_sharing
from rl_lightning.batching.spans import Spans
from rl_lightning.models import varlen
from rl_lightning.models.fused_logprobs import fused_logprobs
from rl_lightning.models.logprobs import repeated, token_logprobs
from rl_lightning.models.varlen import varlen_attention
from rl_lightning.modules.prompt_sharing import shares_prompts

CASES = {
    "two groups, two whole sequences": ([5, 7, 3, 2, 4, 6, 1, 9, 4], [0, 1, 0, 0, 1, 1, 1, 7, 8]),
    "one group": ([4, 2, 3, 1], [0, 0, 0, 0]),
    "single answers, single tokens": ([1, 3, 1, 1], [0, 1, 0, 1]),
    "nothing shared": ([5, 1, 9], [0, 1, 2]),
}


def dense_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], parents: list[int], scale: float) -> Tensor:
    """(N, heads, head_dim) by a mask over all pairs of tokens."""
    segment, order = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), torch.arange(sum(lengths))
    parent, repeats = torch.tensor(parents)[segment], query.shape[1] // key.shape[1]
    own = segment.unsqueeze(1) == segment
    seen = (own & (order.unsqueeze(1) >= order)) | (~own & (parent.unsqueeze(1) == segment))
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeats, 1)) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(repeats, 1))


def random_inputs(n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("case", CASES)
def test_the_operator_is_attention_to_segment_and_prompt(case: str) -> None:
    lengths, parents = CASES[case]
    spans, inputs = Spans.of(lengths, parents), random_inputs(sum(lengths))
    got, expected = varlen_attention(*inputs, spans, 0.3), dense_attention(*inputs, lengths, parents, 0.3)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad((got * upstream).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * upstream).sum(), inputs))
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, spans, 0.3), inputs, fast_mode=True)


def test_half_precision_is_rounded_like_one_call() -> None:
    lengths, parents = [40, 30, 20, 25, 60], [0, 1, 0, 1, 1]
    wide = random_inputs(sum(lengths))
    halves = [x.detach().bfloat16().requires_grad_() for x in wide]
    got = varlen_attention(*halves, Spans.of(lengths, parents), 0.3)
    exact = dense_attention(*(x.detach().double() for x in halves), lengths, parents, 0.3)
    assert got.dtype == torch.bfloat16
    assert float((got.detach().double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max()), (
        "one step of bfloat16 at the largest"
    )
    gradients = torch.autograd.grad(got.float().sum(), halves)
    expected = torch.autograd.grad(dense_attention(*wide, lengths, parents, 0.3).sum(), wide)
    for found, wanted in zip(gradients, expected, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("like_inputs", [True, False])
def test_results_lie_where_compiled_code_looks_for_them(like_inputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel: those of PyTorch give tensors that lie like the inputs, here heads first, and cuDNN's does not."""

    def laid_out(found: Tensor, like: Tensor) -> Tensor:
        return torch.empty_like(like).copy_(found) if like_inputs else found.contiguous()

    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        output, sums = kernels[0](*inputs)
        return laid_out(output, inputs[0]), sums

    def backward(*inputs: Any) -> tuple[Tensor, ...]:
        return tuple(map(laid_out, kernels[1](*inputs), inputs[1:4]))

    kernels = varlen._forward, varlen._backward
    monkeypatch.setattr(varlen, "_forward", forward)
    monkeypatch.setattr(varlen, "_backward", backward)
    inputs, spans = [torch.randn(heads, 8, 16).transpose(0, 1) for heads in (4, 2, 2)], list(Spans.of([5, 3], [0, 1]))
    fake = FakeTensorMode()
    looked_for, layout = list(map(fake.from_tensor, inputs)), (list(map(fake.from_tensor, spans)), 0.3, -1)
    outputs, expected = varlen._attend(*inputs, spans, 0.3, -1), varlen._attend(*looked_for, *layout)
    assert [x.stride() for x in outputs] == [x.stride() for x in expected]
    gradients = varlen._attend_backward(outputs[0], *inputs, *outputs, spans, 0.3, -1)
    expected = varlen._attend_backward(expected[0], *looked_for, *expected, *layout)
    assert [x.stride() for x in gradients] == [x.stride() for x in expected]


def test_a_window_over_shared_prompts_is_refused_by_the_operator() -> None:
    spans, inputs = Spans.of([3, 2, 4], [0, 0, 0]), random_inputs(9)
    with pytest.raises(ValueError, match="no kernel for a sliding window over shared prompts: set share_prompts=False"):
        varlen_attention(*inputs, spans, 0.3, window=2)


def test_spans_are_counted_from_the_first_answer_and_equally_long() -> None:
    lengths, parents = CASES["two groups, two whole sequences"]
    spans = Spans.of(lengths, parents)
    assert spans.starts.tolist() == [0, 5, 12, 15, 17, 21, 27, 28, 37, 41]
    assert spans.prompt_starts.tolist() == [0, 5] + [12] * 8 and spans.answer_starts.tolist() == [0, 5] + [16] * 8
    assert [int(x) for x in spans[3:]] == [9, 7, 11, 2, 12, 16]
    with pytest.raises(AssertionError, match="prompts, their answers, the rest"):
        Spans.of([5, 3, 5, 3], [0, 0, 2, 2])


def test_prompts_come_first_and_what_is_alone_is_one_sequence() -> None:
    batch = make_batch(seed=8, n_groups=3, answer_lens=(3, 9))
    chosen = [8, 0, 1, 2, 4, 9]  # one answer to the third prompt, three to the first, one to the second, one to the third
    micro = make_micro_batch(batch, chosen, share_prompts=True)
    prompts, lengths = batch.prompt_lens.tolist(), (batch.cu_seqlens.diff() - 1).tolist()
    answers = [lengths[s] - prompts[s] for s in (0, 1, 2)]
    spans = micro.layout.spans
    assert spans.starts.diff().tolist() == [prompts[0], *answers, lengths[8], lengths[4], lengths[9]]
    assert (int(spans.n_groups), int(spans.n_answer_tokens)) == (1, sum(answers))
    assert torch.equal(micro.token_ids[micro.predictors[micro.rows]], batch.token_ids[micro.sources - 1])
    assert torch.equal(micro.targets, batch.token_ids[micro.sources])
    assert not make_micro_batch(batch, [8, 0, 4], share_prompts=True).layout.shared


def test_answers_of_one_token_leave_nothing_to_share() -> None:
    batch = make_batch(seed=9, n_groups=2, answer_lens=(1, 2))
    micro = make_micro_batch(batch, range(batch.n_seqs), share_prompts=True)
    assert not micro.layout.shared and micro.layout.n_tokens == int(batch.prompt_lens[::4].sum())
    assert len(micro.predictors) == 2 and len(micro.targets) == 8


@pytest.mark.parametrize("max_tokens", [24, 40, 1000])
def test_groups_cut_over_micro_batches_score_as_padded_ones(max_tokens: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, batch = write_model(tmp_path), make_batch(seed=5, n_groups=4)
    module = Alone(folder)
    module.configure_model()
    packed = pack_micro_batches(batch, range(batch.n_seqs), max_tokens, share_prompts=True)
    scored = torch.full(batch.loss_mask.shape, torch.nan)
    for chosen in packed:
        micro = make_micro_batch(batch, chosen, share_prompts=True)
        scored[micro.sources] = module.score(micro)[0].detach()
    expected = padded_logprobs(AutoModelForCausalLM.from_pretrained(folder), batch).detach()
    torch.testing.assert_close(scored, expected, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_rows_that_are_asked_for_again_are_scored_like_others() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 11))
    targets, rows = torch.tensor([3, 3, 0, 10, 5]), torch.tensor([0, 0, 2, 3, 1])
    again, entropy = fused_logprobs(repeated(hidden, rows), weight, targets, chunk_rows=2)
    expected = token_logprobs(hidden, weight, targets, rows=rows, with_entropy=True)
    torch.testing.assert_close((again, entropy), expected)
    upstream = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(again, (hidden, weight), upstream), torch.autograd.grad(expected[0], (hidden, weight), upstream)
    )


def test_without_a_choice_prompts_are_shared_where_it_pays() -> None:
    batch = make_batch(seed=1, n_groups=2, group_size=4, prompt_lens=(15, 16), answer_lens=(40, 41))
    everything, alone = range(batch.n_seqs), (0, 4)
    assert saved_by_sharing(batch, everything) == pytest.approx(6 * 15 / (8 * 55)) and not saved_by_sharing(batch, alone)
    plain, gpu = SimpleNamespace(sliding_window=None), torch.device("cuda")
    half = {"device": gpu, "dtype": torch.bfloat16, "config": plain}
    assert shares_prompts(batch, everything, **half) and not shares_prompts(batch, (0, 1), **half), (
        "15 of 110 tokens are less than 15 %"
    )
    assert not shares_prompts(batch, alone, **half)
    assert not shares_prompts(batch, everything, **(half | {"dtype": torch.float32}))
    assert not shares_prompts(batch, everything, **(half | {"config": SimpleNamespace(sliding_window=64)}))
    assert shares_prompts(batch, alone, device=torch.device("cpu"), dtype=torch.float32, config=plain)
