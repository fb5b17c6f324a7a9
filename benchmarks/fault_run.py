"""FaultRun: a small run on a Ray cluster of several nodes, all on this machine, whose parts can be killed one by one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml

from rl_lightning.types import GenerationRequest, Prompt

ROOT = Path(__file__).parents[1]
WAIT_S = 500.0
POLL_S = 0.05
REWARD_S, SLOW_REWARD_S, HANG_S, REWARD_TIMEOUT_S = 0.1, 0.5, 1000.0, 3.0
N_PROMPTS, LONG = 200, 600
WORKER, CONTROLLER, RANK = "RolloutWorkerActor", "RolloutControllerActor", "TrainWorker"
SERVER = "rl_lightning.engines.sglang_server"
SLOW = "slow"


def slow_reward(prompt: Prompt, answer: str) -> float:
    """Takes its time, so that a run of small answers lasts long enough to be hurt; more after `slow_down`."""
    time.sleep(SLOW_REWARD_S if Path(SLOW).exists() else REWARD_S)
    return len(answer) % 2


def long_answer(request: GenerationRequest) -> list[int]:
    """For a FakeEngine: so long that groups of 16 lie in the object store of the node where they were made."""
    return [2 + (request.seed + i) % 8 for i in range(LONG)]


def hanging_reward(prompt: Prompt, answer: str) -> float:
    """The first call that comes after a while hangs; `hung` in the run's folder says that it does."""
    with contextlib.suppress(FileExistsError):
        if prompt.query_id.endswith("40"):
            Path("hung").touch(exist_ok=False)
            time.sleep(HANG_S)
    return slow_reward(prompt, answer)


