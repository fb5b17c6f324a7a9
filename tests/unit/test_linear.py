"""The oneDNN products equal PyTorch's own, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rl_lightning.models.linear import _OneDnnLinear, accelerate_linears, linear, onednn_pays

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch carries no oneDNN")


@onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 24)])
def test_gradients_equal_a_plain_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 56, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    y = plain(x)
    direction = torch.randn_like(y)
    y.backward(direction)
    expected = [x.grad, *(p.grad for p in plain.parameters())]

    other, x2 = copy.deepcopy(plain), x.detach().clone().requires_grad_()
    other.zero_grad()
    y2 = _OneDnnLinear.apply(x2, other.weight, other.bias)
    y2.backward(direction)
    torch.testing.assert_close(y2, y, atol=1e-5, rtol=1e-5)
    for got, want in zip([x2.grad, *(p.grad for p in other.parameters())], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@onednn
def test_a_frozen_weight_gets_no_gradient() -> None:
    weight, x = torch.randn(56, 24), torch.randn(40, 24, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(40, 24), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("x", [torch.randn(0, 24), torch.randn(3, 24), torch.randn(64, 24).bfloat16()])
def test_other_inputs_take_the_usual_path(x: torch.Tensor) -> None:
    weight = torch.randn(56, 24, dtype=x.dtype)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))


def test_accelerated_models_keep_their_names_and_results() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
    x, names = torch.randn(64, 24), list(model.state_dict())
    expected = model(x)
    assert accelerate_linears(model) == (2 if onednn_pays() else 0)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@onednn
@pytest.mark.parametrize("shape", [(37, 24), (64, 24), (3, 45, 24), (1, 1037, 24)])
def test_rows_that_are_filled_up_do_not_show(shape: tuple[int, ...]) -> None:
    weight, bias, x = torch.randn(56, 24), torch.randn(56), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
