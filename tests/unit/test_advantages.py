"""GAE and normalisation against golden values and slow float64 loops."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lightning.objectives.advantages import gae, normalize, scale_rewards

REWARDS, VALUES = torch.tensor([0.0, 0, 1, 0, -1]), torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 0.7])
STARTS = torch.tensor([0, 3, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("discount", "lam", "truncated", "advantages", "returns"),
    [
        (1.0, 1.0, [0, 0], [0.5, 0.6, 0.7, -1.1, -1.6], [1, 1, 1, -1, -1]),
        (0.9, 0.5, [1, 1], [-0.0203, 0.266, 0.88, 0.0035, -0.97], [0.4797, 0.666, 1.18, 0.1035, -0.37]),
    ],
)
def test_golden_gae(discount: float, lam: float, truncated: list[int], advantages: list[float], returns: list[float]) -> None:
    cut = torch.tensor(truncated, dtype=torch.bool)
    got = gae(REWARDS, VALUES, STARTS, cut, discount=discount, gae_lambda=lam)
    torch.testing.assert_close(got[0], torch.tensor(advantages), atol=5e-5, rtol=0)
    torch.testing.assert_close(got[1], torch.tensor(returns, dtype=torch.float32), atol=5e-5, rtol=0)


def naive_gae(r: Tensor, v: Tensor, truncated: bool, discount: float, lam: float) -> list[float]:
    """One sequence, last token first."""
    advantages, ahead = [], 0.0
    for t in reversed(range(len(r))):
        following = float(v[t + 1]) if t + 1 < len(r) or truncated else 0.0
        ahead = float(r[t]) + discount * following - float(v[t]) + discount * lam * ahead
        advantages.append(ahead)
    return advantages[::-1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_gae_equals_a_slow_loop(lengths: list[int], discount: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    r = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    v = [torch.randn(n + 1, generator=generator, dtype=torch.float64) for n in lengths]
    truncated = torch.randint(2, (len(lengths),), generator=generator).bool()
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    got, returns = gae(torch.cat(r), torch.cat(v), starts, truncated, discount=discount, gae_lambda=lam)
    want = [a for i in range(len(lengths)) for a in naive_gae(r[i], v[i], bool(truncated[i]), discount, lam)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returns, got + torch.cat([x[:-1] for x in v]))


def test_gae_is_fast() -> None:
    rewards, values, starts = torch.randn(100_000), torch.randn(101_000), torch.arange(0, 100_001, 100)
    durations = []
    for _ in range(5):
        begin = time.perf_counter()
        gae(rewards, values, starts, torch.zeros(1000, dtype=torch.bool), discount=0.99, gae_lambda=0.95)
        durations.append(time.perf_counter() - begin)
    assert min(durations) < 0.05


def test_gae_refuses_values_of_another_length() -> None:
    with pytest.raises(ValueError, match="5 rewards in 2 sequences need 7 values, got 5"):
        gae(REWARDS, VALUES[:5], STARTS, torch.zeros(2), discount=1, gae_lambda=1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mean_level": "group", "std_level": "group"}, [0.86601, -0.86601, -0.86601, 0.86601, 0, 0, 0, 0]),
        ({"mean_level": "group", "std_level": None}, [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]),
        (
            {"mean_level": "group", "std_level": None, "leave_one_out": True},
            [0.666667, -0.666667, -0.666667, 0.666667, 0, 0, 0, 0],
        ),
        ({"mean_level": "batch", "std_level": "batch"}, [0.54005, -1.62015, -1.62015, *[0.54005] * 5]),
        ({"mean_level": None, "std_level": None}, [1, 0, 0, 1, 1, 1, 1, 1]),
    ],
)
def test_golden_normalisations(options: dict[str, Any], expected: list[float]) -> None:
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), torch.tensor([7, 7, 7, 7, 2, 2, 2, 2])
    torch.testing.assert_close(normalize(rewards, groups, **options), torch.tensor(expected).float(), atol=1e-5, rtol=0)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=20),
    st.sampled_from(["group", "batch", None]),
    st.sampled_from(["group", "batch", None]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_normalisation_equals_a_slow_loop(rows: list[tuple[int, float]], mean: Any, std: Any, unbiased: bool) -> None:
    ids, values = torch.tensor([g for g, _ in rows]), torch.tensor([x for _, x in rows], dtype=torch.float64)
    got = normalize(values, ids, mean_level=mean, std_level=std, unbiased=unbiased)
    for i, (group, x) in enumerate(rows):
        peers = {"group": [y for g, y in rows if g == group], "batch": [y for _, y in rows], None: [0.0]}
        expected = x - sum(peers[mean]) / len(peers[mean])
        if std is not None:
            ys = peers[std]
            middle = sum(ys) / len(ys)
            variance = sum((y - middle) ** 2 for y in ys) / max(1, len(ys) - unbiased)
            expected /= math.sqrt(variance) + 1e-5
        assert float(got[i]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_leave_one_out_needs_company() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        normalize(torch.ones(3), torch.tensor([0, 0, 1]), mean_level="group", std_level=None, leave_one_out=True)


def test_rewards_are_shifted_scaled_and_clipped() -> None:
    scores = scale_rewards(torch.tensor([1.0, -1.0, 9.0]), bias=0.5, scaling=5.0, clip=20.0)
    assert scores.tolist() == [2.5, -7.5, 20.0]
