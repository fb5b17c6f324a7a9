"""Answers that cross weight updates with the keys and values they have: SGLang's real server (CPU), a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rl_lightning.engines.engine import EngineError, WeightMismatchError
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.models.tiny import write_tiny_model
from tests.integration.running_engine import PROMPT, VOCABULARY, Running, mixed_logprobs

LONG = PROMPT * 8
AT_A_TIME = 12


@pytest.fixture(scope="module", params=[True, False], ids=["in_turn", "overlapping"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose scheduler waits for each batch, as on CPUs, or not, as on GPUs."""
    root = tmp_path_factory.mktemp("models")
    folders = [write_tiny_model(root / f"seed{seed}", characters=VOCABULARY, seed=seed) for seed in range(3)]
    server_args = {"max_running_requests": AT_A_TIME, "disable_overlap_schedule": request.param}
    running = Running(SGLangEngine(device="cpu", keep_cache=True, server_args=server_args), folders)
    try:
        running.run(running.engine.start(str(folders[0])), 300)
        yield running
    finally:
        running.close()


def crossed(running: Running) -> int:
    """How many answers crossed two updates, each token with the log-probability that a kept cache gives it."""
    before = running.version
    futures = running.ask_later(AT_A_TIME - 1, LONG, max_new_tokens=700)
    probes = [running.ask_later(1, LONG, max_new_tokens=n)[0] for n in (30, 60)]  # one after the other, in the last place
    futures += running.ask_later(AT_A_TIME, LONG, max_new_tokens=100)  # these wait in the server
    for model, probe in enumerate(probes, start=1):
        probe.result(60)
        assert 0 < running.publish(model) < 10
    completions = [future.result(120) for future in futures]
    for completion in completions:
        assert len(completion) in (100, 700) or completion.finish_reason == "stop"
        np.testing.assert_allclose(completion.logprobs, mixed_logprobs(running.live, completion, LONG), atol=1e-3)
    return sum(set(c.versions.tolist()) == {before, before + 1, before + 2} for c in completions)


def test_answers_go_on_with_the_keys_they_have_and_versions_are_exact(running: Running) -> None:
    assert any(crossed(running) >= 4 for _ in range(5))  # on a busy machine answers may end before the second update comes


def test_new_answers_to_the_same_prompt_meet_the_new_weights_only(running: Running) -> None:
    futures = running.ask_later(AT_A_TIME - 4, LONG, max_new_tokens=700)
    running.ask(1, LONG, max_new_tokens=30)
    running.publish(1 + running.version % 2)
    for completion in running.ask(4, LONG, max_new_tokens=16):
        assert completion.versions.tolist() == [running.version] * len(completion)
        np.testing.assert_allclose(completion.logprobs, running.logprobs(running.version, completion, prompt=LONG), atol=1e-3)
    assert all(len(future.result(60)) for future in futures)


def test_the_fewest_tokens_count_from_the_beginning(running: Running) -> None:
    common = tuple(range(3, len(VOCABULARY), 2))  # an answer ends soon once it may
    futures = running.ask_later(8, LONG, max_new_tokens=700, min_new_tokens=300, stop_token_ids=common)
    running.ask(max_new_tokens=30)
    running.publish(1 + running.version % 2)
    assert all(300 <= len(future.result(60)) < 340 for future in futures)


def test_wrong_weights_end_what_was_held(running: Running) -> None:
    futures = running.ask_later(4, max_new_tokens=900, min_new_tokens=900)
    running.ask(max_new_tokens=30)
    with pytest.raises(WeightMismatchError):
        running.publish(2, "disk", tamper=True)
    assert all(isinstance(future.exception(30), EngineError) for future in futures)
    running.publish(1)
    [completion] = running.ask(max_new_tokens=8)
    np.testing.assert_allclose(completion.logprobs, running.logprobs(running.version, completion), atol=1e-3)


def test_the_same_server_computes_contexts_again_when_told_to(running: Running) -> None:
    assert isinstance(engine := running.engine, SGLangEngine)
    futures = running.ask_later(8, LONG, max_new_tokens=400)
    running.ask(max_new_tokens=30)
    engine.keep_cache = False
    try:
        running.publish(1 + running.version % 2)
    finally:
        engine.keep_cache = True
    for completion in (future.result(60) for future in futures):
        versions = (running.version - 1, running.version)
        expected = [running.logprobs(version, completion, prompt=LONG) for version in versions]
        expected = np.select([completion.versions == version for version in versions], expected)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)


def test_chunks_and_a_lack_of_memory_lose_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    folders = [write_tiny_model(tmp_path_factory.mktemp("m"), characters=VOCABULARY, seed=seed) for seed in range(2)]
    short = {"chunked_prefill_size": 16, "max_total_tokens": 2048, "schedule_conservativeness": 0.1}
    server_args = {**short, "disable_overlap_schedule": False}
    running = Running(SGLangEngine(device="cpu", keep_cache=True, server_args=server_args), folders)
    try:
        running.run(running.engine.start(str(folders[0])), 300)
        futures = [f for i in range(12) for f in running.ask_later(1, LONG[i:], max_new_tokens=400)]
        for update in range(8):
            running.ask(1, LONG * 3, max_new_tokens=1)
            running.publish(1 - update % 2)
        for completion in (future.result(120) for future in futures):
            assert len(completion) == 400 or completion.finish_reason == "stop"
            assert (np.diff(completion.versions) >= 0).all()
        [completion] = running.ask(1, LONG, max_new_tokens=16)
        np.testing.assert_allclose(completion.logprobs, running.logprobs(running.version, completion, prompt=LONG), atol=1e-3)
    finally:
        running.close()
