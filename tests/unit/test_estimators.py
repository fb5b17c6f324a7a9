"""The named advantage estimators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_lightning.objectives.estimators import ESTIMATORS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gae", [1, 0, 0, 1, 1, 1, 1, 1]),
        ("grpo", [0.86601, -0.86601, -0.86601, 0.86601, 0, 0, 0, 0]),
        ("dr_grpo", [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]),
        ("rloo", [0.666667, -0.666667, -0.666667, 0.666667, 0, 0, 0, 0]),
        ("reinforce++", [1, 0, 0, 1, 1, 1, 1, 1]),
        ("reinforce++-baseline", [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]),
    ],
)
def test_golden_scores(name: str, expected: list[float]) -> None:
    rewards, groups = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]), torch.tensor([7, 7, 7, 7, 2, 2, 2, 2])
    got = ESTIMATORS[name].normalize_scores(rewards, groups)
    torch.testing.assert_close(got, torch.tensor(expected).float(), atol=1e-5, rtol=0)


def naive_score(name: str, own: float, others: list[float]) -> float:
    """What the papers say about one score of a group."""
    group = [own, *others]
    mean = sum(group) / len(group)
    if name == "rloo":
        return own - sum(others) / len(others)
    if name == "grpo":
        return (own - mean) / (math.sqrt(sum((x - mean) ** 2 for x in group) / (len(group) - 1)) + 1e-5)
    return own - mean if name in ("dr_grpo", "reinforce++-baseline") else own


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=5), min_size=1, max_size=4), st.sampled_from(sorted(ESTIMATORS)))
@settings(max_examples=150, deadline=None)
def test_scores_equal_a_slow_loop(groups: list[list[float]], name: str) -> None:
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    scores = torch.tensor([x for group in groups for x in group], dtype=torch.float64)
    expected = [naive_score(name, x, [*group[:i], *group[i + 1 :]]) for group in groups for i, x in enumerate(group)]
    assert ESTIMATORS[name].normalize_scores(scores, ids).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_which_are_normalised_over_the_batch() -> None:
    over_batch = {name: estimator.over_batch for name, estimator in ESTIMATORS.items()}
    assert [name for name, value in over_batch.items() if value] == ["reinforce++", "reinforce++-baseline"]
    assert [name for name, value in over_batch.items() if value is None] == ["gae"]  # as adv_norm says
