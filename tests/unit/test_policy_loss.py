"""The policy loss against golden values and a slow float64 loop, in every combination of its names."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_samples import CORRECTIONS, Tokens, cuts, make_tokens, naive_aggregate, naive_weights, tokens
from torch import Tensor

from rl_lightning.objectives.aggregation import Aggregation, denominator
from rl_lightning.objectives.corrections import m2_keep
from rl_lightning.objectives.policy import Surrogate, ppo_loss

N = torch.tensor([-1, -0.5, -2, -0.1, -3])
O = torch.tensor([-1.2, -1, -1, -0.3, -1])  # noqa: E741
P = torch.tensor([-1.1, -0.6, -1.5, -0.4, -2])
A = torch.tensor([1, -1, 0.5, 2, -1.5])
M = torch.tensor([True, True, True, True, False])

PLAIN: tuple[None, dict[str, float]] = (None, {})
SURROGATES, AGGREGATIONS = get_args(Surrogate), get_args(Aggregation)
COMBINATIONS = list(product(SURROGATES, [PLAIN, *CORRECTIONS], AGGREGATIONS))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, -0.533805),
        ({"c_clip": 1.5}, -0.570985),
        ({"prox_logprobs": P}, -0.482058),
        ({"prox_logprobs": P, "behav_imp_weight_cap": 1.2}, -0.894238),
    ],
)
def test_golden_losses(options: dict[str, Any], expected: float) -> None:
    loss, _ = ppo_loss(N, O, A, M, **options)
    assert float(loss) == pytest.approx(expected, abs=2e-6)


def test_golden_statistics() -> None:
    _, stats = ppo_loss(N, O, A, M, prox_logprobs=P)
    torch.testing.assert_close(stats["importance_weight"], torch.tensor([1.105171, 1.105171, 0.606531, 1.349859, 0]))
    torch.testing.assert_close(stats["behave_imp_weight"], torch.tensor([1.105171, 1.491825, 0.606531, 0.904837, 0]))
    assert stats["actor_clip_ratio"].tolist() == [0, 0, 0, 1, 0]
    assert not any(value.requires_grad for value in stats.values())


def loss_of(x: Tokens, surrogate: Any, correction: str | None, options: dict[str, float], **more: Any) -> tuple[Tensor, Any]:
    """ppo_loss with the corrections' options under its own names; plain PPO without a correction."""
    if correction is not None:
        names = {"cap": "behav_imp_weight_cap", "floor": "behav_imp_weight_floor"}
        more |= {"prox_logprobs": x.p, "correction": correction, **{names.get(k, k): v for k, v in options.items()}}
    return ppo_loss(x.n, x.o, x.a, x.m, surrogate=surrogate, cu_seqlens=x.cu_seqlens, **more)


def naive_losses(
    x: Tokens, surrogate: str, correction: str | None, options: dict[str, float], eps: float, high: float, c: float | None
) -> list[float]:
    """The formulas, token by token, before they are summed."""
    base = x.o if correction is None else x.p
    weights, _ = ([1.0] * len(x.n), None) if correction is None else naive_weights(x, correction, options)
    losses = [0.0] * len(x.n)
    for chosen in x.loss_tokens():
        for t in chosen:
            n, a, r = float(x.n[t]), float(x.a[t]), math.exp(x.n[t] - base[t])
            if surrogate == "gspo":
                a = sum(float(x.a[s]) for s in chosen) / len(chosen)
                r = math.exp(sum(float(x.n[s] - base[s]) for s in chosen) / len(chosen))
            clipped = min(max(r, 1 - eps), 1 + high)
            loss = -clipped * a * n if surrogate == "cispo" else max(-a * r, -a * clipped)
            losses[t] = weights[t] * (loss if c is None else min(loss, c * abs(a)))
    return losses


@given(tokens, st.sampled_from(COMBINATIONS), st.sampled_from([None, 0.4]), st.sampled_from([None, 1.5, 3.0]))
@settings(max_examples=400, deadline=None)
def test_loss_equals_a_slow_loop(x: Tokens, combination: Any, high: float | None, c: float | None) -> None:
    surrogate, (correction, options), aggregation = combination
    c = None if surrogate == "cispo" else c
    loss, _ = loss_of(x, surrogate, correction, options, aggregation=aggregation, eps_clip_high=high, c_clip=c)
    losses = naive_losses(x, surrogate, correction, options, 0.2, high or 0.2, c)
    assert float(loss) == pytest.approx(naive_aggregate(losses, x.loss_tokens(), aggregation), rel=1e-9, abs=1e-12)


