"""InFlight: which weights sampled which tokens of the requests that a server has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np


class InFlight:
    """Requests between being sent and being answered. Belongs to one event loop."""

    def __init__(self) -> None:
        self._spans: dict[str, list[tuple[int, int]]] = {}

    @property
    def rids(self) -> list[str]:
        """Ids of all requests that are not answered yet."""
        return list(self._spans)

    @contextmanager
    def request(self, rid: str, version: int) -> Iterator[list[tuple[int, int]]]:
        """A request is in flight within the block, first under `version`; gives its spans, which `versions_of` reads."""
        self._spans[rid] = spans = [(0, version)]
        try:
            yield spans
        finally:
            del self._spans[rid]

    def change(self, version: int, counts: Mapping[str, int]) -> None:
        """From here on everything is sampled under `version`; `counts` tells how many tokens each request has by now."""
        for rid, spans in self._spans.items():
            spans.append((counts[rid], version))


def versions_of(spans: list[tuple[int, int]], n: int) -> np.ndarray:
    """(n,) int32 version of each token, from [(first token, version), ...]."""
    starts, versions = zip(*spans, strict=True)
    ends = np.minimum([*starts[1:], n], n)
    return np.repeat(np.asarray(versions, np.int32), ends - np.minimum(starts, n))
