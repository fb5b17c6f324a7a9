"""Where segments lie for a plan of cuDNN; what it computes is tested on GPUs (tests/gpu/test_trainer_cuda.py)."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.models.ragged_backward import has_ragged_backward, places


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=8), st.sampled_from([8, 9, 16]))
def test_segments_keep_their_places_and_the_rest_is_empty(lengths: list[int], segments: int) -> None:
    starts = [0, *accumulate(lengths)]
    found, offsets = places(torch.tensor(starts, dtype=torch.int32), segments, 2048, 16)
    assert found.tolist() == lengths + [0] * (segments - len(lengths))
    assert found.dtype == torch.int32 and offsets.dtype == torch.int64
    padded = starts + starts[-1:] * (segments + 1 - len(starts))
    assert offsets[:, : segments + 1].tolist() == [[width * x for x in padded] for width in (2048, 16)]


@pytest.mark.parametrize("segments", [2, 3, 4])
def test_every_row_of_offsets_is_aligned(segments: int) -> None:
    _, offsets = places(torch.tensor([0, 3, 5], dtype=torch.int32), segments, 2048, 16)
    assert offsets.shape[1] > segments and offsets.stride(0) * 8 % 16 == 0 and offsets.stride(1) == 1


def test_offsets_of_many_tokens_do_not_overflow() -> None:
    _, offsets = places(torch.tensor([0, 2_000_000], dtype=torch.int32), 4, 2048)
    assert int(offsets[0, 1]) == 4_096_000_000


def test_not_on_a_cpu() -> None:
    tokens = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    assert not has_ragged_backward(tokens, tokens)
