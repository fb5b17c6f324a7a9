"""RayStrategy against a real Ray cluster: same results as one process, one error for a failure, nothing left behind."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from rl_lightning.strategies import RayStrategy
from rl_lightning.strategies.failures import RayWorkerError

pytestmark = pytest.mark.slow
STOP_LIMIT_S = 15.0


class Regression(LightningModule):
    """Fits a line to 32 samples, 8 per step over all ranks; `misbehave` is called with (rank, batch index) in every step."""

    def __init__(self, misbehave: Callable[[int, int], None] | None = None) -> None:
        super().__init__()
        self.layer, self.misbehave = torch.nn.Linear(4, 1), misbehave

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.misbehave is not None:
            self.misbehave(self.global_rank, batch_idx)
        loss = (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).pow(2).mean()
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_train_start(self) -> None:
        logging.getLogger("rl_lightning.user").info("seed %d in %s", torch.initial_seed(), os.getcwd())

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("error", (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).abs().mean())

    def on_train_epoch_end(self) -> None:
        logging.getLogger("rl_lightning.user").info("rank %d finished epoch %d", self.global_rank, self.current_epoch)

    def train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        samples = torch.utils.data.TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)))
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        sampler = torch.utils.data.DistributedSampler(samples, shuffle=False, **ranks)
        return torch.utils.data.DataLoader(samples, batch_size=8 // ranks["num_replicas"], sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def regression(misbehave: Callable[[int, int], None] | None = None) -> Regression:
    torch.manual_seed(0)
    return Regression(misbehave)


def trainer(folder: Path, **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "default_root_dir": folder,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**defaults, **options})


def test_validate_returns_its_results_and_leaves_the_module_as_it_is(ray_cluster: str, tmp_path: Path) -> None:
    module = regression()
    (results,) = trainer(tmp_path, strategy=RayStrategy(num_workers=1)).validate(module, validation_samples())
    (expected,) = trainer(tmp_path).validate(regression(), validation_samples())
    assert results == pytest.approx(expected)
    assert torch.equal(module.layer.weight, regression().layer.weight)


class BuiltLate(Regression):
    """Its layer is built in the ranks only."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer

    def configure_model(self) -> None:
        if not hasattr(self, "layer"):
            self.layer = torch.nn.Linear(4, 1)


def test_a_module_built_in_the_ranks_is_not_taken_for_the_trained_one(ray_cluster: str, tmp_path: Path) -> None:
    module, checkpoint = BuiltLate(), ModelCheckpoint(tmp_path / "best")
    options: dict[str, Any] = {"strategy": RayStrategy(num_workers=1), "callbacks": [checkpoint], "enable_checkpointing": True}
    ray_trainer = trainer(tmp_path, **options)
    ray_trainer.fit(module)
    with pytest.raises(ValueError, match="a checkpoint saved here would have no weights"):
        ray_trainer.save_checkpoint(tmp_path / "empty.ckpt")
    for again in (ray_trainer, trainer(tmp_path, strategy=RayStrategy(num_workers=1))):
        with pytest.raises(ValueError, match='this BuiltLate was trained in Ray workers.*ckpt_path="best"'):
            again.validate(module, validation_samples())
    trained = regression()
    trained.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
    (expected,) = trainer(tmp_path).validate(trained, validation_samples())
    assert ray_trainer.validate(module, validation_samples(), ckpt_path="best") == [pytest.approx(expected)]


def validation_samples() -> torch.utils.data.DataLoader[Any]:
    samples = torch.utils.data.TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)))
    return torch.utils.data.DataLoader(samples, batch_size=8)


def raise_on_rank_1(rank: int, batch_idx: int) -> None:
    if (rank, batch_idx) == (1, 1):
        raise ValueError("boom on purpose")


def die_on_rank_1(rank: int, batch_idx: int) -> None:
    if (rank, batch_idx) == (1, 1):
        os._exit(17)


class Witness(Callback):
    """Counts what it is told, and raises if it is told of an exception outside the workers."""

    def __init__(self) -> None:
        self.batches, self.driver = 0, os.getpid()

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_exception(self, *_: Any) -> None:
        assert os.getpid() != self.driver

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.batches = state_dict["batches"]


def test_two_ranks_train_like_one_process_and_report_back(
    ray_cluster: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = regression()
    trainer(tmp_path, max_epochs=4).fit(alone)

    module, witness = regression(), Witness()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="loss", save_last=True)
    ray_trainer = trainer(
        tmp_path,
        strategy="ray",
        devices=2,
        callbacks=[witness, checkpoint],
        enable_checkpointing=True,
        logger=CSVLogger(tmp_path / "csv"),
        enable_progress_bar=True,
    )
    with caplog.at_level(logging.INFO, logger="rl_lightning"):
        ray_trainer.fit(module)

    assert ray_trainer.global_step == 8
    assert ray_trainer.current_epoch == 2
    assert ray_trainer.state.finished
    assert witness.batches == 8
    assert checkpoint.best_model_score is not None and Path(checkpoint.best_model_path).is_file()
    assert ray_trainer.callback_metrics["loss"] == checkpoint.best_model_score
    assert len((Path(ray_trainer.log_dir) / "metrics.csv").read_text().splitlines()) == 9
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert torch.equal(saved["layer.weight"], module.layer.weight)
    assert f"seed 7 in {os.getcwd()}" in caplog.messages
    assert "[rank 1] rank 1 finished epoch 1" in caplog.messages and "rank 0 finished epoch 1" in caplog.messages

    resumed = regression()
    one_rank = trainer(tmp_path, strategy=RayStrategy(num_workers=1), max_epochs=4)
    one_rank.fit(resumed, ckpt_path=checkpoint.last_model_path)
    assert one_rank.global_step == 16
    torch.testing.assert_close(resumed.layer.weight, alone.layer.weight)


