"""Fingerprints: a few values that prove which weights an engine holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rl_lightning.weights.transport import Fingerprint

PARAMETERS = 8
"""How many parameters are looked at, spread evenly from the first to the last."""

VALUES = 512
"""How many first values of each."""


def take_fingerprint(weights: Sequence[tuple[str, Tensor]]) -> Fingerprint:
    """The first values of some of the named `weights`, as float32 numbers."""
    chosen = sorted({round(i * (len(weights) - 1) / (PARAMETERS - 1)) for i in range(PARAMETERS)}) if weights else []
    return {name: tuple(tensor.detach().reshape(-1)[:VALUES].float().tolist()) for name, tensor in (weights[i] for i in chosen)}


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
