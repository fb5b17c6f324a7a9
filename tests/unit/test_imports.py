"""The tree is the architecture: imports follow the data's way, and light modules stay light."""

import ast
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
"""A package imports, at its top level, only from its own layer and those above. `weights.publisher` drives the loop."""


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
