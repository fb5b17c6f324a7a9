"""Where and when numbers of GPUs were made, from what code."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "recipes")]

from circumstances import circumstances  # noqa: E402

VERSIONS = ("torch", "ray", "transformers", "lightning", "sglang")


def benchmark_parser(doc: str | None, out: str, budget_s: float | None = None) -> ArgumentParser:
    """The command line of a benchmark with the options that they share.

    Args:
        doc: the program's docstring; its first line describes it.
        out: file of docs/benchmarks that the results go to.
        budget_s: seconds after which nothing new is begun; None: the benchmark ends by itself.
    """
    parser = ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="try the program on a machine without GPUs")
    if budget_s is not None:
        parser.add_argument("--budget-s", type=float, default=budget_s, help="nothing new is begun after so many seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / out)
    return parser


def describe_machine(program: str, n_gpus: int) -> dict[str, Any]:
    """Date, commit (from COMMIT where the code is a copy), machine, versions, and the command that was given.

    Args:
        program: file of this folder.
        n_gpus: how many are used; 0 names the CPU.
    """
    import torch

    here = circumstances()
    if n_gpus and torch.cuda.is_available():
        here["machine"] = f"{n_gpus} x {torch.cuda.get_device_name(0)}"
    if "COMMIT" in os.environ:
        here["commit"] = os.environ["COMMIT"]
    given = " ".join(map(without_folder, sys.argv[1:]))
    return {**here, "command": f"python benchmarks/gpu/{program} {given}".strip(), "versions": versions()}


def without_folder(argument: str) -> str:
    """An argument that means the same elsewhere: of an absolute path its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def versions() -> dict[str, str]:
    """Of the packages that matter and are installed."""
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def shown(value: float) -> str:
    """A number in a table: whole from a thousand on, else four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_results(out: Path, document: Mapping[str, Any], title: str, *paragraphs: str) -> None:
    """`out` with everything, and beside it a page of the same name with `paragraphs`, machine, date, commit and command."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    packages = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    made = (
        f"{document['date']}, {document['machine']}, Python {document['python']}, commit {document['commit'][:12]}; {packages}."
    )
    text = "\n\n".join([f"# {title}", *paragraphs, made, f"    {document['command']}"])
    out.with_suffix(".md").write_text(text + "\n")
