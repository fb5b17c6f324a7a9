"""KL estimates and the controller of their weight."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lightning.objectives.kl import KLEstimator, adapt_kl_ctl, kl_estimate

ESTIMATORS = get_args(KLEstimator)


def naive_kl(o: float, ref: float, estimator: str) -> float:
    """The three formulas."""
    return {"k1": o - ref, "k2": (o - ref) ** 2 / 2, "k3": math.exp(ref - o) - 1 - (ref - o)}[estimator]


@given(st.lists(st.tuples(st.floats(-6, 0), st.floats(-6, 0)), max_size=12), st.sampled_from(ESTIMATORS))
@settings(max_examples=150, deadline=None)
def test_estimates_equal_a_slow_loop(rows: list[tuple[float, float]], estimator: Any) -> None:
    o, ref = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in range(2))
    got = kl_estimate(o, ref, estimator=estimator)
    assert got.tolist() == pytest.approx([naive_kl(*row, estimator) for row in rows], rel=1e-9, abs=1e-12)
    assert estimator == "k1" or bool((got >= 0).all())


def test_k1_and_k3_are_the_divergence_on_average() -> None:
    policy, reference = (torch.randn(9, generator=torch.Generator().manual_seed(s)).double().log_softmax(0) for s in (0, 1))
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):
        assert float((policy.exp() * kl_estimate(policy, reference, estimator=estimator)).sum()) == pytest.approx(exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_is_the_derivative(estimator: Any) -> None:
    o, ref = (torch.randn(6, generator=torch.Generator().manual_seed(s), dtype=torch.float64).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda x, y: kl_estimate(x, y, estimator=estimator), (o, ref))


def test_k3_of_nearly_equal_policies_keeps_its_digits() -> None:
    got = kl_estimate(torch.tensor([0.0]), torch.tensor([1e-3]), estimator="k3")
    assert float(got) == pytest.approx(5.00167e-7, rel=1e-3)


@pytest.mark.parametrize(
    ("kl", "expected"),  # a fifth of 512 / 10,000 at most
    [(6.0, 0.1), (6.6, 0.100512), (60.0, 0.101024), (0.0, 0.098976), (-1.0, 0.098976)],
)
def test_the_weight_follows_the_target(kl: float, expected: float) -> None:
    assert adapt_kl_ctl(0.1, kl, target=6.0, horizon=10_000.0, n_sequences=512) == pytest.approx(expected, rel=1e-12)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="kl_estimator=k4 is unknown: choose one of k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), estimator="k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adaptive_kl_target=0.0 and adaptive_kl_horizon=1.0 must be positive"):
        adapt_kl_ctl(0.1, 1.0, target=0.0, horizon=1.0, n_sequences=1)
