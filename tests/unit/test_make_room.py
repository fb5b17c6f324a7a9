"""A trainer rank that shares its GPU leaves room for the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl_lightning.callbacks.weight_publisher import WeightPublisher
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.engines.torch import TorchEngine


@pytest.mark.parametrize(
    ("engine", "times"), [(SGLangEngine(colocated=True, device="cpu"), 2), (SGLangEngine(device="cpu"), 0), (TorchEngine(), 0)]
)
def test_every_rank_that_shares_its_gpu_empties_its_cache(engine: Any, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the transport: with several GPUs weights go by disk, and the server on this rank's takes its memory again too."""
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    trainer: Any = SimpleNamespace(is_global_zero=False, datamodule=SimpleNamespace(engine=engine, fleet=object()), global_step=1)
    module: Any = SimpleNamespace(log_dict=lambda *args, **kwargs: None)
    publisher = WeightPublisher()
    publisher.on_train_start(trainer, module)
    publisher.on_train_batch_end(trainer, module)
    assert len(emptied) == times