class FaultRun:
    """Use as a context: leaving it ends the run and the cluster, whatever state they are in.

    Args:
        folder: short, for Ray's sockets live in it.
        cpus: Ray CPUs of the nodes; the first is the head, and the rank with its 2 CPUs fits nowhere else.
        options: command-line options of the run, with `__` for a dot.
    """

    def __init__(self, folder: Path, cpus: Sequence[int], **options: object) -> None:
        self.folder, self._cpus, self._options = folder, cpus, options
        self.nodes: list[Any] = []
        self._cluster: Any = None
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> FaultRun:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(shutdown_at_exit=False)
        try:
            for cpus in self._cpus:
                self.add_node(cpus)
            self.process = self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- faults

    def add_node(self, cpus: int) -> None:
        """One more node joins the cluster."""
        before, options = dict(os.environ), {"object_store_memory": 100 * 2**20, "include_dashboard": False}
        os.environ.update(self._environment())
        try:
            self.nodes.append(self._cluster.add_node(num_cpus=cpus, **options))
        finally:
            os.environ.clear()
            os.environ.update(before)

    def kill_node(self, node: int) -> None:
        """SIGKILL to every process of the node."""
        for process in self._processes([self.nodes[node]]):
            _kill(process)

    def actors(self, name: str, node: int | None = None) -> list[psutil.Process]:
        """Processes of the actors called `name`, or of the module `name`, on one node or on all."""
        nodes = self.nodes if node is None else [self.nodes[node]]
        raylets = [n.all_processes["raylet"][0].process.pid for n in nodes if "raylet" in n.all_processes]
        found = [process for pid in raylets for process in _tree(pid)]
        return [process for process in found if (line := _command(process)).startswith(f"ray::{name}") or f"-m {name} " in line]

    def kill(self, name: str) -> None:
        """SIGKILL to the first of `actors(name)`."""
        _kill(self.actors(name)[0])

    def slow_down(self) -> None:
        """What is left of the run lasts longer, until `speed_up`: parts that are added have the time to start."""
        (self.folder / SLOW).touch()

    def speed_up(self) -> None:
        """Undoes `slow_down`."""
        (self.folder / SLOW).unlink()

    # -- what the run says

    @property
    def log(self) -> str:
        """main.log so far."""
        path = self.folder / "runs/logs/faults/trial0/main.log"
        return path.read_text() if path.exists() else ""

    @property
    def steps(self) -> int:
        """Finished training steps."""
        return max((int(n) for n in re.findall(r"\(global step (\d+)\)", self.log)), default=0)

    def statistic(self, name: str) -> float:
        """The latest value of a metric in main.log; 0 before the first."""
        values = re.findall(rf"{re.escape(name)} +(\S+)", self.log)
        return float(values[-1]) if values else 0.0

    @property
    def restarts(self) -> int:
        """How often the run started again."""
        return self.log.count("Starting again from")

    def answers(self) -> list[dict[str, Any]]:
        """The answers that were trained on, from the run's rollout log."""
        path = self.folder / "runs/logs/faults/trial0/rollouts/rank0.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def workers(self) -> set[str]:
        """Who answered them."""
        return {answer["worker"] for answer in self.answers()}

    def trained(self) -> Counter[int]:
        """How often each prompt group was trained on."""
        return Counter(answer["index"] for answer in self.answers() if answer["sample"] == 0)

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = WAIT_S, *, running: bool = True) -> float:
        """Seconds until `condition`.

        Raises:
            AssertionError: it did not come in time, or the run ended before; shows the end of the run's output.
        """
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < timeout_s, f"no {what} within {timeout_s:.0f} s; {self.output()}"
            assert not running or self.process.poll() is None or condition(), f"the run ended before {what}; {self.output()}"
            time.sleep(POLL_S)
        return time.monotonic() - began

    def finish(self, restarts: int = 0) -> None:
        """Waits for the end of the run, which must be a good one that started again `restarts` times."""
        self.wait(lambda: self.process.poll() is not None, "end of the run", running=False)
        assert (self.process.returncode, self.restarts) == (0, restarts), self.output()

    def trained_on_all_once(self, n_prompts: int = N_PROMPTS) -> bool:
        """Whether no prompt was lost or trained on twice."""
        return self.trained() == {index: 1 for index in range(n_prompts)}

    def output(self) -> str:
        """The end of what the run printed, without the metrics of every step."""
        lines = (self.folder / "output").read_text().splitlines()
        told = [line for line in lines if not line.startswith("    ") and " finishes. " not in line and "Saved the " not in line]
        return "\n".join(told)[-6000:]

    def close(self) -> None:
        """Ends everything that was started here."""
        for process in [*(_tree(self.process.pid) if hasattr(self, "process") else []), *self._processes(self.nodes)]:
            _kill(process)
        if hasattr(self, "process"):
            self.process.wait(30)
        self._cluster.shutdown()

    # -- inside

    @staticmethod
    def _processes(nodes: Sequence[Any]) -> list[psutil.Process]:
        roots = [started.process.pid for node in nodes for processes in node.all_processes.values() for started in processes]
        return [process for pid in roots for process in _tree(pid)]

    def _start(self) -> subprocess.Popen[bytes]:
        from rl_lightning.models.tiny import write_tiny_model

        write_tiny_model(self.folder / "model", layers=2, hidden=64)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(self._recipe()))
        env = os.environ | self._environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "rl_lightning", "fit", "--config", "recipe.yaml"]
        command += [f"--{name.replace('__', '.')}={value}" for name, value in self._options.items()]
        with (self.folder / "output").open("wb") as output:
            return subprocess.Popen(command, env=env, cwd=self.folder, stdout=output, stderr=subprocess.STDOUT)

    def _environment(self) -> dict[str, str]:
        """Of the cluster and the run: nobody else finds this cluster by `auto`, and it asks for no token."""
        return {"RAY_TMPDIR": str(self.folder), "RAY_AUTH_MODE": "disabled", "RAY_memory_monitor_refresh_ms": "0"}

    def _recipe(self) -> dict[str, Any]:
        ray = {"num_workers": 1, "num_cpus_per_worker": 2, "ray_init": {"address": self._cluster.address}}
        return {
            "run": {"experiment": "faults", "save_freq_epochs": None, "ckpt_freq_steps": 1, "ckpt_freq_secs": None},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "strategy": {"class_path": "RayStrategy", "init_args": ray},
            },
            "model": {"class_path": "AsyncPPOModule", "init_args": {"path": "model", "ppo": {"n_minibatches": 1}}},
            "data": {
                "class_path": "RolloutDataModule",
                "init_args": {
                    "prompts": {
                        "class_path": "rl_lightning.prompts.arithmetic.ArithmeticPrompts",
                        "init_args": {"shots": 0, "size": N_PROMPTS},
                    },
                    "rewards": [{"reward": "benchmarks.fault_run.slow_reward"}],
                    "engine": {"class_path": "rl_lightning.engines.torch.TorchEngine"},
                    "batch_size": 4,
                    "group_size": 4,
                    "max_head_offpolicyness": 2,
                    "max_concurrent_rollouts": 8,
                    "worker_timeout_s": 5,
                    "generation": {"max_new_tokens": 16},
                },
            },
        }


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
