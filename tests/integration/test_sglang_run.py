"""The loop on a real SGLang server, and what happens when the server is killed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import pytest

from rl_lightning.engines.sglang import SGLangEngine
from tests.integration.test_async_loop import fit, make_data, make_module

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def servers(model: Path) -> list[psutil.Process]:
    """Main processes of SGLang servers of this model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "rl_lightning.engines.sglang_server" in " ".join(line) and str(model) in line:
            found.append(process)
    return found


class KillServerInMidGeneration(pl.Callback):
    """SIGKILL while requests are in flight, once."""

    def __init__(self, model: Path) -> None:
        self.model, self.killed = model, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and not self.killed:
            threading.Thread(target=self._kill).start()
            time.sleep(0.5)

    def _kill(self) -> None:
        for process in servers(self.model):
            process.kill()
            self.killed += 1


def test_a_killed_server_costs_time_and_no_prompt(tiny_model: Path) -> None:
    killer = KillServerInMidGeneration(tiny_model)
    data = make_data(tiny_model, eta=2, n_prompts=24, engine=SGLangEngine(), group_size=2, batch_timeout_s=180)
    restarts: list[float] = []

    class Watch(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            restarts.append(trainer.datamodule.statistics()["engine_restarts"])

    run = fit(make_module(tiny_model), data, max_steps=6, max_epochs=1, callbacks=[killer, Watch()])
    assert killer.killed >= 1 and restarts == [1.0]
    assert sorted(run.trained) == list(range(24)), "every prompt trained once"
    assert max(s["head_offpolicyness_max"] for s in run.statistics) <= 2
    assert max(s["engine_logprob_diff_max"] for s in run.statistics if "engine_logprob_diff_max" in s) < 1e-3
    assert servers(tiny_model) == [], "the server ended with the run"
