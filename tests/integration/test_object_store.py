"""Weights go from a trainer's process through Ray's object store into a TorchEngine that is generating in another."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rl_lightning.engines.torch import TorchEngine
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.types import GenerationRequest, SamplingParams
from rl_lightning.weights.object_store import ObjectStoreTransport
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.transport import WeightTarget


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_positions=4096)


@pytest.fixture(scope="module")
def actor(ray_cluster: str, tiny: Path) -> Any:
    made = ray.remote(num_cpus=0)(TorchEngine).remote()
    ray.get(made.start.remote(str(tiny)), timeout=120)
    yield made
    ray.kill(made)


def test_weights_reach_an_engine_in_mid_answer(actor: Any, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    request = GenerationRequest("r", (5, 6, 7), SamplingParams(max_new_tokens=2500, min_new_tokens=2500), seed=1)
    answer = actor.generate.remote(request)
    ray.get(
        actor.generate.remote(GenerationRequest("s", (8, 9), SamplingParams(max_new_tokens=20, min_new_tokens=20))), timeout=60
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    transport = ObjectStoreTransport(bucket_bytes=100_000)
    update = transport.stage(5, NamedWeights(model.named_parameters()), [WeightTarget("engine")])[0]
    assert all(isinstance(bucket["data"], ray.ObjectRef) for bucket in update.payload["buckets"])
    assert ray.get(actor.update_weights.remote(update), timeout=60) > 0
    transport.release()

    completion = ray.get(answer, timeout=60)
    assert set(completion.versions) == {0, 5}
    ids = torch.tensor([[*request.prompt_ids, *completion.token_ids.tolist()]])
    with torch.no_grad():
        expected = model(ids).logits[0, 2:-1].log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0].numpy()
    new = completion.versions == 5
    np.testing.assert_allclose(completion.logprobs[new], expected[new], atol=1e-4)


def stored_objects(address: str) -> int:
    from ray._private.internal_api import memory_summary

    return int(re.search(r"Plasma memory usage .* MiB, (\d+) objects", memory_summary(address, stats_only=True))[1])  # type: ignore[index]


def test_released_weights_leave_the_store(actor: Any, ray_cluster: str, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = list(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).named_parameters())
    transport = ObjectStoreTransport(bucket_bytes=150_000)
    for version in (6, 7):
        update = transport.stage(version, NamedWeights(weights), [WeightTarget("engine")])[0]
        ray.get(actor.update_weights.remote(update), timeout=60)
        left = stored_objects(ray_cluster) - len(update.payload["buckets"])
        assert left >= 0
        transport.release()
        del update
        deadline = time.monotonic() + 10
        while stored_objects(ray_cluster) > left:
            assert time.monotonic() < deadline, f"the store still holds released weights of update {version} after 10 s"
            time.sleep(0.1)
