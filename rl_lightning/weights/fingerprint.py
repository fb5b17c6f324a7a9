"""Fingerprints: a few values that prove which weights an engine holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_lightning.weights.transport import Fingerprint, Sample

if TYPE_CHECKING:
    from rl_lightning.weights.source import WeightSource, WeightSpec

PARAMETERS = 8
"""How many parameters are looked at, spread evenly from the first to the last."""

FIRST, SPREAD = 64, 448
"""How many values of each: the first ones, and others from all over it, so that every shard of it has some."""


class FingerprintTaker:
    """Takes a fingerprint of weights while they pass by.

    Args:
        specs: all the weights that will.
    """

    def __init__(self, specs: Sequence[WeightSpec]) -> None:
        last = len(specs) - 1
        self._chosen = {specs[round(i * last / (PARAMETERS - 1))].name for i in range(PARAMETERS)} if specs else set()
        self._taken: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    def look(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copies what it wants of these; they may change afterwards."""
        for name, tensor in named:
            if name in self._chosen:
                self._taken[name] = tuple(tensor.shape), pick(tensor.detach()).float()

    def fingerprint(self) -> Fingerprint:
        """Of all that it looked at. Waits for the device."""
        return {name: Sample(shape, tuple(values.tolist())) for name, (shape, values) in self._taken.items()}


def take_fingerprint(weights: WeightSource) -> Fingerprint:
    """The sampled values of some of the named `weights`, as float32 numbers."""
    taker = FingerprintTaker(weights.specs())
    taker.look(weights)
    return taker.fingerprint()


def sampled_positions(count: int) -> list[int]:
    """Where a flat tensor of `count` values is looked at."""
    return sorted({*range(min(FIRST, count)), *(i * (count - 1) // (SPREAD - 1) for i in range(SPREAD))}) if count else []


def pick(tensor: Tensor) -> Tensor:
    """The values at `sampled_positions`, on the tensor's device."""
    positions = torch.tensor(sampled_positions(tensor.numel()), dtype=torch.int64, device=tensor.device)
    return tensor.reshape(-1)[positions]


def find_mismatch(expected: Fingerprint, held: Callable[[str], Tensor | None]) -> str | None:
    """What differs between `expected`, cast to the dtype of what is held, and what is held; None if nothing does.

    Args:
        expected: from the trainer.
        held: the engine's values of a sample, in its dtype, NaN where they are missing; None if it has no such parameter.
    """
    for name, sample in expected.items():
        own = held(name)
        if own is None:
            return f"there is no parameter {name}"
        sent = torch.tensor(sample.values, dtype=torch.float32).to(own.dtype)
        if own.shape != sent.shape:
            return f"{name} has another size than {list(sample.shape)}"
        differs = (own.cpu() != sent) & ~(own.cpu().isnan() & sent.isnan())
        if differs.any():
            return f"{name} differs in {int(differs.sum())} of {len(sent)} sampled values"
    return None
