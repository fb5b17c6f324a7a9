"""The learning matrix measures what is missing, once, and says what it found."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import learning_matrix  # noqa: E402

PROGRAM = f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
from echo_task import StepReporter
seed, eta, loss, runs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
open(runs, "a").write(f"{{seed}} {{eta}} {{loss}}\\n")
if (eta, loss, seed) == (4, "plain", 2) and open(runs).read().count("2 4 plain") == 1:
    sys.exit("no memory")
reporter = StepReporter(torch="2.0")
for step in range({learning_matrix.N_VALIDATIONS}):
    right = step / 20 - (0.1 if loss == "plain" and eta else 0.0) + seed / 100
    trained = dict(head_offpolicyness=min(eta, step), actor_clip_ratio=0.1) if step else {{}}
    reporter.step(10, 2 * right - 1, answers=100 * step, right=right, staleness_max=float(eta), skipped=1.0, **trained)
"""


def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(etas=[0, 4], losses=["decoupled", "plain"], seeds=[1, 2], jobs=2, cell_timeout=60.0, work=tmp_path)


def program(tmp_path: Path, seed: int, eta: int, loss: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(seed), str(eta), loss, str(tmp_path / "runs.txt")]


def test_a_finished_cell_is_not_run_again_and_a_failed_one_is(tmp_path: Path) -> None:
    args = arguments(tmp_path)

    def measure() -> list[str]:
        return learning_matrix.run(args, lambda *cell: program(tmp_path, *cell))

    (failure,) = measure()
    assert failure.startswith("eta 4 plain seed 2: ended with code 1") and "no memory" in failure
    assert len(learning_matrix.finished(tmp_path)) == 7
    assert measure() == [] and len(learning_matrix.finished(tmp_path)) == 8
    assert len((tmp_path / "runs.txt").read_text().splitlines()) == 9
    assert_rows(list(learning_matrix.finished(tmp_path).values()))


def assert_rows(cells: list[dict[str, Any]]) -> None:
    rows = [learning_matrix.summarise(group) for group in learning_matrix.grouped(cells)]
    assert [(row["eta"], row["loss"]) for row in rows] == [(0, "decoupled"), (0, "plain"), (4, "decoupled"), (4, "plain")]
    assert rows[2]["each"] == [0.51, 0.52] and rows[3]["right"] == pytest.approx(0.415)
    assert rows[3]["staleness"] == pytest.approx((1 + 2 + 3 + 7 * 4) / 10) and rows[3]["staleness_max"] == 4
    assert "| 4 | plain | 0.41 | 0.41 0.42 | 0.19 | 3.4, 4 | 0.100 | 10 |" in learning_matrix.table(rows)
    assert learning_matrix.verdict(rows).splitlines() == [
        "At eta 0, decoupled ends +0.00 from plain (the seeds overlap), and is +0.00 over the run.",
        "At eta 4, decoupled ends +0.10 from plain (every seed of decoupled is above every seed of plain), "
        "and is +0.10 over the run.",
    ]


def test_cells_under_other_settings_are_measured_again(tmp_path: Path) -> None:
    line = {"eta": 0, "loss": "plain", "seed": 1, "settings": {**learning_matrix.settings(), "lr": 1.0}}
    (tmp_path / "cells.jsonl").write_text(json.dumps(line) + "\n")
    assert learning_matrix.finished(tmp_path) == {}
