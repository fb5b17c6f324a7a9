"""Importance weights, M2PO's selection and the approximate pi_prox against slow loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_samples import CORRECTIONS, Tokens, make_tokens, naive_m2_keep, naive_weights, tokens

from rl_lightning.objectives.corrections import approximate_prox, importance_weights, m2_keep


@pytest.mark.parametrize(("correction", "options"), CORRECTIONS)
@given(x=tokens)
@settings(max_examples=60, deadline=None)
def test_weights_equal_a_slow_loop(correction: Any, options: dict[str, Any], x: Tokens) -> None:
    weight, dropped = importance_weights(x.p, x.o, x.m, correction=correction, cu_seqlens=x.cu_seqlens, **options)
    expected, expected_dropped = naive_weights(x, correction, options)
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert dropped.tolist() == expected_dropped


@pytest.mark.parametrize(("correction", "options"), CORRECTIONS)
def test_each_correction_acts_on_the_tokens_of_these_tests(correction: Any, options: dict[str, Any]) -> None:
    x = make_tokens([6, 7, 5, 6], seed=1)
    weight, dropped = importance_weights(x.p, x.o, x.m, correction=correction, cu_seqlens=x.cu_seqlens, **options)
    acts = (weight != (x.p - x.o).exp()) & x.m
    assert bool(acts.any()) == bool(options) and not bool(acts[x.m].all())
    assert bool(dropped.any()) == (bool(options) and correction != "tis")


def test_golden_weights() -> None:
    o, p = torch.tensor([-1.2, -1, -1, -0.3]), torch.tensor([-1.1, -0.6, -1.5, -0.4])
    mask, starts = torch.ones(4, dtype=torch.bool), torch.tensor([0, 2, 4])

    def weights(correction: Any, **options: Any) -> torch.Tensor:
        return importance_weights(p, o, mask, correction=correction, cu_seqlens=starts, **options)[0]

    for correction, options, expected in [
        ("decoupled", {}, [1.105171, 1.491825, 0.606531, 0.904837]),
        ("decoupled", {"cap": 1.2}, [1.105171, 0, 0.606531, 0.904837]),
        ("tis", {"cap": 1.2}, [1.105171, 1.2, 0.606531, 0.904837]),
        ("icepop", {"cap": 1.2, "floor": 0.7}, [1.105171, 0, 0, 0.904837]),
        ("sequence-mask", {"cap": 1.3, "floor": 0.8}, [1.105171, 1.491825, 0, 0]),  # geometric means 1.284, 0.741
        ("m2po", {"m2_threshold": 0.07}, [1.105171, 1.491825, 0, 0.904837]),  # .01, .16, .25, .01: mean .06 without the third
    ]:
        torch.testing.assert_close(weights(correction, **options), torch.tensor(expected))


@given(tokens, st.floats(0, 0.5))
@settings(max_examples=100, deadline=None)
def test_m2_selection_equals_a_slow_loop(x: Tokens, threshold: float) -> None:
    assert set(m2_keep(x.p, x.o, x.m, threshold=threshold).nonzero().flatten().tolist()) == naive_m2_keep(x, threshold)


def test_m2_selection_keeps_the_earlier_of_equal_tokens_and_drops_the_endless() -> None:
    p, o = torch.zeros(5), torch.tensor([0.5, -0.5, 0.1, 0.5, -torch.inf])
    assert m2_keep(p, o, torch.ones(5, dtype=torch.bool), threshold=0.14).tolist() == [True, False, True, False, False]


def test_who_saw_the_whole_minibatch_selects_for_its_parts() -> None:
    x = make_tokens([6, 7, 5, 6], seed=2)
    keep = m2_keep(x.p, x.o, x.m, threshold=0.1)
    whole, _ = importance_weights(x.p, x.o, x.m, correction="m2po", m2_threshold=0.1)
    pieces = [(x.part(i, i + 1), keep[x.span(i, i + 1)]) for i in range(4)]
    parts = [importance_weights(y.p, y.o, y.m, correction="m2po", m2_threshold=0.0, keep=k)[0] for y, k in pieces]
    assert torch.equal(torch.cat(parts), whole)
    alone = [importance_weights(y.p, y.o, y.m, correction="m2po", m2_threshold=0.1)[0] for y, _ in pieces]
    assert not torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize(("correction", "options"), CORRECTIONS)
def test_tokens_not_kept_are_dropped_by_every_correction(correction: Any, options: dict[str, Any]) -> None:
    x = make_tokens([6, 7, 5], seed=3)
    keep = torch.arange(18) % 3 > 0
    weight, dropped = importance_weights(x.p, x.o, x.m, correction=correction, keep=keep, cu_seqlens=x.cu_seqlens, **options)
    free, also = importance_weights(x.p, x.o, x.m, correction=correction, cu_seqlens=x.cu_seqlens, **options)
    if correction != "m2po":
        assert torch.equal(dropped, (also | ~keep) & x.m) and torch.equal(weight, torch.where(keep, free, 0.0))
    else:
        assert torch.equal(dropped, ~keep & x.m)


def test_weights_have_no_gradient_and_an_endless_one_is_handled() -> None:
    p, mask = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True), torch.tensor([True, True, False])
    o = torch.tensor([-torch.inf, -1.0, torch.nan])
    for correction, options, expected in [("tis", {"cap": 2.0}, [2, 1, 0]), ("decoupled", {"cap": 2.0}, [0, 1, 0])]:
        weight, _ = importance_weights(p, o, mask, correction=correction, **options)  # type: ignore[arg-type]
        assert not weight.requires_grad and weight.tolist() == expected


def test_a_broken_number_is_not_dropped_silently() -> None:
    p, mask = torch.tensor([torch.nan, -1.0]), torch.ones(2, dtype=torch.bool)
    weight, dropped = importance_weights(p, torch.full((2,), -1.0), mask, correction="icepop", cap=2.0, floor=0.5)
    assert math.isnan(float(weight[0])) and dropped.tolist() == [False, False]


@given(tokens, st.integers(0, 9), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_approximate_prox_equals_a_slow_loop(x: Tokens, version: int, seed: int) -> None:
    versions = torch.randint(0, version + 1, x.n.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    n = x.n.clone().requires_grad_()
    got = approximate_prox(n, x.o, versions, version=version)
    assert not got.requires_grad
    for t in x.m.nonzero().flatten().tolist():
        v, now, then = int(versions[t]), float(x.n[t]), float(x.o[t])
        share = min(max((version - v) / (version + 1 - v), 0.0), 1.0)
        assert float(got[t]) == pytest.approx(then + share * (now - then), rel=1e-12, abs=1e-12)


def test_approximate_prox_of_new_and_old_tokens() -> None:
    n, o, versions = torch.full((4,), -2.0), torch.full((4,), -1.0), torch.tensor([7, 6, 4, 8])
    assert approximate_prox(n, o, versions, version=7).tolist() == [-1, -1.5, -1.75, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "clip"}, "correction=clip is unknown: choose one of decoupled, tis"),
        ({"correction": "tis"}, "correction=tis needs behav_imp_weight_cap: set it"),
        ({"correction": "icepop", "cap": 2.0}, "correction=icepop needs behav_imp_weight_floor: set it"),
        ({"correction": "sequence-mask", "floor": 0.5}, "correction=sequence-mask needs behav_imp_weight_cap: set it"),
        ({"correction": "sequence-mask", "cap": 2.0, "floor": 0.5}, "correction=sequence-mask looks at whole sequences"),
        ({"correction": "icepop", "cap": 0.5, "floor": 2.0}, "behav_imp_weight_floor=2.0 lies above behav_imp_weight_cap=0.5"),
        ({"correction": "decoupled", "floor": 0.5}, "correction=decoupled makes no use of behav_imp_weight_floor=0.5"),
        ({"correction": "m2po", "cap": 2.0}, "correction=m2po makes no use of behav_imp_weight_cap=2.0"),
        ({"correction": "m2po", "m2_threshold": -1.0}, "m2_threshold=-1.0 .*must not be negative"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    x = make_tokens([3], seed=0)
    with pytest.raises(ValueError, match=message):
        importance_weights(x.p, x.o, x.m, **options)
