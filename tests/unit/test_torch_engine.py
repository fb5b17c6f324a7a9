"""TorchEngine against Hugging Face: the same tokens, the same log-probabilities, under the version that each token names."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_lightning.engines.engine import Engine, EngineError, WeightMismatchError
from rl_lightning.engines.slot_cache import SLOT_ATTENTION
from rl_lightning.engines.torch import TorchEngine
from rl_lightning.models.tiny import character_tokenizer, write_tiny_model
from rl_lightning.types import Completion, GenerationRequest, SamplingParams
from rl_lightning.weights.object_store import ObjectStoreTransport
from rl_lightning.weights.source import NamedWeights
from rl_lightning.weights.transport import Sample, WeightTarget

VOCABULARY = len(character_tokenizer())


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    torch.set_num_threads(1)
    return asyncio.run(asyncio.wait_for(scenario, 60))


@asynccontextmanager
async def started(folder: Path, **settings: Any) -> AsyncIterator[TorchEngine]:
    engine = TorchEngine(**settings)
    await engine.start(str(folder))
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other_families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama without shared key heads, a Qwen2 with biases, a Mistral with a sliding window: random, without tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {"vocab_size": 50, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=4, eos_token_id=2)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=1, eos_token_id=2)),
        "mistral": MistralForCausalLM(MistralConfig(**shape, num_key_value_heads=2, sliding_window=6, eos_token_id=2)),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_logprobs(model: Any, prompt: tuple[int, ...], answer: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probability of each answer token by one plain forward pass."""
    ids = torch.tensor([[*prompt, *answer.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def perturbed(model: Any, seed: int) -> Any:
    """The same architecture with other weights."""
    import copy

    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return other


def requests(n: int, params: SamplingParams, *, prompts: int | None = None, length: int = 7) -> list[GenerationRequest]:
    """n requests over `prompts` distinct prompts (all distinct by default) of about `length` tokens."""
    generator = np.random.default_rng(0)
    texts = [tuple(generator.integers(3, VOCABULARY, length + i % 3).tolist()) for i in range(prompts or n)]
    return [GenerationRequest(f"r{i}", texts[i % len(texts)], params, seed=1000 + i) for i in range(n)]


async def answers(engine: Engine, asked: list[GenerationRequest]) -> list[Completion]:
    return await asyncio.gather(*(engine.generate(request) for request in asked))


def staged(version: int, model: Any) -> Any:
    return ObjectStoreTransport().stage(version, NamedWeights(model.named_parameters()), [WeightTarget("engine")])[0]


def batch_of(engine: TorchEngine) -> Any:
    assert engine._thread is not None
    return engine._thread._batch


def hold(engine: TorchEngine, when: Callable[[Any], bool]) -> None:
    """Lets the engine make no step while `when(batch)` is true, so that what a test does in between is in time."""
    batch = batch_of(engine)
    step = batch.step

    def step_or_wait() -> None:
        if when(batch):
            time.sleep(0.001)
        else:
            step()

    batch.step = step_or_wait


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"waited {timeout_s} s for {what}") from None


def test_is_an_engine_and_travels_pickled() -> None:
    engine = pickle.loads(pickle.dumps(TorchEngine(max_running_requests=7)))
    assert isinstance(engine, Engine) and engine.max_running_requests == 7


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_forward_pass(tiny: Path, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=temperature)

    async def scenario() -> None:
        async with started(tiny) as engine:
            asked = requests(12, params, prompts=5)
            for request, answer in zip(asked, await answers(engine, asked), strict=True):
                expected = hf_logprobs(reference(tiny), request.prompt_ids, answer.token_ids, temperature)
                np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)
                assert answer.token_ids.dtype == np.int32 and answer.logprobs.dtype == np.float32
                assert (answer.versions == 0).all() and answer.versions.dtype == np.int32

    run(scenario())


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_other_model_families(other_families: dict[str, Path], family: str) -> None:
    async def scenario() -> None:
        async with started(other_families[family]) as engine:
            asked = requests(4, SamplingParams(max_new_tokens=15, min_new_tokens=15), prompts=2, length=9)
            for request, answer in zip(asked, await answers(engine, asked), strict=True):
                expected = hf_logprobs(reference(other_families[family]), request.prompt_ids, answer.token_ids)
                np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)

    run(scenario())


