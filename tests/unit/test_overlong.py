"""The soft overlong punishment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.objectives.overlong import overlong_penalty


def naive_penalty(length: int, longest: int, buffer: int, penalty: float) -> float:
    """Eq. 13 of the paper."""
    if length <= longest - buffer:
        return 0.0
    return penalty * ((longest - buffer) - length) / buffer if length <= longest else -penalty


def test_golden_penalties() -> None:
    got = overlong_penalty(torch.tensor([1, 8, 9, 10, 12, 13]), max_new_tokens=12, buffer=4, penalty=2.0)
    assert got.tolist() == [0, 0, -0.5, -1, -2, -2] and got.dtype == torch.float32


@given(st.lists(st.integers(0, 60)), st.integers(1, 50), st.floats(0, 1), st.floats(0, 3))
def test_penalties_equal_a_slow_loop(lengths: list[int], longest: int, share: float, penalty: float) -> None:
    buffer = max(1, int(share * longest))
    got = overlong_penalty(torch.tensor(lengths, dtype=torch.int32), max_new_tokens=longest, buffer=buffer, penalty=penalty)
    assert got.tolist() == pytest.approx([naive_penalty(n, longest, buffer, penalty) for n in lengths], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer": 13, "penalty": 1.0}, "buffer of 13 tokens .*max_new_tokens=12"),
        ({"buffer": 0, "penalty": 1.0}, "buffer of 0 tokens"),
        ({"buffer": 4, "penalty": -1.0}, "penalty of -1.0 .*must not be negative"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.tensor([1]), max_new_tokens=12, **options)
