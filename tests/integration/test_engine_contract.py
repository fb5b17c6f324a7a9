"""What every engine must do, shown on SGLang's real server (CPU) and on TorchEngine, with a tiny random model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from rl_lightning.engines.engine import Engine, EngineError, WeightMismatchError
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.engines.torch import TorchEngine
from rl_lightning.models.tiny import write_tiny_model
from tests.integration.running_engine import PROMPT, VOCABULARY, Running


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [write_tiny_model(root / f"seed{seed}", characters=VOCABULARY, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module", params=["torch", "sglang"])
def running(request: pytest.FixtureRequest, folders: list[Path]) -> Iterator[Running]:
    engine: Engine = TorchEngine(device="cpu") if request.param == "torch" else SGLangEngine(device="cpu")
    running = Running(engine, folders)
    try:
        running.run(engine.start(str(folders[0])), 300)
        yield running
    finally:
        running.close()


def test_greedy_answer_is_the_one_of_hugging_face(running: Running) -> None:
    [completion] = running.ask(max_new_tokens=24, greedy=True)
    expected = running.live[running.version].generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False)
    assert completion.token_ids.tolist() == expected[0, len(PROMPT) :].tolist()
    np.testing.assert_allclose(completion.logprobs, running.logprobs(running.version, completion), atol=1e-4)


def test_logprobs_are_of_the_temperature_scaled_distribution(running: Running) -> None:
    for completion in running.ask(4, max_new_tokens=32, temperature=0.6, top_p=0.9, top_k=50):
        np.testing.assert_allclose(completion.logprobs, running.logprobs(running.version, completion, 0.6), atol=1e-4)


def test_many_answers_at_once_differ_and_have_their_own_lengths(running: Running) -> None:
    futures = [f for n in (1, 2, 7, 30) for f in running.ask_later(8, max_new_tokens=n)]
    completions = [future.result(60) for future in futures]
    assert [c.finish_reason for c in completions].count("length") >= 30
    assert all(
        len(c) == n
        for n, c in zip([1] * 8 + [2] * 8 + [7] * 8 + [30] * 8, completions, strict=True)
        if c.finish_reason == "length"
    )
    assert len({tuple(c.token_ids.tolist()) for c in completions[-8:]}) == 8
    assert all(c.token_ids.dtype == np.int32 and c.logprobs.dtype == np.float32 for c in completions)


def test_stop_token_ends_an_answer_and_is_part_of_it(running: Running) -> None:
    [free] = running.ask(max_new_tokens=24, greedy=True)
    stop = int(free.token_ids[6])
    [completion] = running.ask(max_new_tokens=24, greedy=True, stop_token_ids=(stop,))
    first = free.token_ids.tolist().index(stop)
    assert (completion.finish_reason, completion.token_ids.tolist()) == ("stop", free.token_ids[: first + 1].tolist())


def test_stop_text_may_span_tokens(running: Running) -> None:
    [free] = running.ask(max_new_tokens=24, greedy=True)
    text = "".join(VOCABULARY[i - 3] for i in free.token_ids)
    stop = text[5:8]
    [completion] = running.ask(max_new_tokens=24, greedy=True, stop=(stop,))
    end = text.index(stop) + len(stop)
    assert (completion.finish_reason, completion.token_ids.tolist()) == ("stop", free.token_ids[:end].tolist())


def test_min_new_tokens_holds_against_stops(running: Running) -> None:
    [free] = running.ask(max_new_tokens=24, greedy=True)
    stop_text, stop_id = VOCABULARY[free.token_ids[2] - 3], int(free.token_ids[3])
    for stops in ({"stop": (stop_text,)}, {"stop_token_ids": (stop_id,)}):
        [completion] = running.ask(max_new_tokens=24, min_new_tokens=16, greedy=True, **stops)
        assert 16 <= len(completion) <= 24


def test_an_answer_crosses_two_weight_updates(running: Running) -> None:
    for name in running.engine.transports:
        # on a busy machine answers may end before the second update comes
        assert any(cross_two_updates(running, name) >= 4 for _ in range(5)), name


def cross_two_updates(running: Running, name: str) -> int:
    """How many of 16 answers crossed both; each of their tokens has the log-probability of the weights that its version names."""
    before = running.version
    prompt = PROMPT * 8  # long enough to be shared
    futures = running.ask_later(16, prompt, max_new_tokens=900)
    for model in (1, 2):
        running.ask(1, prompt, max_new_tokens=30)  # by then the others have as many
        stopped_s = running.publish(model, name)
        assert 0 < stopped_s < 10
    completions = [future.result(120) for future in futures]
    for completion in completions:
        assert (np.diff(completion.versions) >= 0).all()
        assert len(completion) == 900 or completion.finish_reason == "stop"
        expected = np.select(
            [completion.versions == v for v in range(before, before + 3)],
            [running.logprobs(v, completion, prompt=prompt) for v in range(before, before + 3)],
        )
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)
    [later] = running.ask(1, prompt, max_new_tokens=16)
    np.testing.assert_allclose(later.logprobs, running.logprobs(running.version, later, prompt=prompt), atol=1e-3)
    return sum(set(c.versions.tolist()) == {before, before + 1, before + 2} for c in completions)


def test_the_fewest_tokens_count_from_the_beginning_also_across_an_update(running: Running) -> None:
    common = tuple(range(3, len(VOCABULARY), 2))  # an answer ends soon once it may

    def crossed() -> int:
        futures = running.ask_later(8, max_new_tokens=900, min_new_tokens=400, stop_token_ids=common)
        running.ask(max_new_tokens=30)
        running.publish(1)
        completions = [future.result(120) for future in futures]
        assert all(400 <= len(c) < 440 for c in completions)
        return sum(len(set(c.versions.tolist())) == 2 for c in completions)

    assert any(crossed() >= 4 for _ in range(5))


def test_answers_end_while_updates_come_one_after_another(running: Running) -> None:
    futures = [f for n in range(20, 220, 5) for f in running.ask_later(2, max_new_tokens=n)]
    for _ in range(12):
        running.publish(1 + running.version % 2)
    for completion in (future.result(60) for future in futures):
        versions = sorted(set(completion.versions.tolist()))
        expected = np.select([completion.versions == v for v in versions], [running.logprobs(v, completion) for v in versions])
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-3)


def test_a_stop_text_is_found_across_an_update(running: Running) -> None:
    running.publish(1)
    stops = tuple(VOCABULARY[50 + i] + VOCABULARY[60 + j] for i in range(1, 4) for j in range(3))
    futures = running.ask_later(8, max_new_tokens=400, stop=stops)
    for _ in range(3):
        time.sleep(0.1)
        running.publish(1)
    for completion in (future.result(60) for future in futures):
        text = "".join(VOCABULARY[i - 3] if i > 2 else " " for i in completion.token_ids)
        assert not any(stop in text[:-1] for stop in stops)


def test_wrong_weights_are_noticed_and_the_right_ones_repair(running: Running) -> None:
    futures = running.ask_later(4, max_new_tokens=1000, min_new_tokens=1000)
    running.ask(max_new_tokens=30)
    with pytest.raises(WeightMismatchError, match=f"version {running.version + 1}"):
        running.publish(2, "disk", tamper=True)
    assert all(isinstance(future.exception(30), EngineError) for future in futures)
    running.publish(1)
    [completion] = running.ask(max_new_tokens=8)
    np.testing.assert_allclose(completion.logprobs, running.logprobs(running.version, completion), atol=1e-3)


def test_a_cancelled_answer_frees_its_place(running: Running) -> None:
    futures = running.ask_later(16, max_new_tokens=1000)
    time.sleep(0.3)
    for future in futures:
        future.cancel()
    started = time.monotonic()
    if isinstance(running.engine, SGLangEngine):
        running.run(running.engine._client.flush(), 5)  # refused as long as anything runs
    running.ask(max_new_tokens=1)
    assert time.monotonic() - started < 5


def test_health_of_a_live_engine(running: Running) -> None:
    running.run(running.engine.health())
    futures = running.ask_later(4, max_new_tokens=200)
    running.run(running.engine.health())
    assert all(len(future.result(60)) for future in futures)


def test_a_request_that_cannot_fit_is_refused(running: Running) -> None:
    with pytest.raises((ValueError, EngineError)):
        running.ask(prompt=PROMPT * 300, max_new_tokens=4)
    running.ask(max_new_tokens=1)


@pytest.mark.parametrize("running", ["sglang"], indirect=True)
def test_a_server_that_cannot_be_held_is_interrupted_by_ending_its_requests(running: Running) -> None:
    assert isinstance(running.engine, SGLangEngine) and (pause := running.engine._pause) and pause.holds
    pause.holds = False
    try:
        assert any(cross_two_updates(running, "disk") >= 4 for _ in range(5))
    finally:
        pause.holds = True


@pytest.mark.parametrize("running", ["sglang"], indirect=True)
def test_a_killed_server_is_an_error_at_once_and_can_be_started_again(running: Running) -> None:
    engine = running.engine
    assert isinstance(engine, SGLangEngine)
    for victim in ("server", "scheduler"):
        server = psutil.Process(engine._process.pid)
        family = [server, *server.children(recursive=True)]
        futures = running.ask_later(64, max_new_tokens=1000)  # so many that they last on a busy machine
        time.sleep(0.3)
        scheduler = next(p for p in family if "scheduler" in p.name() or "scheduler" in " ".join(p.cmdline()))
        os.kill(engine._process.pid if victim == "server" else scheduler.pid, signal.SIGKILL)
        started = time.monotonic()
        errors = [error for future in futures if (error := future.exception(30)) is not None]  # some may have ended
        assert len(errors) >= 2 and all(isinstance(error, EngineError) and "SGLang" in str(error) for error in errors)
        assert time.monotonic() - started < 10
        with pytest.raises(EngineError):
            running.run(engine.health())
        running.run(engine.stop())
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if victim == "server":
            running.run(engine.start(str(running.folders[0])), 300)
            [completion] = running.ask(max_new_tokens=4)
            assert completion.versions.tolist() == [0] * len(completion)
            running.publish(2, "distributed")  # the trainer's process group still has the dead server in it
            [completion] = running.ask(max_new_tokens=4)
            np.testing.assert_allclose(completion.logprobs, running.logprobs(running.version, completion), atol=1e-3)
