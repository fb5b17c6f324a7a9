from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from run_samples import SmallData, SmallModule, make_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl_lightning.callbacks.export import Export
from rl_lightning.callbacks.main_log import MainLog
from rl_lightning.callbacks.recovery import RecoveryCheckpoint, _replace, newest_checkpoint
from rl_lightning.callbacks.rollout_log import RolloutLog, records
from rl_lightning.callbacks.run_log import RunLog, format_duration, format_statistics
from rl_lightning.callbacks.throughput import Throughput


def make_trainer(callbacks: list[Callback], **options: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, RecoveryCheckpoint) for c in callbacks),
    }
    return Trainer(callbacks=callbacks, **{**defaults, **options})


@pytest.fixture(autouse=True)
def no_failures_yet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SmallModule, "failures", [])


def fit(
    callbacks: list[Callback], module: SmallModule | None = None, n_steps: int = 3, ckpt_path: Any = None, **options: Any
) -> SmallModule:
    torch.manual_seed(0)
    module = module or SmallModule()
    make_trainer(callbacks, **options).fit(module, datamodule=SmallData(n_steps), ckpt_path=ckpt_path)
    return module


class Interrupt(Callback):
    """Raises `error` where a step begins, ends, or while batch number `at` is awaited."""

    def __init__(self, where: str, at: int, error: type[BaseException]) -> None:
        self.where, self.at, self.error = where, at, error

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.where == "before step" and trainer.global_step == self.at:
            raise self.error

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.where == "validation":
            raise self.error


class Hesitant(SmallData):
    """Is interrupted while the trainer waits for the batch after `at` steps."""

    def __init__(self, n_steps: int, at: int, error: type[BaseException]) -> None:
        super().__init__(n_steps)
        self.at, self.error = at, error

    def before_batch(self, position: int) -> None:
        if self.trainer.global_step == self.at:
            raise self.error


# -- RunLog


def test_every_step_has_its_line_and_statistics(tmp_path: Path):
    fit([RunLog(tmp_path)], n_steps=3)
    text = (tmp_path / "main.log").read_text()
    lines = re.findall(r"Epoch \d/2 step \d/3 \(global step \d\) finishes\.", text)
    assert lines == [
        f"Epoch {e + 1}/2 step {s + 1}/3 (global step {3 * e + s + 1}) finishes." for e in range(2) for s in range(3)
    ]
    assert text.count("task_reward") == 6 and text.count("actor_loss") == 6
    assert text.count("Validation after global step") == 2 and "val_reward 0" in text


def test_validation_before_training_is_said_too(tmp_path: Path):
    fit([RunLog(tmp_path)], n_steps=1, max_epochs=1, num_sanity_val_steps=1)
    text = (tmp_path / "main.log").read_text()
    assert "Validation after global step 0\n    val_reward" in text and "Validation after global step 1\n    val_reward" in text


