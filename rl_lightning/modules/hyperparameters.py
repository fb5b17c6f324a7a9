"""Hyper-parameters: configurations as plain data in checkpoints, which load without executing code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

Config = TypeVar("Config")


def as_plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with each configuration as a dictionary."""
    return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in options.items()}


def as_config(kind: type[Config], value: Any) -> Config:
    """`value` as a configuration of `kind`, where it comes from a checkpoint as a dictionary."""
    return kind(**value) if isinstance(value, Mapping) else value
