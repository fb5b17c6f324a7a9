"""The fused log-probabilities equal the plain ones, however they are cut and whatever is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rl_lightning.models.fused_logprobs import even_parts, fused_logprobs
from rl_lightning.models.logprobs import token_logprobs

ROWS, WIDTH, VOCABULARY = 37, 8, 50


def inputs(with_bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, dtype=torch.float64, requires_grad=True) for n in (ROWS, VOCABULARY))
    bias = torch.randn(VOCABULARY, dtype=torch.float64, requires_grad=True) if with_bias else None
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (ROWS,))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("keep_bytes", [0.0, 3000.0, 1e9])
def test_fused_equals_log_softmax(with_bias: bool, chunk_rows: int, keep_bytes: float) -> None:
    hidden, weight, bias, targets = inputs(with_bias)
    options = {"bias": bias, "temperature": 0.7}
    got, entropy = fused_logprobs(hidden, weight, targets, chunk_rows=chunk_rows, keep_bytes=keep_bytes, **options)  # type: ignore[arg-type]
    all_logprobs = (torch.nn.functional.linear(hidden, weight, bias) / 0.7).log_softmax(1)
    torch.testing.assert_close(got, all_logprobs[torch.arange(ROWS), targets])
    torch.testing.assert_close(entropy, -(all_logprobs.exp() * all_logprobs).sum(1))
    trained, upstream = [x for x in (hidden, weight, bias) if x is not None], torch.randn(ROWS, dtype=torch.float64)
    expected = torch.autograd.grad((all_logprobs[torch.arange(ROWS), targets] * upstream).sum(), trained)
    torch.testing.assert_close(torch.autograd.grad((got * upstream).sum(), trained), expected)


def test_fused_equals_chunked_in_half_precision() -> None:
    hidden, weight, _, targets = inputs(False)
    halves = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    fused, _ = fused_logprobs(halves[0], halves[1], targets, chunk_rows=10)
    chunked, _ = token_logprobs(halves[0], halves[1], targets, chunk_logits=10 * VOCABULARY)
    torch.testing.assert_close(fused, chunked, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x.sum(), halves) for x in (fused, chunked)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("n_rows", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (6913, 6912), (32768, 7067), (20_000, 6912)])
def test_parts_cover_all_rows_and_are_even(n_rows: int, most: int) -> None:
    parts = even_parts(n_rows, most)
    sizes = [part.stop - part.start for part in parts]
    assert sum(sizes) == n_rows and max(sizes) <= most
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert len(parts) == max(1, -(-n_rows // most)) and min(sizes) >= max(sizes) - 128 * len(parts)
