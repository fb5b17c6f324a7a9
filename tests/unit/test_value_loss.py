"""The critic's loss against its golden value and a slow loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from objective_samples import Tokens, cuts, make_tokens, tokens
from torch import Tensor

from rl_lightning.objectives.value import value_loss


def test_golden_loss() -> None:
    values, old, returns = torch.tensor([0.5, 1, -0.2]), torch.tensor([0.1, 1.1, 0.3]), torch.tensor([1.0, 0, 0])
    loss, stats = value_loss(values, old, returns, torch.ones(3, dtype=torch.bool), value_eps_clip=0.2)
    assert float(loss) == pytest.approx(0.255)
    assert stats["value_clip_ratio"].tolist() == [1, 0, 0]
    torch.testing.assert_close(stats["value_error"], torch.tensor([0.25, 1, 0.04]))


def loss_of(x: Tokens, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens' n, o and a as values, old values and returns."""
    return value_loss(x.n, x.o, x.a, x.m, value_eps_clip=0.3, **options)


@given(tokens)
@settings(max_examples=150, deadline=None)
def test_loss_equals_a_slow_loop(x: Tokens) -> None:
    total, clipped_tokens, errors = 0.0, [0.0] * len(x.n), [0.0] * len(x.n)
    for t in x.m.nonzero().flatten().tolist():
        v, old, target = float(x.n[t]), float(x.o[t]), float(x.a[t])
        clipped = old + min(max(v - old, -0.3), 0.3)
        total += max(0.5 * (v - target) ** 2, 0.5 * (clipped - target) ** 2)
        clipped_tokens[t], errors[t] = float(abs(v - old) > 0.3 and abs(clipped - target) > abs(v - target)), (v - target) ** 2
    loss, stats = loss_of(x)
    assert float(loss) == pytest.approx(total / max(1, int(x.m.sum())), rel=1e-9, abs=1e-12)
    assert stats["value_clip_ratio"].tolist() == clipped_tokens and stats["value_error"].tolist() == pytest.approx(errors)


def test_gradient_is_the_derivative_and_adds_up_over_parts() -> None:
    x = make_tokens([4, 0, 6, 2, 7, 3, 5], seed=3)

    def gradient(y: Tokens, **options: Any) -> tuple[Tensor, Tensor]:
        n, o = y.n.clone().requires_grad_(), y.o.clone().requires_grad_()
        loss, stats = loss_of(Tokens(n, o, y.p, y.a, y.m, y.cu_seqlens), **options)
        loss.backward()
        assert o.grad is None and n.grad is not None and not any(value.requires_grad for value in stats.values())
        return loss.detach(), n.grad

    loss, slope = gradient(x)
    assert bool((slope[~x.m] == 0).all())
    assert torch.autograd.gradcheck(
        lambda n: loss_of(Tokens(n, x.o, x.p, x.a, x.m, x.cu_seqlens))[0], (x.n.clone().requires_grad_(),)
    )
    for n_parts in (1, 2, 7):
        parts = [gradient(x.part(*cut), normalizer=x.m.sum()) for cut in cuts(x.n_seqs, n_parts)]
        torch.testing.assert_close(sum(part for part, _ in parts), loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.cat([part for _, part in parts]), slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_masked_tokens_may_hold_anything(junk: float) -> None:
    values = torch.tensor([0.5, junk], requires_grad=True)
    other = torch.tensor([0.1, junk])
    loss, stats = value_loss(values, other, other, torch.tensor([True, False]), value_eps_clip=0.2)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.08)
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0.4, 0])
    assert all(float(value[1]) == 0 for value in stats.values())


def test_rounding_counts_as_no_clip() -> None:
    old = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100
    values = old + 0.1 * torch.rand(1000, generator=torch.Generator().manual_seed(1))
    _, stats = value_loss(values, old, torch.zeros(1000), torch.ones(1000, dtype=torch.bool), value_eps_clip=0.2)
    assert not stats["value_clip_ratio"].any()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="value_eps_clip=0.0 must be positive"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool), value_eps_clip=0.0)