def test_greedy_equals_generate(tiny: Path) -> None:
    params = SamplingParams(max_new_tokens=20, greedy=True)

    async def scenario() -> None:
        async with started(tiny) as engine:
            asked = requests(6, params)
            model = reference(tiny)
            for request, answer in zip(asked, await answers(engine, asked), strict=True):
                ids = torch.tensor([request.prompt_ids])
                full = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
                assert answer.token_ids.tolist() == full[0, len(request.prompt_ids) :].tolist()

    run(scenario())


def test_a_group_computes_its_prompt_once(tiny: Path) -> None:
    asked = requests(8, SamplingParams(max_new_tokens=6, min_new_tokens=6), prompts=1, length=30)

    async def scenario() -> None:
        async with started(tiny) as engine:
            got = await answers(engine, asked)
            assert batch_of(engine).prefilled_tokens == len(asked[0].prompt_ids)
            assert len({tuple(a.token_ids) for a in got}) == 8

    run(scenario())


def test_a_late_member_takes_the_prompt_from_a_running_one(tiny: Path) -> None:
    first, late = requests(2, SamplingParams(max_new_tokens=40, min_new_tokens=40), prompts=1, length=30)

    async def scenario() -> None:
        async with started(tiny) as engine:
            hold(engine, lambda batch: len(batch.running) == 1 and not batch.waiting and not running.done())
            running = asyncio.create_task(engine.generate(first))
            await until(lambda: batch_of(engine).running, "the first request to run")
            answer = await engine.generate(late)
            assert batch_of(engine).prefilled_tokens == len(first.prompt_ids) + 1
            np.testing.assert_allclose(
                answer.logprobs, hf_logprobs(reference(tiny), late.prompt_ids, answer.token_ids), atol=1e-4
            )
            await running

    run(scenario())


def test_seeds_make_answers_independent_of_company(tiny: Path) -> None:
    asked = requests(10, SamplingParams(max_new_tokens=16), prompts=4)

    async def scenario() -> None:
        async with started(tiny, max_running_requests=3) as few, started(tiny) as many:
            together = await answers(many, asked)
            again = await answers(few, asked[::-1])
            for a, b in zip(together, again[::-1], strict=True):
                assert a.token_ids.tolist() == b.token_ids.tolist()
            alone = await many.generate(asked[3])
            assert alone.token_ids.tolist() == together[3].token_ids.tolist()

    run(scenario())


def test_more_requests_than_slots_are_all_answered(tiny: Path) -> None:
    asked = [
        GenerationRequest(f"r{i}", (5, 6 + i % 4, 7), SamplingParams(max_new_tokens=1 + i % 9, min_new_tokens=1 + i % 9), seed=i)
        for i in range(40)
    ]

    async def scenario() -> None:
        async with started(tiny, max_running_requests=4) as engine:
            got = await answers(engine, asked)
            assert [len(a) for a in got] == [1 + i % 9 for i in range(40)]
            for request, answer in zip(asked, got, strict=True):
                expected = hf_logprobs(reference_model, request.prompt_ids, answer.token_ids)
                np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)

    reference_model = reference(tiny)
    run(scenario())


def test_a_full_cache_sends_requests_back_and_loses_none(tiny: Path) -> None:
    asked = requests(6, SamplingParams(max_new_tokens=40, min_new_tokens=40))
    bytes_per_token = 2 * 2 * 2 * 16 * 4

    async def scenario() -> None:
        async with started(tiny, kv_cache_gib=150 * bytes_per_token / 2**30) as engine:
            model = reference(tiny)
            for request, answer in zip(asked, await answers(engine, asked), strict=True):
                np.testing.assert_allclose(answer.logprobs, hf_logprobs(model, request.prompt_ids, answer.token_ids), atol=1e-4)
            assert batch_of(engine).prefilled_tokens > sum(len(r.prompt_ids) for r in asked)

    run(scenario())