def gradient(x: Tokens, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the log-probabilities."""
    n = x.n.clone().requires_grad_()
    loss, _ = loss_of(Tokens(n, x.o, x.p, x.a, x.m, x.cu_seqlens), *args, **options)
    return loss.detach(), torch.autograd.grad(loss, n)[0]


@pytest.mark.parametrize(("surrogate", "aggregation"), list(product(SURROGATES, AGGREGATIONS)))
@pytest.mark.parametrize(("correction", "options"), [PLAIN, *CORRECTIONS])
def test_a_cut_minibatch_has_the_same_loss_and_gradient(
    surrogate: Any, aggregation: Any, correction: str | None, options: dict[str, float]
) -> None:
    x = make_tokens([5, 0, 6, 2, 7, 1, 4, 3, 6], seed=5)
    keep = m2_keep(x.p, x.o, x.m, threshold=0.1) if correction == "m2po" else None
    arguments, shared = (surrogate, correction, options), {"aggregation": aggregation, "eps_clip_high": 0.3}
    loss, slope = gradient(x, *arguments, **shared)
    shared["normalizer"] = denominator(x.m, x.cu_seqlens, aggregation=aggregation)
    for n_parts in (1, 2, 7):
        parts = []
        for first, last in cuts(x.n_seqs, n_parts):
            own = {} if keep is None else {"keep": keep[x.span(first, last)]}
            parts.append(gradient(x.part(first, last), *arguments, **shared, **own))
        torch.testing.assert_close(sum(part for part, _ in parts), loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.cat([part for _, part in parts]), slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("surrogate", "correction", "aggregation"),
    [
        *(("ppo", correction, "token-mean") for correction in [PLAIN, *CORRECTIONS]),
        *(("ppo", CORRECTIONS[0], aggregation) for aggregation in AGGREGATIONS[1:]),
        *(("gspo", correction, "sequence-mean-token-mean") for correction in (PLAIN, CORRECTIONS[0], CORRECTIONS[4])),
        ("gspo", CORRECTIONS[3], "token-mean"),
    ],
)
def test_gradient_is_the_derivative(surrogate: Any, correction: Any, aggregation: Any) -> None:
    x = make_tokens([4, 3, 5], seed=6)

    def loss(n: Tensor) -> Tensor:
        moved = Tokens(n, x.o, x.p, x.a, x.m, x.cu_seqlens)
        return loss_of(moved, surrogate, *correction, aggregation=aggregation, c_clip=3.0)[0]

    slope = gradient(x, surrogate, *correction, aggregation=aggregation, c_clip=3.0)[1]
    assert bool(slope.any()) and bool((slope[~x.m] == 0).all())
    assert torch.autograd.gradcheck(loss, (x.n.clone().requires_grad_(),))


@pytest.mark.parametrize("correction", [PLAIN, *CORRECTIONS])
def test_cispo_pushes_every_kept_token_by_its_clipped_ratio(correction: Any) -> None:
    x = make_tokens([4, 0, 3, 5], seed=7)
    _, slope = gradient(x, "cispo", *correction)
    weights = [1.0] * 12 if correction == PLAIN else naive_weights(x, *correction)[0]
    base = x.o if correction == PLAIN else x.p
    for t in range(12):
        push = -float((x.n - base)[t].exp().clamp(0.8, 1.2) * x.a[t]) * weights[t] / int(x.m.sum())
        assert float(slope[t]) == pytest.approx(push if x.m[t] else 0.0, rel=1e-9, abs=1e-12)


def test_gspo_gives_all_tokens_of_an_answer_one_ratio() -> None:
    n, zero, starts = torch.tensor([0.1, 0.3, -0.4, -0.2]).double(), torch.zeros(4).double(), torch.tensor([0, 3, 4])
    mask, a = torch.tensor([True, True, False, True]), torch.tensor([2.0, 0.0, 9.0, -1.0]).double()
    loss, stats = ppo_loss(n, zero, a, mask, surrogate="gspo", cu_seqlens=starts, aggregation="sequence-mean-token-mean")
    low, high = math.exp(-0.2), math.exp(0.2)
    assert stats["importance_weight"].tolist() == pytest.approx([high, high, 0, low])
    assert stats["approx_kl"].tolist() == pytest.approx([0.1, 0.3, 0, -0.2])
    assert stats["actor_clip_ratio"].tolist() == [1, 1, 0, 0]
    assert float(loss) == pytest.approx((-1 * 1.2 + low) / 2)


def test_gradient_is_only_of_the_present_policy() -> None:
    n, p, o = N.double().requires_grad_(), P.double().requires_grad_(), O.double().requires_grad_()
    ppo_loss(n, o, A.double(), M, prox_logprobs=p, c_clip=1.5)[0].backward()
    assert p.grad is None and o.grad is None and n.grad is not None and float(n.grad[4]) == 0


@pytest.mark.parametrize(("surrogate", "aggregation"), list(product(SURROGATES, AGGREGATIONS)))
@pytest.mark.parametrize(("correction", "options"), [PLAIN, *CORRECTIONS])
def test_masked_tokens_may_hold_anything(
    surrogate: Any, aggregation: Any, correction: str | None, options: dict[str, float]
) -> None:
    x = make_tokens([4, 2, 5], seed=8)

    def outcome(junk: float) -> list[Tensor]:
        """Loss, gradient and statistics with junk off the mask, so that p - o is junk as well."""
        values = (torch.where(x.m, value, off) for value, off in ((x.n, junk), (x.o, -junk), (x.p, junk), (x.a, junk)))
        y = Tokens(*values, x.m, x.cu_seqlens)
        stats = loss_of(y, surrogate, correction, options, aggregation=aggregation)[1]
        assert all(bool((value[~x.m] == 0).all()) for value in stats.values())
        return [*gradient(y, surrogate, correction, options, aggregation=aggregation), *stats.values()]

    clean = outcome(0.0)
    assert all(bool(torch.isfinite(value).all()) for value in clean)
    for junk in (torch.nan, torch.inf, -torch.inf):
        assert all(torch.equal(a, b) for a, b in zip(clean, outcome(junk), strict=True))


@pytest.mark.parametrize(("surrogate", "aggregation"), list(product(SURROGATES, AGGREGATIONS)))
def test_a_batch_without_a_loss_token_costs_nothing(surrogate: Any, aggregation: Any) -> None:
    x = make_tokens([2, 1], seed=0)
    none = Tokens(x.n, x.o, x.p, x.a, torch.zeros_like(x.m), x.cu_seqlens)
    loss, slope = gradient(none, surrogate, *CORRECTIONS[5], aggregation=aggregation)
    assert float(loss) == 0 and not bool(slope.any())


@pytest.mark.parametrize(("correction", "options"), CORRECTIONS)
def test_statistics_show_what_the_correction_does(correction: str, options: dict[str, float]) -> None:
    x = make_tokens([6, 7, 5, 6], seed=1)
    _, stats = loss_of(x, "ppo", correction, options)
    weights, dropped = naive_weights(x, correction, options)
    assert stats["behave_imp_weight"].tolist() == pytest.approx(weights)
    assert stats["behave_cap_ratio"].tolist() == dropped
    assert torch.equal(stats["behave_approx_kl"], torch.where(x.m, x.p - x.o, 0.0))
    truncated = [bool(m) and math.exp(p - o) > 1.2 for m, p, o in zip(x.m, x.p, x.o, strict=True)]
    assert stats.get("behave_truncated_ratio", torch.zeros(0)).tolist() == (truncated if correction == "tis" else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "trpo"}, "surrogate=trpo is unknown: choose one of ppo, gspo, cispo"),
        ({"surrogate": "gspo"}, "surrogate=gspo looks at whole sequences: give cu_seqlens"),
        ({"surrogate": "cispo", "c_clip": 3.0}, "c_clip=3.0 .*surrogate=cispo .*leave it at null"),
        ({"correction": "m2po"}, "correction=m2po .*prox_logprobs: give these"),
        ({"keep": M}, "keep .*prox_logprobs: give these"),
        ({"correction": "sequence-mask", "prox_logprobs": P}, "correction=sequence-mask needs behav_imp_weight_cap"),
        ({"correction": "tis", "prox_logprobs": P}, "correction=tis needs behav_imp_weight_cap"),
        ({"aggregation": "token-sum-norm"}, "aggregation=token-sum-norm looks at whole sequences: give cu_seqlens"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo_loss(N, O, A, M, **options)
