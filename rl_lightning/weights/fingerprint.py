"""Fingerprints: a few values that prove which weights an engine holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_lightning.weights.transport import Fingerprint

if TYPE_CHECKING:
    from rl_lightning.weights.source import WeightSource, WeightSpec

PARAMETERS = 8
"""How many parameters are looked at, spread evenly from the first to the last."""

VALUES = 512
"""How many first values of each."""


class FingerprintTaker:
    """Takes a fingerprint of weights while they pass by.

    Args:
        specs: all the weights that will.
    """

    def __init__(self, specs: Sequence[WeightSpec]) -> None:
        last = len(specs) - 1
        self._chosen = {specs[round(i * last / (PARAMETERS - 1))].name for i in range(PARAMETERS)} if specs else set()
        self._taken: dict[str, Tensor] = {}

    def look(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copies what it wants of these; they may change afterwards."""
        for name, tensor in named:
            if name in self._chosen:
                self._taken[name] = tensor.detach().reshape(-1)[:VALUES].float().clone()

    def fingerprint(self) -> Fingerprint:
        """Of all that it looked at. Waits for the device."""
        return {name: tuple(values.tolist()) for name, values in self._taken.items()}


def take_fingerprint(weights: WeightSource) -> Fingerprint:
    """The first values of some of the named `weights`, as float32 numbers."""
    taker = FingerprintTaker(weights.specs())
    taker.look(weights)
    return taker.fingerprint()


def find_mismatch(expected: Fingerprint, held: Callable[[str], Tensor | None]) -> str | None:
    """What differs between `expected`, cast to the dtype of what is held, and what is held; None if nothing does.

    Args:
        expected: from the trainer.
        held: the engine's parameter of a name, or at least its first values; None if it has none.
    """
    for name, values in expected.items():
        tensor = held(name)
        if tensor is None:
            return f"there is no parameter {name}"
        own = tensor.reshape(-1)[: len(values)].cpu()
        sent = torch.tensor(values, dtype=torch.float32).to(own.dtype)
        if not torch.equal(own, sent):
            place = int((own != sent).nonzero()[0]) if own.shape == sent.shape else len(own)
            return f"{name} differs from value {place} on"
    return None