@pytest.mark.parametrize("n", [1, 6])
def test_an_answer_that_crosses_two_updates_is_exact_under_every_version(tiny: Path, n: int) -> None:
    asked = requests(n, SamplingParams(max_new_tokens=120, min_new_tokens=120), prompts=min(n, 2))
    updates_at = {0: 20, 3: 35}

    def due(batch: Any) -> bool:
        return bool(batch.running) and batch._rows.count[0] >= updates_at.get(batch.version, 1000)

    async def scenario() -> None:
        models = {0: reference(tiny)}
        models |= {version: perturbed(models[0], version) for version in (3, 4)}
        async with started(tiny, max_running_requests=4) as engine:
            hold(engine, due)
            tasks = [asyncio.create_task(engine.generate(request)) for request in asked]
            for version in (3, 4):
                await until(lambda: due(batch_of(engine)), "enough tokens")
                assert await engine.update_weights(staged(version, models[version])) > 0
            got = await asyncio.gather(*tasks)
        for request, answer in zip(asked, got, strict=True):
            assert (np.diff(answer.versions) >= 0).all() and answer.finish_reason == "length" and len(answer) == 120
            for version in np.unique(answer.versions):
                expected = hf_logprobs(models[int(version)], request.prompt_ids, answer.token_ids)
                own = answer.versions == version
                np.testing.assert_allclose(answer.logprobs[own], expected[own], atol=1e-4)
        assert np.unique(got[0].versions, return_counts=True)[1].tolist() == [20, 15, 85]

    run(scenario())


def test_short_answers_that_are_about_to_end_are_not_interrupted(tiny: Path) -> None:
    asked = requests(5, SamplingParams(max_new_tokens=40, min_new_tokens=40), prompts=1)

    async def scenario(interrupted_at: int) -> list[list[int]]:
        async with started(tiny, max_running_requests=4) as engine:
            batch = batch_of(engine)
            hold(engine, lambda b: bool(b.running) and b.version == 0 and b._rows.count[0] >= interrupted_at)
            tasks = [asyncio.create_task(engine.generate(request)) for request in asked]
            await until(lambda: bool(batch.running) and batch._rows.count[0] >= interrupted_at, "enough tokens")
            await engine.update_weights(staged(1, perturbed(reference(tiny), 1)))
            return [np.unique(answer.versions).tolist() for answer in await asyncio.gather(*tasks)]

    assert run(scenario(10)) == 4 * [[0, 1]] + [[1]]
    assert run(scenario(30)) == 4 * [[0]] + [[1]]


def test_after_an_update_nothing_old_is_used(tiny: Path) -> None:
    request = requests(1, SamplingParams(max_new_tokens=12, min_new_tokens=12))[0]

    async def scenario() -> None:
        new = perturbed(reference(tiny), 9)
        async with started(tiny) as engine:
            await engine.generate(request)
            await engine.update_weights(staged(1, new))
            answer = await engine.generate(request)
            assert (answer.versions == 1).all()
            np.testing.assert_allclose(answer.logprobs, hf_logprobs(new, request.prompt_ids, answer.token_ids), atol=1e-4)

    run(scenario())


def test_stop_tokens_minimum_and_maximum(tiny: Path) -> None:
    every_token = tuple(range(3, VOCABULARY))

    async def scenario() -> None:
        async with started(tiny) as engine:
            stopped = SamplingParams(max_new_tokens=30, min_new_tokens=5, stop_token_ids=every_token[:20])
            for request, answer in zip(asked := requests(20, stopped), await answers(engine, asked), strict=True):
                inner = set(answer.token_ids[:-1].tolist())
                assert not inner & {2, *every_token[:20]} or len(answer) == 5
                assert answer.finish_reason == ("stop" if answer.token_ids[-1] in (2, *every_token[:20]) else "length")
                assert 5 <= len(answer) <= 30 and request.params.min_new_tokens == 5
                assert not set(answer.token_ids[:4].tolist()) & {2, *every_token[:20]}
            short = await answers(engine, requests(5, SamplingParams(max_new_tokens=1)))
            assert [len(a) for a in short] == [1] * 5

    run(scenario())


