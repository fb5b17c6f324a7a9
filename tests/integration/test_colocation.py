"""An engine on the trainer's GPU: it makes room while a synchronous trainer works, and takes weights from its memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fault_run import RANK, WORKER, FaultRun
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.models.tiny import write_tiny_model
from tests.integration.roommate_engine import RoommateEngine
from tests.integration.running_engine import VOCABULARY, Running
from tests.integration.test_async_loop import fit, make_data, make_module


@pytest.mark.usefixtures("ray_cluster")
def test_an_engine_makes_room_for_every_step_of_a_synchronous_trainer_only(tiny_model: Path, tmp_path: Path) -> None:
    for eta in (0, 1):
        diary = tmp_path / f"eta{eta}"
        fit(make_module(tiny_model), make_data(tiny_model, eta=eta, engine=RoommateEngine(str(diary))), max_steps=3)
        turns = [f"update {version}" for version in range(4)]
        if eta == 0:
            turns = [line for update in turns for line in (update, "yield")][:-1]
        assert diary.read_text().split("\n")[:-1] == turns


def test_a_server_lets_go_of_its_memory_and_comes_back_with_the_next_weights(tmp_path: Path) -> None:
    """On a CPU nothing is freed, but the server goes through all of it and refuses what it would refuse on a GPU."""
    folders = [write_tiny_model(tmp_path / f"seed{i}", characters=VOCABULARY, seed=i) for i in range(2)]
    engine = SGLangEngine(device="cpu", colocated=True)
    running = Running(engine, folders)
    try:
        running.run(engine.start(str(folders[0])), 300)
        engine._yields = True
        for model in (1, 0):
            futures = running.ask_later(4, max_new_tokens=400)
            running.run(engine.yield_memory())
            running.run(engine.yield_memory())
            running.run(engine.health())
            assert not any(future.done() and future.exception() for future in futures)
            running.publish(model)
            for completion in (future.result(60) for future in futures):
                new = completion.versions == running.version
                expected = running.logprobs(running.version, completion)
                np.testing.assert_allclose(completion.logprobs[new], expected[new], atol=1e-3)
            [completion] = running.ask(max_new_tokens=8)
            assert completion.versions.tolist() == [running.version] * len(completion)
        assert engine.transports == ("tensor", "disk")
    finally:
        running.close()


@pytest.mark.slow
def test_on_a_cluster_an_engine_stands_beside_its_rank(folder: Path) -> None:
    """The first node has room for the rank, and the driver; only the second one has it for both."""
    engine = {"class_path": "tests.integration.roommate_engine.RoommateEngine", "init_args": {"diary": str(folder / "diary")}}
    with FaultRun(folder, [2, 3], data__engine=json.dumps(engine), trainer__max_steps=8, run__recover_mode="disabled") as run:
        run.wait(lambda: run.steps >= 1, "first step")
        assert len(run.actors(RANK, node=1)) == len(run.actors(WORKER, node=1)) == 1
        run.finish()