def test_times_are_this_step_total_and_remaining(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ticks = iter(range(0, 1000, 10))
    with caplog.at_level(logging.INFO, "rl_lightning"):
        fit([RunLog(tmp_path, clock=lambda: float(next(ticks)))], n_steps=3)
    steps = [r.getMessage().split("\n")[0] for r in caplog.records if "finishes" in r.getMessage()]
    assert steps[0].endswith("This step 10.0 s, total 10.0 s, about 50.0 s remaining.")
    assert steps[4].endswith("This step 10.0 s, total 50.0 s, about 10.0 s remaining.")


def test_remaining_time_follows_max_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    ticks = iter(range(0, 1000, 10))
    with caplog.at_level(logging.INFO, "rl_lightning"):
        fit([RunLog(tmp_path, clock=lambda: float(next(ticks)))], n_steps=3, max_epochs=-1, max_steps=4)
    steps = [r.getMessage().split("\n")[0] for r in caplog.records if "finishes" in r.getMessage()]
    assert len(steps) == 4
    assert "Epoch 2 step 1/3 (global step 4)" in steps[3] and steps[3].endswith("about 0.0 s remaining.")
    assert steps[0].endswith("about 30.0 s remaining.")


def test_main_log_is_written_once_and_closed(tmp_path: Path):
    outer = MainLog.attach(tmp_path)
    fit([RunLog(tmp_path)], n_steps=1, max_epochs=1)
    assert outer is not None and outer in logging.getLogger("rl_lightning").handlers
    MainLog.detach_all()
    assert (tmp_path / "main.log").read_text().count("finishes") == 1
    assert not any(isinstance(h, MainLog) for h in logging.getLogger("rl_lightning").handlers)


def test_a_main_log_that_cannot_be_written_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    (tmp_path / "main.log").symlink_to("/dev/full")
    handler = MainLog.attach(tmp_path)
    assert handler is not None
    for number in range(3):
        logging.getLogger("rl_lightning.test").error("%d", number)
    handler.detach()
    assert caplog.text.count("cannot be written ([Errno 28] No space left on device)") == 1
    assert "Logging error" not in capsys.readouterr().err


def test_records_of_other_processes_stay_out_of_main_log(tmp_path: Path):
    handler = MainLog.attach(tmp_path)
    assert handler is not None
    record = logging.makeLogRecord(
        {"name": "rl_lightning.x", "msg": "passed on", "process": -1, "levelno": 20, "levelname": "INFO"}
    )
    logging.getLogger("rl_lightning").handle(record)
    handler.detach()
    assert "passed on" not in (tmp_path / "main.log").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (245, "4 min 05 s"), (11234, "3 h 07 min")]
)
def test_durations(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_statistics_are_aligned():
    text = format_statistics({"b": 2.0, "a_long_name": 0.123456, "c": 1e-9, "d": 4.0, "e": 5.0})
    assert text == "\n    a_long_name 0.1235  b 2  c 1e-09  d 4\n    e 5"
    assert format_statistics({}) == ""


# -- Throughput


def test_throughput_adds_to_statistics_and_loggers(tmp_path: Path):
    ticks = iter(range(0, 1000, 10))
    loggers = [TensorBoardLogger(tmp_path, name="", version="tb")]
    module = fit([Throughput(clock=lambda: float(next(ticks)))], n_steps=2, max_epochs=1, logger=loggers)
    assert module.step_statistics["time/step"] == 10
    assert module.step_statistics["throughput/trained_tokens_per_s"] == 4
    assert module.step_statistics["throughput/generated_tokens_per_s"] == 6
    assert module.step_statistics["rollout/groups_running"] == 2
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"histograms": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("throughput/generated_tokens_per_s")] == [1, 2]


def test_generation_throughput_is_said_while_the_trainer_is_busy(caplog: pytest.LogCaptureFixture):
    class Slow(SmallModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            time.sleep(0.15)

    with caplog.at_level(logging.INFO, "rl_lightning"):
        fit([Throughput(interval_s=0.05)], Slow(), n_steps=2, max_epochs=1)
    said = [r.getMessage() for r in caplog.records if "Generation throughput" in r.getMessage()]
    assert len(said) >= 2 and re.fullmatch(r"Generation throughput: \d+\.\d tokens/s", said[0])


def test_what_kept_engines_generated_before_a_restart_does_not_count(tmp_path: Path):
    ticks = iter(range(0, 1000, 10))
    module, data = SmallModule(), SmallData(1)
    data.given = 60_000
    make_trainer([Throughput(clock=lambda: float(next(ticks)))], max_epochs=1).fit(module, datamodule=data)
    assert module.step_statistics["throughput/generated_tokens_per_s"] == 6


def test_a_run_that_fails_leaves_no_thread():
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="it broke"):
        fit([Throughput(interval_s=0.05)], SmallModule(fail_at=1))
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), thread.name


# -- RolloutLog


def test_one_line_per_answer(tmp_path: Path):
    fit([RolloutLog(tmp_path)], n_steps=2, max_epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "rank0.jsonl").read_text().splitlines()]
    assert [(r["step"], r["index"], r["sample"]) for r in lines] == [(s + 1, s % 2, i) for s in range(4) for i in range(2)]
    assert lines[3] == {
        "step": 2, "index": 1, "query_id": "q1", "task": "math", "sample": 1, "prompt": "1+2=", "answer": "5", "worker": "",
        "reward": -1.0, "reward_parts": {"exact": -1.0}, "reward_failure": None,
        "head_version": 1, "tail_version": 2, "n_tokens": 3, "truncated": False,
    }  # fmt: skip


def test_a_resumed_run_has_every_step_once(tmp_path: Path):
    path = tmp_path / "rank0.jsonl"
    whole = [json.dumps({"step": step}) + "\n" for step in (1, 1, 2, 3, 3)]
    path.write_text("".join(whole) + '{"step": 4, "ans')
    saved = tmp_path / "last.ckpt"
    fit([RecoveryCheckpoint(tmp_path, steps=2)], n_steps=2, max_epochs=1)
    fit([RolloutLog(tmp_path)], n_steps=2, max_epochs=2, ckpt_path=saved)
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 1, 2, 3, 3, 4, 4] and "answer" in path.read_text().splitlines()[3]


