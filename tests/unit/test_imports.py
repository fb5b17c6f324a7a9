"""The tree is the architecture: imports follow the data's way, and light modules stay light."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "rl_lightning"
LAYERS = [
    {"types"},
    {"weights", "rewards", "prompts", "engines", "batching", "models", "objectives"},
    {"rollout"},
    {"modules"},
    {"callbacks", "strategies"},
    {"cli"},
]
"""A package imports, at its top level, only from its own layer and those above."""


def package_imports(path):
    """Packages of ours that `path` imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rl_lightning."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/*.py")), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_imports_point_upstream(path):
    order = {name: level for level, names in enumerate(LAYERS) for name in names}
    for package in package_imports(path):
        assert order.get(package, 0) <= order[path.parent.name], f"{path.parent.name} must not import {package}"


def modules_imported(path):
    """Modules of ours that `path` names in an import anywhere in it: at its top, in a function, or for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT.name:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def test_no_two_files_need_each_other():
    files = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    needs = {name: files.keys() & set(modules_imported(path)) for name, path in files.items()}
    try:
        tuple(TopologicalSorter(needs).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other: {' -> '.join(error.args[1])}")
