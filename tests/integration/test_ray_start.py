"""A cluster started by hand, `ray start` on each node, and the command line that joins it from another process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from rl_lightning.models.tiny import write_tiny_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
WAIT_S = 180.0


class Site:
    """A folder short enough for Ray's sockets, and the processes started from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()
        own = {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "RAY_memory_monitor_refresh_ms": "0"}
        self.env = os.environ | own | {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / name).open("wb") as output:
            process = subprocess.Popen(command, env=self.env, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def ray(self, name: str, cpus: int, *options: str) -> None:
        """`ray start`, which stays until it is ended."""
        small = [f"--num-cpus={cpus}", f"--object-store-memory={100 * 2**20}", f"--dashboard-agent-listen-port={free_port()}"]
        self.start(name, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *small, *options)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {WAIT_S:.0f} s: {[self.output(n) for n in ('run', 'node')]}"
            time.sleep(0.1)

    def output(self, name: str) -> str:
        path = self.folder / name
        return path.read_text()[-4000:] if path.exists() else ""

    def close(self) -> None:
        family = [psutil.Process(p.pid).children(recursive=True) for p in self.started if p.poll() is None]
        for process in [*self.started, *(child for children in family for child in children)]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for started in self.started:
            started.wait(30)


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    made = Site(folder)
    yield made
    made.close()


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def write_recipe(folder: Path) -> None:
    write_tiny_model(folder / "model", layers=2, hidden=64)
    (folder / "mine.py").write_text("def even(prompt, answer):\n    return len(answer) % 2\n")
    data = {
        "prompts": {"class_path": "tests.samples.LetterPrompts", "init_args": {"size": 24}},
        "rewards": [{"reward": "mine.even"}],
        "engine": {"class_path": "rl_lightning.engines.torch.TorchEngine"},
        "num_engines": 2,
        "batch_size": 4,
        "group_size": 4,
        "generation": {"max_new_tokens": 8},
    }
    recipe = {
        "run": {"experiment": "joined", "save_freq_epochs": None},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "strategy": "ray"},
        "model": {"class_path": "AsyncPPOModule", "init_args": {"path": "model", "ppo": {"n_minibatches": 1}}},
        "data": {"class_path": "RolloutDataModule", "init_args": data},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_a_run_joins_by_auto_and_waits_for_the_node_that_is_missing(site: Site) -> None:
    write_recipe(site.folder)
    port = free_port()
    site.ray("head", 1, "--head", f"--port={port}", "--include-dashboard=false")
    site.wait(lambda: (site.folder / "ray/ray_current_cluster").exists(), "head node")
    fit = [sys.executable, "-m", "rl_lightning", "fit", "--config", "recipe.yaml", "--trainer.strategy.address", "auto"]
    run = site.start("run", *fit)
    needs = "the run needs 3 CPUs (1 for 1 trainer rank, 2 for 2 engines): the cluster has"
    site.wait(lambda: f"{needs} 1 CPU on 1 node" in site.output("run"), "sentence about the missing node")
    address = (site.folder / "ray/ray_current_cluster").read_text().strip()
    assert address.endswith(f":{port}")
    site.ray("node", 2, f"--address={address}")
    site.wait(lambda: run.poll() is not None, "end of the run")
    assert run.returncode == 0, site.output("run")
    logs = site.folder / "runs/logs/joined/trial0"
    assert f"{needs} 3 CPUs on 2 nodes" in (logs / "main.log").read_text()
    answers = [json.loads(line) for line in (logs / "rollouts/rank0.jsonl").read_text().splitlines()]
    assert sorted({answer["index"] for answer in answers}) == list(range(24))
    assert {answer["worker"] for answer in answers} == {"worker 0", "worker 1"}