def test_an_exception_names_the_rank_and_the_cause(ray_cluster: str, tmp_path: Path) -> None:
    witness = Witness()
    failing = trainer(tmp_path, strategy=RayStrategy(num_workers=2), callbacks=[witness])
    with pytest.raises(RayWorkerError, match=r"rank 1 .* raised ValueError: boom on purpose") as caught:
        failing.fit(regression(raise_on_rank_1))
    assert caught.value.rank == 1
    assert isinstance(caught.value.cause, ValueError)
    assert "raise_on_rank_1" in caught.value.worker_traceback
    assert witness in failing.callbacks


def test_a_rank_that_dies_is_named_and_the_others_end(ray_cluster: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RayWorkerError, match=r"rank 1 \(pid \d+ on \S+\) died: .*os\._exit") as caught:
        trainer(tmp_path, strategy=RayStrategy(num_workers=2)).fit(regression(die_on_rank_1))
    assert caught.value.rank == 1
    assert time.monotonic() - started < 60
    wait_until(lambda: not training_processes(psutil.Process()), "end of the training actors")


def test_a_placement_that_the_nodes_do_not_allow_is_named(ray_cluster: str, tmp_path: Path) -> None:
    """Two ranks on a node each, of which there is one."""
    strategy = RayStrategy(num_workers=2, placement="STRICT_SPREAD", start_timeout_s=2)
    with pytest.raises(RayWorkerError, match="still wait to be placed .* leave placement=STRICT_SPREAD out"):
        trainer(tmp_path, strategy=strategy).fit(regression())


def test_too_few_cpus_are_explained_at_once(ray_cluster: str, tmp_path: Path) -> None:
    greedy = trainer(tmp_path, strategy=RayStrategy(num_workers=2, num_cpus_per_worker=6))
    with pytest.raises(ValueError, match=r"12 CPUs \(12 for 2 trainer ranks\): the cluster has 8 CPUs on 1 node.*num_workers"):
        greedy.fit(regression())


def test_what_does_not_pickle_is_explained(ray_cluster: str, tmp_path: Path) -> None:
    module = regression()
    module.lock = __import__("threading").Lock()
    with pytest.raises(TypeError, match=r"cannot send .*lock.*configure_model"):
        trainer(tmp_path, strategy=RayStrategy(num_workers=1)).fit(module)


# -- signals, in a driver process of its own


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Driver:
    """A started ray_driver.py; `everything` are its processes and those of its actors."""

    def __init__(self, folder: Path, address: str, scenario: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
        script = Path(__file__).with_name("ray_driver.py")
        self.folder, self.log = folder, folder / "driver.log"
        self.process = psutil.Popen(
            [sys.executable, script, folder, address, scenario],
            env=environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wait_until(lambda: (folder / "started").exists() or self.process.poll() is not None, "first steps", 120)
        assert self.process.poll() is None, self.log.read_text()
        self.everything = self.process.children(recursive=True)
        self.child = psutil.Process(int((folder / "child").read_text()))

    def stop(self, *signums: signal.Signals) -> float:
        """Seconds from the first signal to the end."""
        started = time.monotonic()
        for signum in signums:
            self.process.send_signal(signum)
            time.sleep(0.5)
        self.process.wait(30)
        return time.monotonic() - started

    def survivors(self) -> list[psutil.Process]:
        """Processes that are still there a moment later."""
        _, alive = psutil.wait_procs([*self.everything, self.child], timeout=3)
        return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_sigterm_ends_everything_and_saves_a_checkpoint(folder: Path) -> None:
    driver = Driver(folder, "local", "steps")
    seconds = driver.stop(signal.SIGTERM)
    assert seconds < STOP_LIMIT_S, driver.log.read_text()
    assert driver.process.returncode == 128 + signal.SIGTERM, driver.log.read_text()
    assert driver.survivors() == []
    saved = torch.load(folder / "checkpoints" / "stopped.ckpt", weights_only=True)
    assert saved["global_step"] == saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] > 2


def test_ctrl_c_while_waiting_for_data_in_a_joined_cluster(ray_cluster: str, folder: Path) -> None:
    before = training_processes(psutil.Process())
    driver = Driver(folder, ray_cluster, "starved")
    actors = [process for process in training_processes(psutil.Process()) if process not in before]
    assert len(actors) >= 2
    seconds = driver.stop(signal.SIGINT)
    assert seconds < STOP_LIMIT_S, driver.log.read_text()
    assert driver.process.returncode == 1, driver.log.read_text()
    assert driver.survivors() == []
    assert psutil.wait_procs(actors, timeout=5)[1] == []
    assert torch.load(folder / "checkpoints" / "stopped.ckpt", weights_only=True)["global_step"] == 3


def test_a_second_ctrl_c_does_not_wait_for_a_stuck_step(ray_cluster: str, folder: Path) -> None:
    driver = Driver(folder, ray_cluster, "stuck")
    seconds = driver.stop(signal.SIGINT, signal.SIGINT)
    assert seconds < STOP_LIMIT_S, driver.log.read_text()
    assert driver.process.returncode == 1, driver.log.read_text()
    assert driver.survivors() == []


def training_processes(root: psutil.Process) -> list[psutil.Process]:
    """Ray processes under `root` that run one of our actors."""
    found = []
    for process in root.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "TrainWorker" in name or "RunChannel" in name or "Companion" in name:
            found.append(process)
    return found


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.1)
