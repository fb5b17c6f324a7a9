"""A temporary folder stays while its owner lives, and only folders without one are removed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rl_lightning.owned_folder import OwnedFolder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_goes_with_its_owner(folder: Path) -> None:
    owned = OwnedFolder("test-")
    assert list(folder.iterdir()) == [owned.path]
    (owned.path / "log").write_text("x")
    owned.remove()
    owned.remove()
    assert not list(folder.iterdir())


def test_only_folders_without_an_owner_are_removed(folder: Path) -> None:
    for name in ("test-abandoned", "another", "test-linked-to"):
        (folder / name / "inside").mkdir(parents=True)
    (folder / "test-linked-to").rename(folder / "elsewhere")
    (folder / "test-link").symlink_to(folder / "elsewhere")
    (folder / "test-file").write_text("x")
    first, second = OwnedFolder("test-"), OwnedFolder("test-")
    names = {path.name for path in folder.iterdir()}
    assert names == {"another", "elsewhere", "test-link", "test-file", first.path.name, second.path.name}
    assert (folder / "elsewhere" / "inside").exists()


def test_many_at_once_leave_each_other_alone(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        owned = list(pool.map(OwnedFolder, ["test-"] * 200))
    assert sorted(folder.iterdir()) == sorted(each.path for each in owned)
    for each in owned:
        each.remove()


def test_without_locks_nothing_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (folder / "test-abandoned").mkdir()
    owned = OwnedFolder("test-")
    assert {path.name for path in folder.iterdir()} == {"test-abandoned", owned.path.name}
    owned.remove()
    assert not owned.path.exists()
