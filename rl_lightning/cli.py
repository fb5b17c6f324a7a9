"""`rl-lightning fit --config recipe.yaml`: LightningCLI with runs, folders, callbacks and recovery.

    rl-lightning {fit,validate,test,predict} --config FILE [--model.path FOLDER] [--trainer.max_epochs 2] ...

Model and data are given by class: a short name (`AsyncPPOModule`, `SFTModule`, `RolloutDataModule`, `SFTDataModule`) or
the import path of anyone's LightningModule or LightningDataModule.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rl_lightning import __version__
from rl_lightning.callbacks.export import Export
from rl_lightning.callbacks.main_log import MainLog
from rl_lightning.callbacks.nonfinite import NonFiniteGuard
from rl_lightning.callbacks.recovery import RecoveryCheckpoint, newest_checkpoint
from rl_lightning.callbacks.rollout_log import RolloutLog
from rl_lightning.callbacks.run_log import RunLog
from rl_lightning.callbacks.throughput import Throughput
from rl_lightning.failure import CONFIGURATION_ERRORS, TRAINING_ERRORS, Repetition, find_cause, may_be_mended_by_restart
from rl_lightning.gpus import apply_allocation, leave_gpus_to_ranks
from rl_lightning.parser import RunArgumentParser
from rl_lightning.run import RunConfig
from rl_lightning.strategies.stop_signals import EXIT_CODE_OF_SIGTERM
from rl_lightning.terminal import show_logs

logger = logging.getLogger(__name__)

KNOWN_CLASSES = (
    "rl_lightning.modules.async_ppo",
    "rl_lightning.modules.sft",
    "rl_lightning.prompts.sft_datamodule",
    "rl_lightning.rollout.datamodule",
    "rl_lightning.strategies",
)
"""Modules whose classes are known by their short names; none of them loads Ray, SGLang or transformers."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 5,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


