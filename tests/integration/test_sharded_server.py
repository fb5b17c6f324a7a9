"""SGLang servers of several ranks, tensor-parallel and in pipeline stages: exact before, across and after weight updates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rl_lightning.engines.engine import WeightMismatchError
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.engines.sglang_args import parallel_sizes
from rl_lightning.models.tiny import write_tiny_model
from rl_lightning.weights.disk import DiskTransport
from rl_lightning.weights.source import NamedWeights
from tests.integration.running_engine import PROMPT, VOCABULARY, Running, mixed_logprobs


@pytest.fixture(scope="module", params=[{"tp_size": 2}, {"pp_size": 2}], ids=["tensor", "pipeline"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("models")
    folders = [write_tiny_model(root / f"seed{i}", characters=VOCABULARY, layers=4, seed=i) for i in range(2)]
    running = Running(SGLangEngine(device="cpu", server_args=request.param), folders)
    try:
        running.run(running.engine.start(str(folders[0])), 300)
        yield running
    finally:
        running.close()


def test_answers_cross_updates_exactly(running: Running) -> None:
    for name in running.engine.transports:
        before = running.version
        futures = running.ask_later(4, max_new_tokens=400)
        time.sleep(0.4)
        running.publish(1 - before % 2, name)
        completions = [future.result(120) for future in futures]
        assert any(set(c.versions.tolist()) == {before, before + 1} for c in completions)
        for completion in completions:
            under = [running.logprobs(version, completion) for version in (before, before + 1)]
            np.testing.assert_allclose(completion.logprobs, np.where(completion.versions == before, *under), atol=1e-3)


@pytest.mark.parametrize("running", [{"tp_size": 2}], ids=["tensor"], indirect=True)
def test_all_ranks_keep_their_keys(running: Running) -> None:
    assert isinstance(engine := running.engine, SGLangEngine)
    engine.keep_cache = True
    try:
        before = running.version
        futures = running.ask_later(4, max_new_tokens=400)
        running.ask(max_new_tokens=30)
        running.publish(1 - before % 2)
        completions = [future.result(120) for future in futures]
    finally:
        engine.keep_cache = False
    assert any(set(c.versions.tolist()) == {before, before + 1} for c in completions)
    for completion in completions:
        np.testing.assert_allclose(completion.logprobs, mixed_logprobs(running.live, completion, PROMPT), atol=1e-3)


def test_every_sampled_value_of_every_rank_counts(running: Running, tmp_path: Path) -> None:
    engine = running.engine
    assert isinstance(engine, SGLangEngine) and engine._receiver is not None
    model = running.live[running.version]
    [update] = DiskTransport(tmp_path).stage(9, NamedWeights(model.named_parameters()), [engine.target])
    assert update.fingerprint is not None
    running.run(engine._receiver.prove(9, update.fingerprint))
    for name, sample in update.fingerprint.items():
        for at in range(0, len(sample.values), 100):
            values = [value + (i == at) for i, value in enumerate(sample.values)]
            with pytest.raises(WeightMismatchError, match=f"{name} differs in 1 of"):
                running.run(engine._receiver.prove(9, {**update.fingerprint, name: sample._replace(values=tuple(values))}))


def test_a_server_of_several_ranks_says_how_many_take_part(running: Running) -> None:
    engine = running.engine
    assert isinstance(engine, SGLangEngine)
    tensor_size, pipeline_size = parallel_sizes(engine.server_args)
    assert engine.target.ranks == tensor_size
    assert engine.transports == (("disk", "tensor", "distributed") if pipeline_size == 1 else ("disk",))
    asyncio.run_coroutine_threadsafe(engine.health(), running.loop).result(60)
