"""The running mean and spread against a slow loop, and what it keeps."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lightning.objectives.normalization import RunningNorm


def feed(norm: RunningNorm, values: Tensor) -> None:
    """One update with these values."""
    norm.update(values.sum(), values.square().sum(), len(values))


def naive_mean_and_spread(batches: list[list[float]], beta: float) -> tuple[float, float]:
    """Weights of the batches written out, normalised to 1."""
    weights = [beta ** (len(batches) - 1 - k) for k in range(len(batches))]
    mean = sum(w * sum(x) / len(x) for w, x in zip(weights, batches, strict=True)) / sum(weights)
    square = sum(w * sum(y * y for y in x) / len(x) for w, x in zip(weights, batches, strict=True)) / sum(weights)
    return mean, math.sqrt(max(square - mean**2, 1e-2))


@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=1, max_size=6), min_size=1, max_size=8),
    st.sampled_from([0.99995, 0.9, 0.0]),
    st.lists(st.floats(-20, 20), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_norm_equals_a_slow_loop(batches: list[list[float]], beta: float, given_values: list[float]) -> None:
    norm, x = RunningNorm(beta), torch.tensor(given_values, dtype=torch.float64)
    for batch in batches:
        feed(norm, torch.tensor(batch, dtype=torch.float64))
    mean, spread = naive_mean_and_spread(batches, beta)
    torch.testing.assert_close(norm.normalize(x), (x - mean) / spread, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.denormalize(x), x * spread + mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.denormalize(norm.normalize(x)), x)


def test_it_is_the_identity_until_it_knows_something() -> None:
    norm, x = RunningNorm(), torch.tensor([-3.0, 0.1, 7.0])
    norm.update(0.0, 0.0, 0)
    assert torch.equal(norm.normalize(x), x) and torch.equal(norm.denormalize(x), x)


def test_one_update_gives_zero_mean_and_unit_spread() -> None:
    norm, x = RunningNorm(), torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 40
    feed(norm, x.double())
    y = norm.normalize(x)
    assert y.dtype == torch.float32
    assert float(y.mean()) == pytest.approx(0, abs=1e-5) and float(y.std(correction=0)) == pytest.approx(1, rel=1e-5)


def test_equal_returns_are_divided_by_the_floor() -> None:
    norm = RunningNorm()
    feed(norm, torch.full((5,), 2.0).double())
    assert norm.normalize(torch.tensor([2.0, 2.1])).tolist() == pytest.approx([0, 1], abs=1e-5)


def test_state_survives_saving_and_a_cast_of_the_model() -> None:
    model, again = torch.nn.ModuleDict({"norm": RunningNorm()}), torch.nn.ModuleDict({"norm": RunningNorm()})
    for seed in range(3):
        feed(model["norm"], torch.randn(9, generator=torch.Generator().manual_seed(seed)).double())  # type: ignore[arg-type]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    for other in (again, model.to(torch.bfloat16), model.float()):
        for name, value in other.state_dict().items():
            assert value.dtype == torch.float64 and torch.equal(value, again.state_dict()[name]) and float(value) != 0


def test_gradients_pass_through_but_not_into_the_statistics() -> None:
    norm, x = RunningNorm(), torch.tensor([1.0, 2.0], requires_grad=True)
    norm.update(x.sum(), x.square().sum(), 2)
    norm.denormalize(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == pytest.approx([0.5, 0.5]) and not norm.first_moment.requires_grad


def test_bad_input_is_refused() -> None:
    for options in ({"beta": 1.0}, {"variance_floor": 0.0}):
        with pytest.raises(ValueError, match="need 0 <= beta < 1 and variance_floor > 0"):
            RunningNorm(**options)
