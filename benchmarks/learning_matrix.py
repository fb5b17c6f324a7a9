"""What staleness costs and the decoupled loss gives back, on a task of seconds: eta {0, 4, 16} x {plain, decoupled} x 3 seeds.

    python benchmarks/learning_matrix.py

A random model of 0.1M parameters first learns the form of an answer by imitation (`recipes/tiny_from_scratch*`), and a
quarter of the one-digit sums. Every cell (`learning_cell.py`) then trains that imitator on the same number of answers by
asynchronous PPO, in fresh processes with a deadline, on one thread each for trainer and engine. Nothing holds the engine
back but eta: it answers faster than the trainer trains, so that a batch is as old as eta allows once the first eta steps
are over; the table has what was measured.

A cell that has finished is not run again: its line is in WORK/cells.jsonl. Needs matplotlib (`rl-lightning[benchmarks]`).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from circumstances import circumstances
from learning_cell import INTERVAL, LOSSES, STEPS, settings
from turn import Turn, TurnError, take_turn

logger = logging.getLogger("learning_matrix")

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
IMITATOR = "runs/checkpoints/tiny-sft/trial0/epoch10epochstep32globalstep320"
N_VALIDATIONS = 1 + STEPS // INTERVAL
COLOURS = {"decoupled": "tab:blue", "plain": "tab:orange"}

TABLE_HEAD = """| eta | loss | right at the end | each seed | right over the run | staleness: mean, max | clipped | skipped |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--etas", type=int, nargs="+", default=[0, 4, 16])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--cell-timeout", type=float, default=300.0, help="seconds")
    parser.add_argument("--work", type=Path, default=HERE.parent / "runs" / "learning_matrix", help="imitator and finished cells")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks" / "learning_matrix.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install 'rl-lightning[benchmarks]'")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    failures = run(args, partial(command, prepare(args.work)))
    cells = [cell for cell in finished(args.work).values() if is_wanted(cell, args)]
    if cells:
        write(cells, failures, args.out)
    sys.exit(bool(failures))


