"""Where segments lie for a plan of cuDNN; what it computes is tested on GPUs (tests/gpu/test_trainer_cuda.py)."""

from __future__ import annotations

import sys
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.models.ragged_backward import has_ragged_backward, places, ragged_backward


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
    assert not has_ragged_backward(torch.zeros(4, 2, 64, dtype=torch.bfloat16))


def test_what_cudnn_refuses_is_said_and_left_to_others(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Refused(Exception):
        pass

    class Frontend(SimpleNamespace):
        cudnnGraphNotSupportedError, __version__, data_type = Refused, "1.0", SimpleNamespace(BFLOAT16=0, HALF=1, FLOAT=2)

        def backend_version(self) -> int:
            return 91900

        def pygraph(self, **_: Any) -> Any:
            raise Refused("no engine")

    module = sys.modules[ragged_backward.__module__]
    monkeypatch.setattr(module, "_frontend", lambda device: Frontend())
    monkeypatch.setattr(module, "_handle_on_stream", lambda device: None)
    tokens, starts = torch.zeros(4, 2, 64, dtype=torch.bfloat16), torch.tensor([0, 4], dtype=torch.int32)
    try:
        assert ragged_backward(*[tokens] * 5, torch.zeros(2, 4), starts, starts, 4, 4, True, 1.0) is None
    finally:
        module._plan.cache_clear()  # type: ignore[attr-defined]
    assert "nvidia-cudnn-frontend 1.0 with cuDNN 91900 makes no plan" in caplog.text and "no engine" in caplog.text
