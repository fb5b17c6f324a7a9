"""Ctrl-C and SIGTERM in one of two processes that Lightning started: both end after the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

SCRIPT = """
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from run_samples import SmallData, SmallModule

from rl_lightning.callbacks.recovery import RecoveryCheckpoint

WHERE, FOLDER, RANKS, SIGNALS = sys.argv[1], Path(sys.argv[2]), sys.argv[3], map(int, sys.argv[4].split(","))


def raise_here(trainer, where):
    if where == WHERE and trainer.global_step == 2 and str(trainer.global_rank) in RANKS:
        for signum in SIGNALS:
            os.kill(os.getpid(), signum)


class Module(SmallModule):
    def training_step(self, batch, batch_idx):
        raise_here(self.trainer, "step")
        if WHERE == "stuck" and self.global_step == 2:
            self.trainer.strategy.barrier()
            raise_here(self.trainer, "stuck")
            threading.Event().wait()
        super().training_step(batch, batch_idx)


class Data(SmallData):
    def before_batch(self, position):
        raise_here(self.trainer, "wait")


signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))  # as ray.init does
Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, num_sanity_val_steps=0, logger=False, enable_progress_bar=False,
    callbacks=[RecoveryCheckpoint(FOLDER)],
).fit(Module(), datamodule=Data(5))
"""


def run(folder: Path, where: str, ranks: str, *signals: signal.Signals) -> tuple[int, int | None, str]:
    """(exit code, global step that was saved, output)."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests/unit'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), where, str(folder), ranks, ",".join(str(int(s)) for s in signals)]
    process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        for left in [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]:
            left.kill()
    saved = folder / "last.ckpt"
    return process.returncode, torch.load(saved, weights_only=True)["global_step"] if saved.exists() else None, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "ranks", "signum", "code"),
    [
        ("step", "1", signal.SIGTERM, 143),
        ("step", "01", signal.SIGINT, 1),
        ("wait", "0", signal.SIGTERM, 143),
    ],
)
def test_both_finish_the_step_and_save_it(tmp_path: Path, where: str, ranks: str, signum: signal.Signals, code: int) -> None:
    ended, saved, output = run(tmp_path, where, ranks, signum)
    assert (ended, saved) == (code, 3), output


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_the_second_one_does_not_wait(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    ended, saved, output = run(tmp_path, "stuck", "0", signum, signum)
    assert (ended, saved) == (code, None), output