def run(args: argparse.Namespace, program: Callable[[int, int, str], Sequence[str]]) -> list[str]:
    """Measures the cells that are missing by their `program`; what went wrong, one sentence each."""
    known = finished(args.work)
    missing = [cell for cell in itertools.product(args.seeds, args.etas, args.losses) if name(*cell) not in known]
    logger.info("%d cells are there, %d to measure, %d at a time", len(known), len(missing), args.jobs)
    lock = threading.Lock()

    def measure(cell: tuple[int, int, str]) -> str | None:
        try:
            turn = take_turn(program(*cell), 0, N_VALIDATIONS, args.cell_timeout)
        except TurnError as error:
            logger.warning("%s failed: %s", name(*cell), error)
            return f"{name(*cell)}: {error}"
        with lock, (args.work / "cells.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record(turn, *cell)) + "\n")
        logger.info("%s: %.2f right, %.0f s", name(*cell), turn.steps[-1]["right"], turn.wall_s)
        return None

    with ThreadPoolExecutor(args.jobs) as pool:
        return [failure for failure in pool.map(measure, missing) if failure is not None]


def prepare(work: Path) -> Path:
    """Folder of the imitator, which is made on the first call; takes a minute on one core."""
    work.mkdir(parents=True, exist_ok=True)
    model = work / IMITATOR
    if not model.exists():
        logger.info("making the imitator")
        for program in (
            [str(RECIPES / "tiny_from_scratch.py")],
            ["-m", "rl_lightning", "fit", f"--config={RECIPES / 'tiny_from_scratch_sft.yaml'}"],
        ):
            subprocess.run([sys.executable, *program], cwd=work, check=True, capture_output=True, timeout=600)
    return model


def command(model: Path, seed: int, eta: int, loss: str) -> list[str]:
    """The program of a cell."""
    program = [sys.executable, str(HERE / "learning_cell.py")]
    return [*program, f"--model={model}", f"--eta={eta}", f"--loss={loss}", f"--seed={seed}"]


def name(seed: int, eta: int, loss: str) -> str:
    """Of a cell, for people."""
    return f"eta {eta} {loss} seed {seed}"


def record(turn: Turn, seed: int, eta: int, loss: str) -> dict[str, Any]:
    """A finished cell's line."""
    measured = {"about": turn.about, "wall_s": round(turn.wall_s, 1), "loadavg": turn.loadavg, "validations": turn.steps}
    return {"eta": eta, "loss": loss, "seed": seed, "settings": settings(), **measured}


def finished(work: Path) -> dict[str, dict[str, Any]]:
    """The cells in `work` that were measured under the present settings, by name."""
    path = work / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cells = [cell for cell in map(json.loads, lines) if cell["settings"] == settings()]
    return {name(cell["seed"], cell["eta"], cell["loss"]): cell for cell in cells}


def is_wanted(cell: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether the cell belongs to the matrix that was asked for."""
    return cell["eta"] in args.etas and cell["loss"] in args.losses and cell["seed"] in args.seeds


def write(cells: Sequence[dict[str, Any]], failures: Sequence[str], out: Path) -> None:
    """The numbers, the page and the plot, side by side."""
    rows = [summarise(group) for group in grouped(cells)]
    result = {**circumstances(), "command": "python benchmarks/learning_matrix.py", "versions": cells[0]["about"]}
    result |= {"settings": settings(), "failures": list(failures), "rows": rows, "cells": list(cells)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(result))
    plot(cells, out.with_suffix(".png"))
    logger.info("\n%s\n\n%s\n\nin %s", table(rows), verdict(rows), out)


def grouped(cells: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The seeds of each (eta, loss) together, in the order of the table."""
    order = sorted(cells, key=lambda cell: (cell["eta"], cell["loss"], cell["seed"]))
    return [list(group) for _, group in itertools.groupby(order, key=lambda cell: (cell["eta"], cell["loss"]))]


def summarise(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row: means over the seeds, and each seed's share of right answers at the end."""
    trained = [validation for cell in seeds for validation in cell["validations"][1:]]
    ends = [cell["validations"][-1]["right"] for cell in seeds]
    return {
        "eta": seeds[0]["eta"],
        "loss": seeds[0]["loss"],
        "answers": int(seeds[0]["validations"][-1]["answers"]),
        "right": round(fmean(ends), 4),
        "each": [round(right, 4) for right in ends],
        "right_over_run": round(fmean(validation["right"] for validation in trained), 4),
        "staleness": round(fmean(validation["head_offpolicyness"] for validation in trained), 2),
        "staleness_max": int(max(validation["staleness_max"] for validation in trained)),
        "clipped": round(fmean(validation["actor_clip_ratio"] for validation in trained), 4),
        "skipped": round(sum(validation["skipped"] for validation in trained) / len(seeds), 1),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line for each eta and loss."""
    lines = [TABLE_HEAD]
    for row in rows:
        each = " ".join(f"{right:.2f}" for right in row["each"])
        right = f"{row['right']:.2f} | {each} | {row['right_over_run']:.2f}"
        staleness = f"{row['staleness']:.1f}, {row['staleness_max']}"
        lines.append(f"| {row['eta']} | {row['loss']} | {right} | {staleness} | {row['clipped']:.3f} | {row['skipped']:g} |")
    return "\n".join(lines)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """For every eta with both losses, what decoupling changed, and whether the seeds agree."""
    sentences = []
    for eta in sorted({row["eta"] for row in rows}):
        by_loss = {row["loss"]: row for row in rows if row["eta"] == eta}
        if by_loss.keys() != set(LOSSES):
            continue
        decoupled, plain = by_loss["decoupled"], by_loss["plain"]
        seeds = "the seeds overlap"
        if min(decoupled["each"]) > max(plain["each"]):
            seeds = "every seed of decoupled is above every seed of plain"
        elif max(decoupled["each"]) < min(plain["each"]):
            seeds = "every seed of plain is above every seed of decoupled"
        at_end, over_run = (decoupled[measure] - plain[measure] for measure in ("right", "right_over_run"))
        sentences.append(f"At eta {eta}, decoupled ends {at_end:+.2f} from plain ({seeds}), and is {over_run:+.2f} over the run.")
    return "\n".join(sentences)


def page(result: dict[str, Any]) -> str:
    """Table, plot and circumstances."""
    s, rows = result["settings"], result["rows"]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"""# Learning under staleness

Share of one-digit sums that a model of 0.1M parameters answers right when sampled (reward: twice that, less 1), after
asynchronous PPO on {rows[0]["answers"]:,} answers: {s["steps"]} steps of {s["prompts"]} prompts x {s["answers"]} answers and
{s["minibatches"]} updates, learning rate {s["lr"]:g}. All cells start from the same imitator, which answers a quarter right.
Staleness is `head_offpolicyness` of the answers trained on; it rises to eta over the first eta steps.

{table(rows)}

{verdict(rows)}

![share of right answers over answers trained on](learning_matrix.png)

Lines are means over the seeds, shades reach from the worst to the best.
`plain` is `use_decoupled_loss: false` and `recompute_logprob: false`, `decoupled` the default; nothing else differs.
Clipped is the share of tokens where clipping acts; skipped counts updates that `early_stop_imp_ratio` prevented.
{result["date"]}, {result["machine"]}, Python {result["python"]}, commit {result["commit"][:12]}; {versions}.

    {result["command"]}
"""


def plot(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel for each eta, one line for each loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    etas = sorted({cell["eta"] for cell in cells})
    figure, panels = pyplot.subplots(1, len(etas), figsize=(4 * len(etas), 3.2), sharey=True, squeeze=False, layout="constrained")
    for seeds in grouped(cells):
        panel, loss = panels[0][etas.index(seeds[0]["eta"])], seeds[0]["loss"]
        answers = [validation["answers"] for validation in seeds[0]["validations"]]
        right = list(zip(*([validation["right"] for validation in cell["validations"]] for cell in seeds), strict=True))
        panel.plot(answers, [fmean(values) for values in right], label=loss, color=COLOURS[loss])
        panel.fill_between(answers, [min(v) for v in right], [max(v) for v in right], color=COLOURS[loss], alpha=0.15, lw=0)
    for panel, eta in zip(panels[0], etas, strict=True):
        panel.set(title=f"eta {eta}", xlabel="answers trained on", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("share right, sampled")
    panels[0][0].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