class RLCLI(LightningCLI):
    """LightningCLI whose runs have a name, folders, logs, exports and restart checkpoints (the `run` options).

    Shared values are given once: `model.path` also is the data's `model_path`, `seed_everything` also the `seed` of both.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        for module in KNOWN_CLASSES:
            importlib.import_module(module)
        self.run_config: RunConfig | None = None
        self._start_from: str | None = None
        self._found: tuple[int, int] | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1,
            parser_class=RunArgumentParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    # -- parsing

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, an integer so that a saved configuration repeats the run."""
        parser.add_argument("--seed_everything", type=int, default=1, help="Seed of initialisation, order and sampling.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The `run` options, and what model and data share."""
        parser.add_class_arguments(RunConfig, "run")
        parser.link_arguments("model.init_args.path", "data.init_args.model_path")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _parse_ckpt_path(self) -> None:
        """Keeps what the user configured: Lightning would put the checkpoint's hyper-parameters in its place."""

    # -- construction

    def before_instantiate_classes(self) -> None:
        """Notes which checkpoint to start from and spreads `allocation_mode` and GPUs over engines and trainer ranks."""
        config = self._options()
        self._start_from = config.get("ckpt_path")
        if "ckpt_path" in config:
            config.ckpt_path = None  # the saved configuration repeats the run from its start
        if config.run.allocation_mode is not None:
            apply_allocation(config)
        leave_gpus_to_ranks(config.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with this run's loggers and callbacks beside the user's."""
        self.run_config = run = self._named(self._get(self.config_init, "run"))
        given = self._get(self.config_init, "trainer")
        theirs = _as_list(given.get("callbacks"))
        own = run_callbacks(run, training=self.subcommand in ("fit", None), saves=not given.get("fast_dev_run"))
        kwargs.setdefault("callbacks", [*theirs, *(c for c in own if not any(type(t) is type(c) for t in theirs))])
        kwargs.setdefault("logger", run_loggers(run, given.get("logger")))
        kwargs.setdefault("default_root_dir", given.get("default_root_dir") or str(run.logs))
        return super().instantiate_trainer(**kwargs)

    def _named(self, run: RunConfig) -> RunConfig:
        """Chooses the trial once; what is built again after a failure keeps it, and the saved configuration has it."""
        if self.run_config is not None:
            run.trial = self.run_config.trial
        else:
            run.choose_trial(new=self.subcommand == "fit" and self._start_from is None and run.recover_mode != "resume")
        self._options().run.trial = run.trial
        return run

    def _options(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    # -- running

    def before_fit(self) -> None:
        """Says what runs and where it writes, and looks at the data before anything is started."""
        run = self.run_config
        assert run is not None
        MainLog.attach(run.logs)
        resume = self.subcommand == "fit" and run.recover_mode == "resume"
        self._found = identity(newest_checkpoint(run.checkpoints))
        self.config_init[self.subcommand].ckpt_path = start_checkpoint(run.checkpoints, self._start_from, resume=resume)
        if self.subcommand == "fit":
            self._save_config(run.logs / "config.yaml")
        self._announce(run)
        if hasattr(self.model, "check_inputs"):
            self.model.check_inputs(self.trainer)
        if hasattr(self.datamodule, "check_inputs"):
            self.datamodule.check_inputs()

    before_validate = before_test = before_predict = before_fit

    def fit(self, **kwargs: Any) -> None:
        """`Trainer.fit`, again from the restart checkpoint after a failure that is not the user's."""
        run = self.run_config
        assert run is not None
        retries = 0 if run.recover_mode == "disabled" else run.recover_retries
        repetition = Repetition()
        for failures in itertools.count(1):
            if hasattr(self.datamodule, "keeps_fleet"):
                self.datamodule.keeps_fleet = failures <= retries
            try:
                return self.trainer.fit(**kwargs)
            except Exception as error:
                if failures > retries or not may_be_mended_by_restart(error):
                    raise
                if repetition.is_certain(error, identity(newest_checkpoint(run.checkpoints))):
                    logger.error(
                        "Failure %d is the same once more, and nothing was saved in between: no further attempt", failures
                    )
                    raise
                logger.error("Failure %d, of which %d are allowed: %s", failures, retries, error, exc_info=True)
            seed_everything(self._options().seed_everything, workers=True)
            before = (self.datamodule, self.trainer.strategy)
            self.instantiate_classes()
            for now, then in zip((self.datamodule, self.trainer.strategy), before, strict=True):
                if hasattr(now, "adopt"):
                    now.adopt(then)
            kwargs = self._prepare_subcommand_kwargs("fit")
            # one that was there before is not this run's if the user named another
            resume = run.recover_mode == "resume" or identity(newest_checkpoint(run.checkpoints)) != self._found
            kwargs["ckpt_path"] = start_checkpoint(run.checkpoints, self._start_from, resume=resume)
            logger.info("Starting again from %s", kwargs["ckpt_path"] or "the beginning")

    def after_fit(self) -> None:
        """Ends this process's part of `main.log`."""
        MainLog.detach_all()

    after_validate = after_test = after_predict = after_fit

    def _save_config(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._parser(self.subcommand).save(self._options(), path, skip_unset=False, overwrite=True, multifile=False)

    def _announce(self, run: RunConfig) -> None:
        strategy = type(self.trainer.strategy).__name__
        ray = " on Ray" if strategy.startswith("Ray") else ""
        model, data = type(self.model).__name__, type(self.datamodule).__name__
        logger.info("rl-lightning %s: %s %s with %s, %s%s", __version__, self.subcommand, model, data, strategy, ray)
        logger.info("Experiment %s, trial %s", run.experiment, run.trial)
        logger.info("Logs         %s (main.log, TensorBoard, rollouts)", run.logs)
        if self.subcommand == "fit":
            logger.info("Config       %s (rl-lightning fit --config THAT repeats the run)", run.logs / "config.yaml")
            logger.info("Checkpoints  %s", run.checkpoints)


def run_callbacks(run: RunConfig, *, training: bool, saves: bool = True) -> list[Callback]:
    """What every run has; the order matters: Throughput measures what RunLog prints, NonFiniteGuard stops what was logged.

    Args:
        run: names the folders.
        training: for `fit`.
        saves: models and restart checkpoints too; `fast_dev_run` saves none, so that `--ckpt_path last` never means it.
    """
    if not training:
        return [RunLog(run.logs)]
    shows = [
        Throughput(),
        RunLog(run.logs),
        RolloutLog(run.logs / "rollouts", run.sample_rollouts_steps),
        NonFiniteGuard(run.checkpoints),
    ]
    if not saves:
        return shows
    return [
        *shows,
        Export(run.checkpoints, run.save_freq_epochs, run.save_freq_steps, run.save_freq_secs),
        RecoveryCheckpoint(run.checkpoints, run.ckpt_freq_epochs, run.ckpt_freq_steps, run.ckpt_freq_secs),
    ]


def run_loggers(run: RunConfig, given: Any) -> list[Logger] | bool:
    """TensorBoard unless the user set `trainer.logger`, and Weights & Biases if the run asks for it."""
    if given is False:
        loggers: list[Logger] = []
    elif given is None or given is True:
        loggers = [_tensorboard(run)]
    else:
        loggers = _as_list(given)
    if run.wandb_mode != "disabled":
        loggers.append(_wandb(run))
    return loggers or False


def _tensorboard(run: RunConfig) -> Logger:
    folder = Path(run.tensorboard_path) if run.tensorboard_path is not None else run.logs
    if run.tensorboard_path is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"run.tensorboard_path={folder} cannot be written to ({error}): name a folder that can") from None
    return TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)


def _wandb(run: RunConfig) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    run.logs.mkdir(parents=True, exist_ok=True)
    return WandbLogger(name=run.trial, project=run.experiment, save_dir=run.logs, offline=run.wandb_mode == "offline")


def identity(path: Path | None) -> tuple[int, int] | None:
    """Another one for a file or folder that was replaced; None where there is none."""
    if path is None:
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def start_checkpoint(folder: Path, asked: str | None, *, resume: bool) -> str | None:
    """The checkpoint to start from.

    Args:
        folder: of the restart checkpoint, which is meant by `last`.
        asked: what the user gave as `ckpt_path`.
        resume: take the restart checkpoint where there is one.

    Raises:
        ValueError: there is none where one is asked for.
    """
    newest = newest_checkpoint(folder)
    if asked is not None and asked.endswith((".ckpt", ".pt", "/")) and "://" not in asked and not Path(asked).exists():
        raise ValueError(f"--ckpt_path {asked}: there is no such file or folder (working folder {Path.cwd()})")
    if newest is not None and (resume or asked == "last"):
        return str(newest)
    if asked == "last":
        raise ValueError(
            f"--ckpt_path last: there is no restart checkpoint in {folder}; "
            f"leave --ckpt_path out to start from the beginning, or name another run.trial"
        )
    return asked


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) else [value]


def main(args: ArgsType = None) -> None:
    """The console script. Ends with status 2 for wrong options or data, and 1 for other failures.

    What needs no traceback, because its message says what to do, is told in one sentence.
    """
    show_logs()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of loading and saving, torn to lines by log files and Ray
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's use of torch, nothing that a user could change
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that `my_rewards.score` means my_rewards.py in this folder
    try:
        RLCLI(args)
    except SIGTERMException as stop:  # Lightning raises it without a status, which would be one of success
        sys.exit(EXIT_CODE_OF_SIGTERM if stop.code is None else stop.code)
    except Exception as error:
        sentence = find_cause(error, (*CONFIGURATION_ERRORS, *TRAINING_ERRORS))
        logger.error("%s", sentence or error, exc_info=True, extra={"brief": sentence is not None})
        sys.exit(2 if isinstance(sentence, CONFIGURATION_ERRORS) else 1)
    finally:
        MainLog.detach_all()
