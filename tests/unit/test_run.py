from __future__ import annotations

from pathlib import Path

import pytest

from rl_lightning.run import RunConfig


def make(tmp_path: Path, **options) -> RunConfig:
    return RunConfig(fileroot=str(tmp_path), experiment="e", **options)


def test_folders(tmp_path: Path):
    run = make(tmp_path, trial="t")
    assert run.logs == tmp_path / "logs/e/t"
    assert run.checkpoints == tmp_path / "checkpoints/e/t"


def test_new_runs_are_numbered_and_never_share_a_folder(tmp_path: Path):
    names = []
    for _ in range(3):
        run = make(tmp_path)
        run.choose_trial(new=True)
        names.append(run.trial)
    assert names == ["trial0", "trial1", "trial2"]


@pytest.mark.parametrize(("name", "following"), [("long", "long1"), ("trial9", "trial10"), ("7", "8")])
def test_a_taken_name_is_counted_up(tmp_path: Path, name: str, following: str):
    for expected in (name, following):
        run = make(tmp_path, trial=name)
        run.choose_trial(new=True)
        assert run.trial == expected


def test_checkpoints_alone_make_a_name_taken(tmp_path: Path):
    (tmp_path / "checkpoints/e/trial0").mkdir(parents=True)
    run = make(tmp_path)
    run.choose_trial(new=True)
    assert run.trial == "trial1"


def test_continuing_takes_the_newest_or_the_named_trial(tmp_path: Path):
    for number in (2, 10, 9):
        (tmp_path / f"logs/e/trial{number}").mkdir(parents=True)
    newest, named, none = make(tmp_path), make(tmp_path, trial="trial2"), make(tmp_path / "elsewhere")
    for run in (newest, named, none):
        run.choose_trial(new=False)
    assert (newest.trial, named.trial, none.trial) == ("trial10", "trial2", "trial0")


def test_continuing_passes_over_trials_without_a_restart_checkpoint(tmp_path: Path):
    for number in (2, 9, 10):
        (tmp_path / f"logs/e/trial{number}").mkdir(parents=True)
    for number, name in ((2, "last.ckpt"), (9, "last.ckpt.old"), (10, "epoch1epochstep4globalstep4")):
        (tmp_path / f"checkpoints/e/trial{number}/{name}").mkdir(parents=True)
    run = make(tmp_path)
    run.choose_trial(new=False)
    assert run.trial == "trial9"


@pytest.mark.parametrize("bad", ["a/b", "", "..", "a b"])
def test_names_are_folder_names(tmp_path: Path, bad: str):
    with pytest.raises(ValueError, match="run.trial=.*folder name"):
        make(tmp_path, trial=bad)


def test_negative_retries_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="recover_retries=-1"):
        make(tmp_path, recover_retries=-1)
