from __future__ import annotations

import asyncio
import pickle

import pytest

from rl_lightning.engines.engine import Engine, EngineError, WeightMismatchError
from rl_lightning.rewards.reward import Reward
from rl_lightning.testing import FakeEngine, FakePrompts, FakeReward, FakeTokenizer, FakeTransport, fake_logprob
from rl_lightning.types import GenerationRequest, SamplingParams
from rl_lightning.weights.transport import WeightTransport, WeightUpdate


def request(seed: int = 0, max_new_tokens: int = 16) -> GenerationRequest:
    return GenerationRequest(f"r{seed}", (1, 2), SamplingParams(max_new_tokens=max_new_tokens), seed)


def count_to_ten(_: GenerationRequest) -> list[int]:
    return list(range(10))


def update(version: int) -> WeightUpdate:
    return WeightUpdate(version, "object_store", {}, {})


def test_fakes_satisfy_their_protocols_and_pickle() -> None:
    for fake, protocol in [(FakeEngine(), Engine), (FakeReward(), Reward), (FakeTransport(), WeightTransport)]:
        assert isinstance(pickle.loads(pickle.dumps(fake)), protocol)
    assert FakePrompts(3)[2].query_id == "q2"
    assert FakeTokenizer().decode(FakeTokenizer().encode("3+4=")) == "3+4="


def test_answer_crosses_an_update_and_names_both_versions() -> None:
    async def scenario() -> None:
        engine = FakeEngine(count_to_ten, seconds_per_token=0.005)
        await engine.start("model")
        task = asyncio.create_task(engine.generate(request()))
        while engine.running == 0:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        await engine.update_weights(update(1))
        done = await task
        assert done.token_ids.tolist() == list(range(10))
        assert set(done.versions.tolist()) == {0, 1} and sorted(done.versions) == done.versions.tolist()
        assert done.logprobs[-1] == pytest.approx(fake_logprob(9, 1)) and done.finish_reason == "stop"

    asyncio.run(scenario())


def test_cut_answers_finish_by_length() -> None:
    async def scenario() -> None:
        engine = FakeEngine(count_to_ten)
        await engine.start("model")
        done = await engine.generate(request(max_new_tokens=4))
        assert (len(done), done.finish_reason) == (4, "length")

    asyncio.run(scenario())


def test_crash_fails_everything_until_started_again() -> None:
    async def scenario() -> None:
        engine = FakeEngine(count_to_ten, crash_at=(2,))
        await engine.start("model")
        results = await asyncio.gather(engine.generate(request(1)), engine.generate(request(2)), return_exceptions=True)
        assert all(isinstance(r, EngineError) for r in results)
        with pytest.raises(EngineError):
            await engine.health()
        await engine.start("model")
        assert len(await engine.generate(request(3))) == 10 and engine.starts == 2

    asyncio.run(scenario())


def test_mismatch_keeps_the_old_version() -> None:
    async def scenario() -> None:
        engine = FakeEngine(mismatch_at=(2,))
        await engine.start("model")
        with pytest.raises(WeightMismatchError):
            await engine.update_weights(update(2))
        assert engine.version == 0

    asyncio.run(scenario())