def test_stop_texts(tiny: Path) -> None:
    tokenizer = character_tokenizer()
    asked = requests(12, SamplingParams(max_new_tokens=40))

    async def scenario() -> int:
        tried = 0
        async with started(tiny) as engine:
            for request, whole in zip(asked, await answers(engine, asked), strict=True):
                if len(whole) < 12 or (whole.token_ids[8:10] < 3).any():
                    continue
                stop, text = tokenizer.decode(whole.token_ids[8:10]), tokenizer.decode(whole.token_ids)
                params = SamplingParams(max_new_tokens=40, stop=("no such text", stop))
                answer = await engine.generate(GenerationRequest("s", request.prompt_ids, params, request.seed))
                assert tokenizer.decode(answer.token_ids) == text[: text.index(stop) + 2]
                assert answer.finish_reason == "stop"
                tried += 1
        return tried

    assert run(scenario()) > 2


def test_a_stop_text_before_the_minimum_does_not_end_the_answer_later(tiny: Path) -> None:
    tokenizer = character_tokenizer()
    asked = requests(12, SamplingParams(max_new_tokens=20, min_new_tokens=20))

    async def scenario() -> int:
        tried = 0
        async with started(tiny) as engine:
            for request, whole in zip(asked, await answers(engine, asked), strict=True):
                ids = whole.token_ids.tolist()
                if ids[5] < 3 or ids[5] in ids[6:]:
                    continue
                params = SamplingParams(max_new_tokens=20, min_new_tokens=7, stop=(tokenizer.decode(ids[5]),))
                answer = await engine.generate(GenerationRequest("s", request.prompt_ids, params, request.seed))
                assert len(answer) > 7
                tried += 1
        return tried

    assert run(scenario()) > 2


def test_stop_texts_without_a_tokenizer_are_refused(other_families: dict[str, Path]) -> None:
    async def scenario() -> None:
        async with started(other_families["llama"]) as engine:
            with pytest.raises(ValueError, match="stop_token_ids"):
                await engine.generate(requests(1, SamplingParams(max_new_tokens=5, stop=("x",)))[0])
            await engine.generate(requests(1, SamplingParams(max_new_tokens=5))[0])

    run(scenario())


def test_cancelling_frees_the_slot(tiny: Path) -> None:
    long, short = (requests(1, SamplingParams(max_new_tokens=n, min_new_tokens=n))[0] for n in (30, 3))

    async def scenario() -> None:
        async with started(tiny, max_running_requests=1) as engine:
            hold(engine, lambda batch: any(r.request is long and not r.cancelled for r in batch.running))
            running = asyncio.create_task(engine.generate(long))
            queued = asyncio.create_task(engine.generate(long))
            await until(lambda: batch_of(engine).running, "the request to run")
            for task in (running, queued):
                task.cancel()
            answer = await engine.generate(short)
            assert len(answer) == 3
            await until(lambda: not batch_of(engine).busy, "an empty batch")
            assert running.cancelled() and queued.cancelled()

    run(scenario())