@pytest.mark.parametrize("torn", ['{"step": 4, "answer": "\u2713'.encode()[:-1], b"\0" * 9 + b"\n", b'{"step": 3, "ans\n'])
def test_a_line_that_a_crash_tore_does_not_end_the_next_run(tmp_path: Path, torn: bytes):
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(b"".join(json.dumps({"step": step}).encode() + b"\n" for step in (1, 2)) + torn)
    fit([RecoveryCheckpoint(tmp_path, steps=2)], n_steps=2, max_epochs=1)
    fit([RolloutLog(tmp_path)], n_steps=2, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 3, 4, 4]


def test_a_run_on_fewer_ranks_drops_later_steps_from_the_files_of_all(tmp_path: Path):
    for rank in range(3):
        (tmp_path / f"rank{rank}.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    fit([RecoveryCheckpoint(tmp_path, steps=2)], n_steps=2, max_epochs=1)
    fit([RolloutLog(tmp_path)], n_steps=2, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert [json.loads(line)["step"] for line in (tmp_path / "rank2.jsonl").read_text().splitlines()] == [1, 2]


def test_samples_and_histograms_reach_tensorboard(tmp_path: Path):
    fit(
        [RolloutLog(tmp_path, sample_every_n_steps=2, n_samples=1)],
        n_steps=3,
        max_epochs=1,
        logger=[TensorBoardLogger(tmp_path, name="", version="tb")],
    )
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"histograms": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    assert [e.step for e in events.Histograms("reward")] == [1, 3]
    shown = events.Tensors("rollouts/text_summary")
    assert [e.step for e in shown] == [1, 3]
    text = shown[1].tensor_proto.string_val[0].decode()
    assert "    2+2=" in text and "reward 1" in text


def test_records_keep_odd_text():
    record = next(records([make_group(0, ("\u2028 \x00 é",))], 1))
    assert json.loads(json.dumps(record, ensure_ascii=False))["answer"] == "\u2028 \x00 é"


# -- Export


def test_folders_are_named_by_epoch_and_step(tmp_path: Path):
    fit([Export(tmp_path, epochs=1, steps=2)], n_steps=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch1epochstep2globalstep2",
        "epoch1epochstep3globalstep3",
        "epoch2epochstep1globalstep4",
        "epoch2epochstep3globalstep6",
    ]


def test_the_last_weights_are_exported_even_with_everything_off(tmp_path: Path):
    module = fit([Export(tmp_path, epochs=None)], n_steps=3)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "epoch2epochstep3globalstep6"
    assert json.loads((folder / "model.json").read_text()) == module.model.weight.tolist()
    assert (folder / "tokenizer.json").exists()


def test_rank_0_says_for_all_whether_seconds_have_passed(tmp_path: Path):
    """Their clocks differ, and of a model in pieces an export is a collective."""

    class AnotherRank(SingleDeviceStrategy):
        def broadcast(self, obj: Any, src: int = 0) -> Any:
            return True if obj is False else obj

    fit([Export(tmp_path, epochs=None, secs=3600)], n_steps=3, max_epochs=1, strategy=AnotherRank(torch.device("cpu")))
    assert len(list(tmp_path.iterdir())) == 3


def test_the_last_weights_are_exported_where_the_run_failed_before(tmp_path: Path):
    class Fails(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            raise RuntimeError("behind the last step")

    with pytest.raises(RuntimeError, match="behind the last step"):
        fit([Fails(), Export(tmp_path / "models", epochs=None), RecoveryCheckpoint(tmp_path)], n_steps=3, max_epochs=1)
    fit([Export(tmp_path / "models", epochs=None), RecoveryCheckpoint(tmp_path)], n_steps=3, max_epochs=1, ckpt_path="last")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["epoch1epochstep3globalstep3"]


def test_a_failed_export_leaves_no_folder_under_its_name(tmp_path: Path):
    module = SmallModule()
    module.tokenizer.save_pretrained = lambda folder: (_ for _ in ()).throw(OSError("disk full"))  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk full"):
        fit([Export(tmp_path, steps=1)], module)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("epoch")]


# -- RecoveryCheckpoint


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop_after: int):
    whole = fit([], n_steps=3)
    fit([RecoveryCheckpoint(tmp_path, steps=stop_after, secs=None)], n_steps=3, max_steps=stop_after)
    resumed = fit([RecoveryCheckpoint(tmp_path)], n_steps=3, ckpt_path="last")
    assert resumed.losses == whole.losses[stop_after:]
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_training_can_go_on_behind_the_last_epoch(tmp_path: Path):
    whole = fit([], n_steps=3, max_epochs=3)
    fit([RecoveryCheckpoint(tmp_path)], n_steps=3, max_epochs=2)
    resumed = fit([RecoveryCheckpoint(tmp_path)], n_steps=3, max_epochs=3, ckpt_path="last")
    assert resumed.losses == whole.losses[6:]


def test_checkpoint_when_due_and_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "rl_lightning"):
        fit([RecoveryCheckpoint(tmp_path, epochs=1, steps=2, secs=None)], n_steps=3, max_epochs=3)
    saved = [int(m[1]) for r in caplog.records if (m := re.search(r"of global step (\d+)", r.getMessage()))]
    assert saved == [2, 3, 4, 6, 8, 9]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_all_off_saves_nothing(tmp_path: Path):
    fit([RecoveryCheckpoint(tmp_path / "none", secs=None)], n_steps=2)
    assert newest_checkpoint(tmp_path / "none") is None


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path: Path):
    class Fails(RecoveryCheckpoint):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            if trainer.global_step == 2:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fit([Fails(tmp_path, steps=1)], n_steps=3)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize(
    ("error", "ends_with"),
    [(KeyboardInterrupt, SystemExit), (SIGTERMException, SIGTERMException), (SystemExit, SystemExit)],
)
def test_stopped_while_waiting_saves_and_resumes_exactly(
    tmp_path: Path, error: type[BaseException], ends_with: type[BaseException]
):
    whole = fit([], n_steps=3)
    torch.manual_seed(0)
    with pytest.raises(ends_with):
        make_trainer([RecoveryCheckpoint(tmp_path)]).fit(SmallModule(), datamodule=Hesitant(3, at=4, error=error))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    resumed = fit([RecoveryCheckpoint(tmp_path)], n_steps=3, ckpt_path="last")
    assert resumed.losses == whole.losses[4:]


