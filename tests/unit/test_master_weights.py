"""Half-precision weights with float32 copies are trained as float32 weights are, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_samples import Alone, fit, make_batch, write_model

from rl_lightning.modules.master_weights import MasterWeights
from rl_lightning.modules.optimizer import OptimizerConfig, trained_by


def make_layer(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16).bfloat16().to(dtype)
    return layer


def train(layer: nn.Linear, optimizer: Any, steps: int, first: int = 0, micro_batches: int = 3) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(micro_batches):
            generator = torch.Generator().manual_seed(100 * step + part)
            x = torch.randn(8, 16, generator=generator).bfloat16().to(layer.weight.dtype)
            (layer(x) - x.flip(1)).float().square().mean().backward()
        optimizer.step()


def weights(layer: nn.Linear) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in layer.parameters()])


def test_small_updates_are_not_lost() -> None:
    moved = {}
    for name, dtype, master in (
        ("float32", torch.float32, True),
        ("masters", torch.bfloat16, True),
        ("bare", torch.bfloat16, False),
    ):
        layer = make_layer(dtype)
        start = weights(layer)
        optimizer = OptimizerConfig(lr=2e-5, master_weights=master).make_optimizer(layer)
        train(layer, optimizer, 100)
        moved[name] = torch.cat([p.detach().float().reshape(-1) for p in trained_by(optimizer)]) - start
    far = moved["float32"].norm()
    assert float((moved["masters"] - moved["float32"]).norm() / far) < 0.1
    assert float((moved["bare"] - moved["float32"]).norm() / far) > 0.5, "without copies it would not have been worth it"


def test_weights_are_the_copies_rounded_and_hold_no_gradient() -> None:
    layer = make_layer(torch.bfloat16)
    optimizer = OptimizerConfig().make_optimizer(layer)
    train(layer, optimizer, 2)
    for weight, master in zip((layer.weight, layer.bias), trained_by(optimizer), strict=True):
        assert weight.grad is None and master.dtype == torch.float32
        assert torch.equal(weight, master.bfloat16())


def test_resumes_exactly() -> None:
    through, until, after = (make_layer(torch.bfloat16) for _ in range(3))
    optimizers = [OptimizerConfig(lr=1e-4).make_optimizer(layer) for layer in (through, until, after)]
    train(through, optimizers[0], 8)
    train(until, optimizers[1], 4)
    after.load_state_dict(until.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    train(after, optimizers[2], 4, first=4)
    assert torch.equal(weights(after), weights(through))
    assert all(torch.equal(a, b) for a, b in zip(trained_by(optimizers[2]), trained_by(optimizers[0]), strict=True))


def test_the_module_trains_half_precision_as_float32(tmp_path: Path) -> None:
    folder, batches, moved = write_model(tmp_path), [make_batch(seed) for seed in range(4)], []
    for dtype in ("float32", "bfloat16"):
        module = Alone(folder, dtype=dtype, optimizer=OptimizerConfig(lr=1e-3), max_tokens_per_mb=64)
        module.configure_model()
        start = torch.cat([p.detach().float().reshape(-1) for p in module.model.parameters()])
        trainer = fit(module, batches)
        optimizer = trainer.optimizers[0]
        assert isinstance(optimizer, MasterWeights) == (dtype == "bfloat16")
        moved.append(torch.cat([p.detach().float().reshape(-1) for p in module.model.parameters()]) - start)
    assert float(nn.functional.cosine_similarity(*moved, dim=0)) > 0.9


@pytest.mark.parametrize("master", [True, False])
def test_float32_weights_have_no_copies(master: bool) -> None:
    layer = make_layer(torch.float32)
    optimizer = OptimizerConfig(master_weights=master).make_optimizer(layer)
    assert not isinstance(optimizer, MasterWeights)
    assert trained_by(optimizer)[0] is layer.weight
