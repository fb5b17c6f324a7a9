"""Outbox: a worker's finished groups, for as long as the controller may fetch them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from rl_lightning.types import RolloutGroup


class Outbox:
    """Filled by the worker's event loop, fetched from in any thread."""

    def __init__(self) -> None:
        self._groups: dict[int, RolloutGroup] = {}
        self._keys = itertools.count()

    @contextmanager
    def keep(self, group: RolloutGroup) -> Iterator[int]:
        """Gives the key by which `group` is fetched within the block: as often as the network makes it necessary."""
        self._groups[key := next(self._keys)] = group
        try:
            yield key
        finally:
            del self._groups[key]

    def fetch(self, key: int) -> RolloutGroup:
        """The group; KeyError once nobody waits any more for the controller to have it."""
        return self._groups[key]