def test_a_wrong_fingerprint_closes_the_engine_until_a_good_update(tiny: Path) -> None:
    request = requests(1, SamplingParams(max_new_tokens=30, min_new_tokens=30))[0]

    async def scenario() -> None:
        from dataclasses import replace

        async with started(tiny) as engine:
            hold(engine, lambda batch: any(r.request is request for r in batch.running))
            running = asyncio.create_task(engine.generate(request))
            await until(lambda: batch_of(engine).running, "the request to run")
            good = staged(1, perturbed(reference(tiny), 1))
            name, (shape, values) = next(iter(good.fingerprint.items()))
            wrong = Sample(shape, (values[0] + 1, *values[1:]))
            with pytest.raises(WeightMismatchError, match=name):
                await engine.update_weights(replace(good, fingerprint={name: wrong}))
            for waiting in (running, engine.generate(request), engine.health()):
                with pytest.raises(EngineError, match="version 1"):
                    await waiting
            await engine.update_weights(good)
            await engine.health()
            answer = await engine.generate(requests(1, SamplingParams(max_new_tokens=2, min_new_tokens=2))[0])
            assert answer.versions.tolist() == [1, 1]

    run(scenario())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda w: w[1:], "no weight for 1 parameters"),
        (lambda w: [("stranger", w[0][1]), *w[1:]], "stranger"),
        (lambda w: [(w[0][0], w[0][1][:-1]), *w[1:]], "shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny: Path, break_it: Callable[[list], list], message: str) -> None:
    async def scenario() -> None:
        async with started(tiny) as engine:
            weights = break_it(list(reference(tiny).named_parameters()))
            update = ObjectStoreTransport().stage(1, NamedWeights(weights), [WeightTarget("engine")])[0]
            with pytest.raises(EngineError, match=message):
                await engine.update_weights(update)

    run(scenario())


def test_weights_in_bfloat16_and_in_small_objects(tiny: Path) -> None:
    model = perturbed(reference(tiny), 5)
    halves = [(name, parameter.detach().bfloat16()) for name, parameter in model.named_parameters()]
    with torch.no_grad():
        for parameter, (_, half) in zip(model.parameters(), halves, strict=True):
            parameter.copy_(half)
    request = requests(1, SamplingParams(max_new_tokens=10, min_new_tokens=10))[0]

    async def scenario() -> None:
        async with started(tiny) as engine:
            transport = ObjectStoreTransport(bucket_bytes=10_000)
            updates = transport.stage(7, NamedWeights(halves), [WeightTarget("a"), WeightTarget("b")])
            assert len(updates) == 2 and len(updates[0].payload["buckets"]) > 3
            await engine.update_weights(updates[1])
            transport.release()
            answer = await engine.generate(request)
            expected = hf_logprobs(model, request.prompt_ids, answer.token_ids)
            np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)

    run(scenario())


def test_an_engine_in_bfloat16_takes_float32_weights(tiny: Path) -> None:
    """The proof compares what was sent, rounded as the engine rounds it."""
    model = perturbed(reference(tiny), 8)
    asked = requests(4, SamplingParams(max_new_tokens=10, min_new_tokens=10))

    async def scenario() -> None:
        async with started(tiny, dtype="bfloat16") as engine:
            await engine.update_weights(staged(1, model))
            for request, answer in zip(asked, await answers(engine, asked), strict=True):
                expected = hf_logprobs(model, request.prompt_ids, answer.token_ids)
                np.testing.assert_allclose(answer.logprobs, expected, atol=0.1)
                assert np.abs(answer.logprobs - expected).max() > 1e-5

    run(scenario())


def test_weights_from_disk(tiny: Path, tmp_path: Path) -> None:
    from rl_lightning.weights.fingerprint import take_fingerprint
    from rl_lightning.weights.transport import WeightUpdate

    model = perturbed(reference(tiny), 6)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    update = WeightUpdate(2, "disk", {"path": str(tmp_path)}, take_fingerprint(NamedWeights(model.named_parameters())))
    request = requests(1, SamplingParams(max_new_tokens=10, min_new_tokens=10))[0]

    async def scenario() -> None:
        async with started(tiny) as engine:
            await engine.update_weights(update)
            answer = await engine.generate(request)
            assert (answer.versions == 2).all()
            np.testing.assert_allclose(answer.logprobs, hf_logprobs(model, request.prompt_ids, answer.token_ids), atol=1e-4)
            with pytest.raises(EngineError, match="could not read version 2"):
                await engine.update_weights(WeightUpdate(2, "disk", {"path": str(tmp_path / "gone")}, {}))

    run(scenario())


