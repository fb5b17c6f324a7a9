"""An engine's server process: it takes its descendants with it, and dies with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from rl_lightning.engines.process import ServerProcess
from rl_lightning.engines.sglang_process import SGLangProcess
from rl_lightning.owned_folder import OwnedFolder

NAP = "import time; print('up', flush=True); time.sleep(60)"


def wait_until_up(log: Path) -> None:
    deadline = time.monotonic() + 30
    while "up" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline, "the child did not come up within 30 s"
        time.sleep(0.01)


def test_a_server_process_takes_its_descendants_with_it(tmp_path: Path) -> None:
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); {NAP}"
    process = ServerProcess([sys.executable, "-c", script], tmp_path / "log")
    wait_until_up(process.log_path)
    assert len(process.survivors()) == 2 and not process.cause_of_death()
    process.stop()
    process.stop()
    assert not process.survivors() and "SIGKILL" in process.cause_of_death() and "up" in process.cause_of_death()


class Stuck(ServerProcess):
    """As one that waits in the kernel, for a GPU's driver for example, and does not die of SIGKILL."""

    def running(self) -> bool:
        super().running()
        return True


def test_a_server_that_outlives_the_kill_is_told(tmp_path: Path) -> None:
    process = Stuck([sys.executable, "-c", NAP], tmp_path / "log")
    with pytest.raises(TimeoutError, match=f"{process.pid}.* outlived SIGKILL"):
        process.stop(gone_within_s=1.0)


def test_what_a_server_prints_is_for_its_user_and_its_key_is_in_no_error(tmp_path: Path) -> None:
    process = SGLangProcess("m", "cpu", "float32", {}, api_key="secret", log_path=str(tmp_path / "log"))
    try:
        assert process.log_path.stat().st_mode & 0o077 == 0
        with process.log_path.open("a") as log:
            log.write("server_args={'api_key': 'secret'}")
        assert "secret" not in process.tail() and "api_key" in process.tail()
    finally:
        process.stop()


def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    child = f"from rl_lightning.engines.process import die_with_parent; die_with_parent(); {NAP}"
    start = f"p = ServerProcess([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}))"
    imports = "import sys, time; from pathlib import Path; from rl_lightning.engines.process import ServerProcess"
    parent = f"{imports}; {start}; print(p.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        wait_until_up(tmp_path / "log")
        os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs([server], timeout=5)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_the_folder_of_a_killed_owner_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    imports = "import time; from rl_lightning.owned_folder import OwnedFolder"
    owner = f"{imports}; folder = OwnedFolder('test-'); print(folder.path, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        (theirs / "server.log").write_text("left behind")
        beside = OwnedFolder("test-")
        assert theirs.parent == tmp_path and theirs.exists()
        os.kill(process.pid, signal.SIGKILL)
    next_one = OwnedFolder("test-")
    assert set(tmp_path.iterdir()) == {beside.path, next_one.path}
