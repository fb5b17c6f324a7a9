"""Results of `gpu_20_steps.py` from the run's main.log, for a run that was cut off before it could write them itself.

    python benchmarks/gpu/steps_of_log.py MAIN_LOG --beside docs/benchmarks/gpu_20_steps.json --out OUT.json

main.log rounds to four digits. Date, commit, versions and machine are those of the run that `--beside` describes: one of the
same call on the same machine.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from gpu_20_steps import LEGEND, MODES, SCALARS, TITLE, means, table
from gpu_machine import write_results

STEP = re.compile(r"Epoch \d+/\d+ step \d+/\d+ \(global step (\d+)\) finishes")
CELL = re.compile(r"(\S+) (-?[\d.]+(?:e[+-]?\d+)?|nan|inf)(?:\s{2,}|$)")

ABOUT = """`rl-lightning fit --config recipes/async_ppo_0.6b_gpu2.yaml`: a Qwen3-0.6B shape of random weights, `{}`{}.
Read from the run's main.log: the machine's time was over when the run had made its {} steps and was ending its processes."""


def main() -> None:
    """Reads and writes."""
    args = parse()
    steps = read_log(args.log.read_text())
    document = json.loads(args.beside.read_text()) | {"read_from": "main.log", "ended_with": "cut off after its last step"}
    document |= {"machine": re.sub(r"^\d+ x", "1 x", document["machine"]), "mean": means(steps[args.warmup :]), "steps": steps}
    document.pop("seconds_in_all", None)
    document["command"] = "python benchmarks/gpu/gpu_20_steps.py --colocated" + args.options
    about = ABOUT.format(MODES[True], args.note, len(steps))
    rows = table(steps, document["mean"])
    write_results(args.out, document, TITLE.format("one GPU"), about, rows, LEGEND.format(args.warmup + 1))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--beside", type=Path, required=True, help="JSON of another run of the same call")
    parser.add_argument("--warmup", type=int, default=5, help="steps left out of the means")
    parser.add_argument("--note", default="", help="said of the run beside its allocation")
    parser.add_argument("--options", default="", help="what the command had besides --colocated")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def read_log(text: str) -> list[dict[str, float]]:
    """The scalars of every step that main.log tells of."""
    steps: list[dict[str, float]] = []
    for line in text.splitlines():
        if match := STEP.search(line):
            steps.append({"step": float(match[1])})
        elif steps and line.startswith("    "):
            cells = {name: float(value) for name, value in CELL.findall(line.strip())}
            steps[-1] |= {name: value for name, value in cells.items() if name in SCALARS}
    return steps


if __name__ == "__main__":
    main()