def test_the_trainer_may_go_on_after_staging(tiny: Path) -> None:
    """Without Ray the update holds copies: what the trainer does next must not reach the engine."""
    model = reference(tiny)
    update = staged(1, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    async def scenario() -> None:
        async with started(tiny) as engine:
            await engine.update_weights(update)

    run(scenario())


def test_unknown_transports_are_named(tiny: Path) -> None:
    async def scenario() -> None:
        from dataclasses import replace

        async with started(tiny) as engine:
            with pytest.raises(EngineError, match="carrier_pigeon.*object_store or disk"):
                await engine.update_weights(replace(staged(1, reference(tiny)), transport="carrier_pigeon"))

    run(scenario())


def test_prompts_that_do_not_fit_are_refused_and_answers_end_with_the_context(tiny: Path) -> None:
    params = SamplingParams(max_new_tokens=50, min_new_tokens=50)

    async def scenario() -> None:
        async with started(tiny) as engine:
            for prompt in ((), (5,) * 1024):
                with pytest.raises(ValueError, match="context of 1024"):
                    await engine.generate(GenerationRequest("long", prompt, params))
            answer = await engine.generate(GenerationRequest("edge", (5,) * 1020, params))
            assert len(answer) == 4 and answer.finish_reason == "length"

    run(scenario())


def test_long_prompts_are_computed_in_parts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_lightning.engines.slot_decoder.PREFILL_SCORES", 4000)
    asked = requests(5, SamplingParams(max_new_tokens=4, min_new_tokens=4), length=150)

    async def scenario() -> None:
        async with started(tiny) as engine:
            for request, answer in zip(asked, await answers(engine, asked), strict=True):
                expected = hf_logprobs(reference(tiny), request.prompt_ids, answer.token_ids)
                np.testing.assert_allclose(answer.logprobs, expected, atol=1e-4)

    run(scenario())


def test_models_it_cannot_run_are_refused(tmp_path: Path) -> None:
    from transformers import Gemma2Config

    Gemma2Config(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="caps its attention scores"):
        run(TorchEngine().start(str(tmp_path)))


def test_a_missing_folder_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nothing_here"):
        run(TorchEngine().start(str(tmp_path / "nothing_here")))


def test_nothing_works_before_start_and_after_stop(tiny: Path) -> None:
    request = requests(1, SamplingParams(max_new_tokens=30, min_new_tokens=30))[0]

    async def refused(engine: TorchEngine) -> None:
        calls: list[Callable[[], Awaitable[Any]]] = [engine.health, lambda: engine.generate(request)]
        for call in calls:
            with pytest.raises(EngineError, match="not started"):
                await call()

    async def scenario() -> None:
        engine = TorchEngine()
        await refused(engine)
        await engine.start(str(tiny))
        thread = engine._thread
        hold(engine, lambda batch: bool(batch.running))
        running = asyncio.create_task(engine.generate(request))
        await until(lambda: batch_of(engine).running, "the request to run")
        await engine.stop()
        with pytest.raises(EngineError, match="stopped"):
            await running
        assert thread is not None and not thread._thread.is_alive()
        await refused(engine)
        await engine.stop()
        await engine.start(str(tiny))
        await engine.health()
        await engine.stop()

    run(scenario())


def test_logits_that_are_not_numbers_end_the_engine(tiny: Path) -> None:
    broken = reference(tiny)
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[3, 3] = torch.inf

    async def scenario() -> None:
        async with started(tiny) as engine:
            await engine.update_weights(staged(1, broken))
            with pytest.raises(EngineError, match="not finite under version 1"):
                await engine.generate(requests(1, SamplingParams(max_new_tokens=4))[0])
            with pytest.raises(EngineError, match="ended"):
                await engine.health()

    run(scenario())


@pytest.mark.parametrize("dies", ["before", "within"])
def test_an_engine_that_dies_during_an_update_says_so_at_once(
    dies: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def out_of_memory(weights: object) -> None:
        raise RuntimeError("out of memory")

    async def scenario() -> None:
        async with started(tiny) as engine:
            thread, update = engine._thread, staged(1, reference(tiny))
            assert thread is not None and engine._decoder is not None
            if dies == "before":  # while the weights are fetched
                monkeypatch.setattr("rl_lightning.engines.torch._read", lambda update, timeout_s: thread.close(20))
            else:
                monkeypatch.setattr(engine._decoder, "load_weights", out_of_memory)
            with pytest.raises(EngineError, match="stopped" if dies == "before" else "out of memory"):
                await asyncio.wait_for(engine.update_weights(update), 20)
            await until(thread.ended.done, "the thread to end")

    run(scenario())


def test_a_request_has_a_deadline(tiny: Path) -> None:
    async def scenario() -> None:
        async with started(tiny, request_timeout_s=0.05) as engine:
            with pytest.raises(EngineError, match="r0 within"):
                await engine.generate(requests(1, SamplingParams(max_new_tokens=1000, min_new_tokens=1000))[0])

    run(scenario())


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="max_running_requests"):
        TorchEngine(max_running_requests=0)
    assert SLOT_ATTENTION
