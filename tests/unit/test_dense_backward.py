"""Which segments go to cuDNN, and together with which; what it computes is tested on GPUs (tests/gpu/test_trainer_cuda.py)."""

from __future__ import annotations

from itertools import accumulate

import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.models.dense_backward import LEAST, cut_segments, has_dense_backward


def test_short_ones_between_long_ones_go_in_runs() -> None:
    bounds = [0, *accumulate([10, 20, 5000, 30, LEAST, LEAST, LEAST - 1])]
    assert cut_segments(bounds) == ([2, 4, 5], [(0, 2), (3, 4), (6, 7)])


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=40))
def test_every_segment_is_in_one_call(lengths: list[int]) -> None:
    long, short = cut_segments([0, *accumulate(lengths)])
    assert sorted([*long, *(i for first, last in short for i in range(first, last))]) == list(range(len(lengths)))
    assert [i for i, length in enumerate(lengths) if length >= LEAST] == long


def test_not_on_a_cpu() -> None:
    assert not has_dense_backward(torch.zeros(4, 2, 64, dtype=torch.bfloat16))
