"""What starting up costs, in processes of their own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest


def cpu_seconds(*command: str) -> float:
    """User and system time of a child process: unlike wall time it does not depend on what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr.decode()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_shows_every_part_and_costs_little_more_than_importing_lightning():
    code = """if True:
        import lightning.pytorch.cli, sys, time
        started = time.process_time()
        from rl_lightning.cli import main
        try:
            main(["fit", "--help"])
        except SystemExit:
            print(time.process_time() - started, file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    for option in ("--trainer.max_epochs", "--run.allocation_mode", "--run.ckpt_freq_secs", "AsyncPPOModule", "SFTDataModule"):
        assert option in done.stdout
    assert float(done.stderr.split()[-1]) < 1.0


@pytest.mark.parametrize("module", ["rl_lightning", "rl_lightning.cli"])
def test_imports_stay_light(module: str):
    heavy = [
        "ray",
        "sglang",
        "transformers.modeling_utils",
        "reasoning_gym",
        "math_verify",
        *(["torch", "lightning"] if "." not in module else []),
    ]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_importing_the_package_takes_less_than_a_second():
    assert cpu_seconds("-c", "import rl_lightning") - cpu_seconds("-c", "pass") < 1.0


def test_forwarding_takes_terminals_off_and_leaves_files_and_does_not_load_ray(tmp_path: Path) -> None:
    code = f"""
import logging, sys
import rl_lightning.strategies
assert "ray" not in sys.modules
from rl_lightning.strategies.events import forward_logging
own = logging.getLogger("own")
own.propagate = False
own.addHandler(logging.StreamHandler(sys.stderr))
own.addHandler(logging.FileHandler({str(tmp_path / "log")!r}))
box = type("Box", (list,), {{"put": list.append}})()
forward_logging(box, 0, {{"": logging.WARNING, "own": logging.INFO, "own.debug": logging.DEBUG}})
own.info("kept"); own.debug("no"); logging.getLogger("own.debug").debug("deep"); logging.getLogger("other").info("no")
print([record.getMessage() for record in box])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['kept', 'deep']"
    assert "kept" not in done.stderr
    assert (tmp_path / "log").read_text().split() == ["kept", "deep"]
