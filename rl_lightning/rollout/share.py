"""Share: what a trainer rank gets when it takes, and Waiting: what it gets instead while there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a batch.

    Attributes:
        version: of the weights that the step starts from.
        contents: what the workers put, oldest group first.
        state: for rank 0 of a training step: what `begin` goes on from if the controller dies before the next one.
    """

    version: int
    contents: tuple[Any, ...]
    state: Mapping[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing to take yet: what is missing, in words, and which workers (name, handle) need the current weights."""

    report: str
    unsynced: tuple[tuple[str, Any], ...] = ()
