"""OwnedFolder: a temporary folder that goes with its owner, or, if that was killed, when the next one is made."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path


class OwnedFolder:
    """Empty at first. A lock on the folder itself tells that its owner lives: the kernel drops it whichever way a process ends.

    Where the file system has no locks, folders of killed owners stay.

    Args:
        prefix: of its name, and of no folder that is not one of these: those of this user without an owner are removed.
        parent: where it is made; None: the temporary directory.

    Attributes:
        path: where it is.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        remove_abandoned(prefix, parent)
        self._lock: int | None = None
        taken = False
        while not taken:  # another process that makes one may find this one without a lock, and remove it
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                self._lock = _lock(self.path)
                taken = self._lock is not None
            except OSError:  # no locks here: nobody can remove it either
                taken = self.path.exists()

    def remove(self) -> None:
        """Removes it with all that is in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned(prefix: str, parent: Path | None = None) -> None:
    """Removes this user's folders called `prefix`... whose owners were killed; `parent` None is the temporary directory."""
    for folder in (parent or Path(tempfile.gettempdir())).glob(f"{prefix}*"):
        _remove_unowned(folder)


def _remove_unowned(folder: Path) -> None:
    """Does nothing if `folder` has an owner who lives, or is another user's."""
    with contextlib.suppress(OSError):  # it is gone, or out of reach
        if folder.lstat().st_uid == os.getuid() and (lock := _lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds `folder` until it is closed; None if another one does, or the folder went in the meantime.

    Raises:
        OSError: it is not a folder, or cannot be locked.
    """
    descriptor, held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW), False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(descriptor), folder.lstat())
    except (BlockingIOError, FileNotFoundError):
        held = False
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else None
