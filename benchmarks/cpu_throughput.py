"""Generated tokens per second and seconds per training step on two CPU cores: rl_lightning beside TRL.

    make benchmark

installs TRL into `.venv-trl` and runs `python benchmarks/cpu_throughput.py --trl-python .venv-trl/bin/python`.

Every system runs the same task (`echo_task.py`): 16 prompts x 8 answers x 64 tokens a step, the same random model, learning
rate and one optimiser update per step.  They take turns (A B C A B C ...), each time in fresh processes; the first steps
of each turn are not measured.  An asynchronous turn ends while its engines still have work, so that the measured steps
have as many tokens to generate as they train on.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from circumstances import circumstances
from echo_task import ANSWERS, NEW_TOKENS, PROMPTS, TOKENS, write_model
from turn import Turn, TurnError, take_turn

logger = logging.getLogger("cpu_throughput")

HERE = Path(__file__).parent
OURS = [sys.executable, str(HERE / "rl_lightning_loop.py")]
SYSTEMS: dict[str, tuple[str, list[str]]] = {
    "trl": ("TRL, synchronous", []),
    "torch-0": ("rl_lightning, TorchEngine, eta 0", [*OURS, "--engine=torch", "--eta=0", "--threads=2"]),
    "torch-2": ("rl_lightning, TorchEngine, eta 2", [*OURS, "--engine=torch", "--eta=2"]),
    "sglang-0": ("rl_lightning, SGLang, eta 0", [*OURS, "--engine=sglang", "--eta=0", "--threads=2"]),
    "sglang-2": ("rl_lightning, SGLang, eta 2", [*OURS, "--engine=sglang", "--eta=2"]),
}
"""Name -> what the table says, and the program that runs it."""

TABLE_HEAD = "| system | generated tokens/s | s/step | CPU s/step | x TRL |\n|---|---|---|---|---|"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trl-python", type=Path, help="of a virtual environment with TRL; without it TRL is left out")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=2, help="turns of each system")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a turn")
    parser.add_argument("--warmup", type=int, default=4, help="steps of a turn before those")
    parser.add_argument("--turn-timeout", type=float, default=300.0, help="seconds")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks" / "cpu_throughput.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    turns, failures = run(args)
    result = {**describe(args), "failures": failures, "systems": {name: summarise(taken) for name, taken in turns.items()}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page(result))
    logger.info("\n%s\n\nin %s", table(result["systems"]), args.out)
    sys.exit(bool(failures))


def run(args: argparse.Namespace) -> tuple[dict[str, list[Turn]], list[str]]:
    """All turns by system, and what went wrong; a system that fails once takes no further turn."""
    commands = {name: SYSTEMS[name][1] for name in args.systems}
    if "trl" in commands and args.trl_python is None:
        logger.warning("without --trl-python TRL is left out")
        del commands["trl"]
    elif "trl" in commands:
        commands["trl"] = [str(args.trl_python), str(HERE / "trl_baseline.py"), "--threads=2"]
    turns: dict[str, list[Turn]] = {name: [] for name in commands}
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="cpu-throughput") as folder:
        write_model(Path(folder))
        work = [f"--model={folder}", f"--steps={args.warmup + args.steps}"]
        for number in range(args.rounds):
            for name in list(commands):
                try:
                    turn = take_turn([*commands[name], *work], args.warmup, args.steps, args.turn_timeout)
                except TurnError as error:
                    logger.warning("%s failed: %s", name, error)
                    failures.append(f"{name}: {error}")
                    del commands[name]
                    continue
                turns[name].append(turn)
                logger.info(
                    "round %d  %-9s %7.0f tokens/s  %.3f s/step  %.2f CPU s/step  (%.0f s in all)",
                    number + 1, name, turn.tokens_per_s, turn.step_s, turn.cpu_s_per_step, turn.wall_s,
                )  # fmt: skip
    return {name: taken for name, taken in turns.items() if taken}, failures


def summarise(turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians over a system's turns, and everything they come from."""
    return {
        "tokens_per_s": round(median(turn.tokens_per_s for turn in turns), 1),
        "step_s": round(median(step["seconds"] for turn in turns for step in turn.steps), 4),
        "cpu_s_per_step": round(median(turn.cpu_s_per_step for turn in turns), 3),
        "about": turns[0].about,
        "turns": [{"tokens_per_s": round(turn.tokens_per_s, 1), "loadavg": turn.loadavg, "steps": turn.steps} for turn in turns],
    }


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Where, when and how the numbers were made."""
    return {
        **circumstances(),
        "command": f"make benchmark ARGS='--rounds {args.rounds} --steps {args.steps} --warmup {args.warmup}'",
        "task": f"{PROMPTS} prompts x {ANSWERS} answers x {NEW_TOKENS} tokens = {TOKENS} generated tokens per step",
    }


def table(systems: dict[str, Any]) -> str:
    """Markdown, one line for each system."""
    base = systems.get("trl", {}).get("tokens_per_s")
    lines = [TABLE_HEAD]
    for name, result in systems.items():
        ratio = f"{result['tokens_per_s'] / base:.2f}" if base else ""
        numbers = f"{result['tokens_per_s']:,.0f} | {result['step_s']:.3f} | {result['cpu_s_per_step']:.2f}"
        lines.append(f"| {SYSTEMS[name][0]} | {numbers} | {ratio} |")
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    """The table with its circumstances."""
    systems = result["systems"]
    theirs = versions(systems[name]["about"] for name in systems if name == "trl")
    ours = versions(systems[name]["about"] for name in systems if name != "trl")
    return f"""# Throughput on a CPU

{result["task"]}; a random Qwen2 of width 128 with 2 layers in float32, one optimiser update per step.

{table(systems)}

Medians over turns that alternate between the systems; CPU seconds are of all processes together.
{result["date"]}, {result["machine"]}, Python {result["python"]}, commit {result["commit"][:12]}.
rl_lightning with {ours}. TRL: {theirs or "left out"}.

    {result["command"]}
"""


def versions(abouts: Iterable[dict[str, Any]]) -> str:
    """The versions that systems reported, each once."""
    return ", ".join({f"{name} {value}": None for about in abouts for name, value in about.items() if isinstance(value, str)})


if __name__ == "__main__":
    main()
