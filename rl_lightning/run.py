"""One run: what it is called, where it writes, what it saves, and how it recovers."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rl_lightning.callbacks.recovery import newest_checkpoint

FIRST_TRIAL = "trial0"


@dataclass
class RunConfig:
    """Everything about a run that is neither model, data nor trainer.

    Args:
        fileroot: root of everything written.
        experiment: name of what is tried; a folder under `logs` and `checkpoints`.
        trial: name of this attempt. Null takes the next free `trial{N}`, or, when a run is continued, the newest one that
            has a restart checkpoint. A new run never writes into the folder of another one: if the name is taken, its
            number is raised.
        allocation_mode: GPUs for generation and training, e.g. `sglang.d4p1m1+d4p1m1`; null leaves that to
            `data.num_engines` and the strategy's `num_workers`.
        n_nodes: machines of the run, where `allocation_mode` is given.
        n_gpus_per_node: GPUs of each machine, where `allocation_mode` is given.
        save_freq_epochs: Hugging Face folder after every so many epochs; null never.
        save_freq_steps: the same after every so many training steps.
        save_freq_secs: the same after so many seconds.
        ckpt_freq_epochs: restart checkpoint after every so many epochs; null never.
        ckpt_freq_steps: the same after every so many training steps.
        ckpt_freq_secs: the same after so many seconds.
        recover_mode: `auto` goes on from the restart checkpoint after a failure that is not the user's; `resume` also
            starts from it; `disabled` ends the run at the first failure.
        recover_retries: failures after which `auto` and `resume` give up.
        wandb_mode: also log to Weights & Biases, as project `experiment` and run `trial`.
        tensorboard_path: folder for TensorBoard's files; null is the run's log folder.
        sample_rollouts_steps: training steps between two rollouts shown as text in TensorBoard; 0 for none.
    """

    fileroot: str = "runs"
    experiment: str = "experiment"
    trial: str | None = None
    allocation_mode: str | None = None
    n_nodes: int = 1
    n_gpus_per_node: int = 8
    save_freq_epochs: int | None = 1
    save_freq_steps: int | None = None
    save_freq_secs: float | None = None
    ckpt_freq_epochs: int | None = None
    ckpt_freq_steps: int | None = None
    ckpt_freq_secs: float | None = 600
    recover_mode: Literal["auto", "resume", "disabled"] = "auto"
    recover_retries: int = 10
    wandb_mode: Literal["disabled", "online", "offline"] = "disabled"
    tensorboard_path: str | None = None
    sample_rollouts_steps: int = 10

    def __post_init__(self) -> None:
        for option, name in (("experiment", self.experiment), ("trial", self.trial)):
            if name is not None and not re.fullmatch(r"\w[\w.+=-]*", name):
                raise ValueError(
                    f"run.{option}={name!r} must be a folder name: a letter or digit, then letters, digits and . _ - + ="
                )
        for option in (
            "save_freq_epochs",
            "save_freq_steps",
            "save_freq_secs",
            "ckpt_freq_epochs",
            "ckpt_freq_steps",
            "ckpt_freq_secs",
        ):
            value = getattr(self, option)
            if value is not None and value <= 0:
                raise ValueError(f"run.{option}={value} must be positive, or null for never")
        if self.wandb_mode != "disabled" and importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"run.wandb_mode={self.wandb_mode} needs Weights & Biases: install it (pip install 'rl-lightning[wandb]') "
                f"or set run.wandb_mode=disabled"
            )
        if self.recover_retries < 0:
            raise ValueError(f"run.recover_retries={self.recover_retries} must be 0 or more")

    @property
    def logs(self) -> Path:
        """Folder of config.yaml, main.log, TensorBoard's events and rollouts."""
        return Path(self.fileroot) / "logs" / self.experiment / (self.trial or FIRST_TRIAL)

    @property
    def checkpoints(self) -> Path:
        """Folder of Hugging Face folders and the restart checkpoint."""
        return Path(self.fileroot) / "checkpoints" / self.experiment / (self.trial or FIRST_TRIAL)

    def choose_trial(self, *, new: bool) -> None:
        """Fixes `trial`.

        Args:
            new: claim a folder that no run has used; else take the named one, or the newest that can be continued.
        """
        if not new:
            self.trial = self.trial or self._newest_trial() or FIRST_TRIAL
            return
        self.trial = self.trial or FIRST_TRIAL
        try:
            while self.checkpoints.exists() or not _claim(self.logs):
                self.trial = _next_name(self.trial)
        except OSError as error:
            raise ValueError(f"run.fileroot={self.fileroot} cannot be written to ({error}): name a folder that can") from None

    def _newest_trial(self) -> str | None:
        """The newest with a restart checkpoint; a later one that failed before it had any does not hide it."""
        folders = (*self.logs.parent.glob("trial*"), *self.checkpoints.parent.glob("trial*"))
        numbers = {int(folder.name[5:]) for folder in folders if folder.name[5:].isdecimal()}
        restartable = [number for number in numbers if newest_checkpoint(self.checkpoints.parent / f"trial{number}")]
        return f"trial{max(restartable or numbers)}" if numbers else None


def _claim(folder: Path) -> bool:
    """Creates `folder`; False if it is there already, also when another run is faster."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def _next_name(name: str) -> str:
    """`trial0` -> `trial1`, `long` -> `long1`."""
    stem = name.rstrip("0123456789")
    return f"{stem}{int(name[len(stem) :] or 0) + 1}"