@pytest.mark.parametrize(("error", "ends_with"), [(SIGTERMException, SIGTERMException), (KeyboardInterrupt, SystemExit)])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 1}], ids=["after an epoch", "after a step"])
def test_stopped_in_a_validation_saves_and_resumes_exactly(
    tmp_path: Path, error: type[BaseException], ends_with: type[BaseException], options: dict[str, Any]
):
    whole = fit([], n_steps=3)
    torch.manual_seed(0)
    stopped = SmallModule()
    with pytest.raises(ends_with):
        fit([RecoveryCheckpoint(tmp_path), Interrupt("validation", 2, error)], stopped, n_steps=3, **options)
    resumed = fit([RecoveryCheckpoint(tmp_path)], n_steps=3, ckpt_path="last", **options)
    assert stopped.losses and stopped.losses + resumed.losses == whole.losses


def test_stopped_in_a_validation_without_training_saves_nothing(tmp_path: Path):
    recovery = RecoveryCheckpoint(tmp_path)
    fit([recovery], n_steps=3, max_epochs=1)
    with pytest.raises(SystemExit):
        make_trainer([recovery, Interrupt("validation", 0, KeyboardInterrupt)]).validate(SmallModule(), datamodule=SmallData(1))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_stopped_within_a_step_saves_nothing(tmp_path: Path):
    with pytest.raises(SystemExit):
        fit([RecoveryCheckpoint(tmp_path)], SmallModule(fail_at=2, error="KeyboardInterrupt"), n_steps=3)
    assert newest_checkpoint(tmp_path) is None


class Signalled(SmallModule):
    """Gets the signals in its third step."""

    def __init__(self, *signals: int) -> None:
        super().__init__()
        self.signals = signals

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for signum in self.signals if self.global_step == 2 else ():
            os.kill(os.getpid(), signum)
        super().training_step(batch, batch_idx)


