"""Which segments go to cuDNN, and together with which; what it computes is tested on GPUs (tests/gpu/test_trainer_cuda.py)."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.models.dense_backward import LEAST, MOST_TOGETHER, STEP, cut_segments, has_dense_backward


def bounds_of(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def test_equal_lengths_go_together_by_powers_of_two() -> None:
    long, short = cut_segments(bounds_of([2047] * 11))
    assert [(length, len(segments)) for length, segments in long] == [(2048, 8), (2048, 2), (2048, 1)] and short == []


def test_short_ones_between_long_ones_go_in_runs() -> None:
    long, short = cut_segments(bounds_of([10, 20, 3000, 30, 5000, 3072]))
    assert long == [(3072, [(30, 3000), (8060, 3072)]), (5120, [(3060, 5000)])]
    assert short == [(0, 2), (3, 4)]


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=40))
def test_every_row_is_in_one_call(lengths: list[int]) -> None:
    bounds = bounds_of(lengths)
    long, short = cut_segments(bounds)
    for length, segments in long:
        assert length >= LEAST and length % STEP == 0 and len(segments) in (1, 2, 4, MOST_TOGETHER)
        assert all(length - STEP < n <= length for _, n in segments)
    whole = [(start, start + n) for _, segments in long for start, n in segments]
    runs = [(bounds[first], bounds[last]) for first, last in short]
    assert sorted([*whole, *runs])[0][0] == 0 and sorted([*whole, *runs])[-1][1] == bounds[-1]
    assert all(a[1] == b[0] for a, b in zip(sorted([*whole, *runs]), sorted([*whole, *runs])[1:], strict=False))


def test_not_on_a_cpu() -> None:
    assert not has_dense_backward(torch.zeros(4, 2, 64, dtype=torch.bfloat16))
