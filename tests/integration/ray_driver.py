"""A driver process that the signal tests start: trains until somebody stops it.

    python ray_driver.py FOLDER ADDRESS SCENARIO

FOLDER gets `started` (once training runs), `child` (pid of a process that rank 0 started) and checkpoints.
SCENARIO: `steps` trains short steps, `starved` waits for a batch that never comes, `stuck` never finishes a step.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from conftest import small_cluster
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rl_lightning.strategies import RayStrategy


class Batches:
    """Batches without end, or only three."""

    def __init__(self, starved: bool) -> None:
        self.starved = starved

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Iterator[torch.Tensor]:
        for i in range(len(self)):
            if self.starved and i == 3:
                threading.Event().wait()
            yield torch.ones(2, 4)


class Model(LightningModule):
    """A linear layer, with a child process and a named actor on rank 0."""

    def __init__(self, folder: Path, stuck: bool) -> None:
        super().__init__()
        self.folder, self.stuck, self.layer = folder, stuck, torch.nn.Linear(4, 1)

    def on_train_start(self) -> None:
        if self.global_rank == 0:
            import ray

            child = subprocess.Popen(["sleep", "1000"])
            (self.folder / "child").write_text(str(child.pid))
            self.actor = ray.remote(Companion).options(name="companion", num_cpus=0).remote()
            ray.get(self.actor.pid.remote())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.05)
        if batch_idx == 2 and self.global_rank == 0:
            (self.folder / "started").touch()
        if batch_idx == 2 and self.stuck:
            time.sleep(1000)
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Companion:
    """An actor that lives as long as rank 0."""

    def pid(self) -> int:
        import os

        return os.getpid()


def main() -> None:
    folder, address, scenario = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    ray_init: dict[str, Any] = small_cluster(str(folder), num_cpus=4) | {"address": address}
    trainer = Trainer(
        strategy=RayStrategy(num_workers=2, ray_init=ray_init, stop_timeout_s=60 if scenario == "stuck" else 8),
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[ModelCheckpoint(folder / "checkpoints", filename="stopped", save_on_exception=True, save_last=True)],
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(Model(folder, scenario == "stuck"), Batches(scenario == "starved"))


if __name__ == "__main__":
    main()