@pytest.fixture
def exits_at_once() -> Iterator[Any]:
    """What `ray.init` does: SIGTERM raises SystemExit wherever it comes."""

    def handler(signum: int, frame: Any) -> None:
        sys.exit(signum)

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 1}])
def test_a_step_in_which_a_signal_comes_is_finished_and_saved(
    tmp_path: Path, exits_at_once: Any, options: dict[str, Any], signum: int, status: int
):
    whole = fit([], n_steps=5)
    torch.manual_seed(0)
    module, interrupts = Signalled(signum), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        fit([RecoveryCheckpoint(tmp_path, secs=None, steps=100)], module, n_steps=5, **options)
    assert exit_.value.code == status and module.losses == whole.losses[:3]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (exits_at_once, interrupts)
    resumed = fit([RecoveryCheckpoint(tmp_path)], n_steps=5, ckpt_path="last")
    assert resumed.losses == whole.losses[3:]


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ((signal.SIGTERM, signal.SIGTERM), signal.SIGTERM),
        ((signal.SIGINT, signal.SIGINT), 1),
        ((signal.SIGINT, signal.SIGTERM), signal.SIGTERM),
    ],
)
def test_a_second_signal_does_not_wait(tmp_path: Path, exits_at_once: Any, signals: tuple[int, ...], status: int):
    module = Signalled(*signals)
    with pytest.raises(SystemExit) as exit_:
        fit([RecoveryCheckpoint(tmp_path)], module)
    assert (exit_.value.code, len(module.losses), newest_checkpoint(tmp_path)) == (status, 2, None)


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(fit([RecoveryCheckpoint(tmp_path)], Signalled(signal.SIGINT)).losses) == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_between_steps_does_not_wait(tmp_path: Path, exits_at_once: Any):
    class Waiting(SmallData):
        def before_batch(self, position: int) -> None:
            if position == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("it went on waiting")

    with pytest.raises(SystemExit):
        make_trainer([RecoveryCheckpoint(tmp_path)]).fit(SmallModule(), datamodule=Waiting(3))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_stopped_before_a_fetched_batch_is_trained_on_resumes_exactly(tmp_path: Path):
    whole = fit([], n_steps=3)
    with pytest.raises(SIGTERMException):
        fit([Interrupt("before step", 4, SIGTERMException), RecoveryCheckpoint(tmp_path)], n_steps=3)
    resumed = fit([RecoveryCheckpoint(tmp_path)], n_steps=3, ckpt_path="last")
    assert resumed.losses == whole.losses[4:]


def test_an_epoch_that_was_resumed_ends_like_any_other(tmp_path: Path):
    fit([RecoveryCheckpoint(tmp_path, steps=2)], n_steps=3, max_steps=2)
    fit([RecoveryCheckpoint(tmp_path), Export(tmp_path / "models")], n_steps=3, ckpt_path="last")
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [
        "epoch1epochstep3globalstep3",
        "epoch2epochstep3globalstep6",
    ]


def test_other_failures_save_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError):
        make_trainer([RecoveryCheckpoint(tmp_path)]).fit(SmallModule(), datamodule=Hesitant(3, at=1, error=RuntimeError))
    assert newest_checkpoint(tmp_path) is None


def test_asked_to_stop_saves_at_once(tmp_path: Path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    fit([Stop(), RecoveryCheckpoint(tmp_path)], n_steps=3)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}], ids=["each epoch", "within epochs"])
def test_a_run_that_its_score_ends_can_go_on_from_its_last_step(tmp_path: Path, hook: str, options: dict[str, Any]):
    def stop(trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.global_step >= 2

    early = Callback()
    setattr(early, hook, stop)
    whole = fit([], n_steps=4, **options)
    ended = fit([early, RecoveryCheckpoint(tmp_path)], n_steps=4, **options)
    resumed = fit([RecoveryCheckpoint(tmp_path)], n_steps=4, ckpt_path="last", **options)
    assert len(ended.losses) < len(whole.losses) and ended.losses + resumed.losses == whole.losses


def test_what_is_left_of_a_half_replaced_folder_stays_until_there_is_another(tmp_path: Path):
    part, old = tmp_path / "last.ckpt.part", tmp_path / "last.ckpt.old"
    old.mkdir()
    with pytest.raises(FileNotFoundError):
        _replace(part, tmp_path / "last.ckpt")
    assert newest_checkpoint(tmp_path) == old
    part.mkdir()
    _replace(part, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_run_has_left_half_written_is_removed(tmp_path: Path):
    (tmp_path / "last.ckpt.part").mkdir()
    (tmp_path / "last.ckpt.part" / "__3_0.distcp").write_text("")
    fit([RecoveryCheckpoint(tmp_path, steps=1)], n_steps=2, max_epochs=1)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(("before", "now"), [("folder", "file"), ("file", "folder")])
def test_a_checkpoint_of_another_kind_is_replaced_too(tmp_path: Path, before: str, now: str):
    part, target = tmp_path / "last.ckpt.part", tmp_path / "last.ckpt"
    for kind in (before, now, now):
        part.mkdir() if kind == "folder" else part.write_text("")
        _replace(part, target)
        assert target.is_dir() == (kind == "folder") and not part.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_half_replaced_folder_still_counts(tmp_path: Path):
    (tmp_path / "last.ckpt.part").mkdir()
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "last.ckpt.old").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt.old"
    (tmp_path / "last.ckpt").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"
