"""What a method that users override gives back, looked at before it is used: a wrong one is told in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def checked_loss(owner: object, given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What `policy_loss` of `owner` returned: a scalar with gradient, and its statistics as tensors.

    Raises:
        ValueError: it is something else; says what is wanted.
    """
    name = f"{type(owner).__name__}.policy_loss"
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor) and isinstance(given[1], Mapping)):
        raise ValueError(
            f"{name} returned {_shown(given)}: return (loss, statistics), a scalar and a dictionary (or {{}}) of (M,) tensors"
        )
    loss, statistics = given
    if loss.numel() != 1:
        raise ValueError(f"{name} returned a loss of shape {tuple(loss.shape)}: return its sum over tokens / tokens.normalizer")
    if not loss.requires_grad:
        raise ValueError(
            f"{name} returned a loss without gradient: compute it from `logprobs`, and not under no_grad or detached"
        )
    try:
        return loss, {key: torch.as_tensor(value) for key, value in statistics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} returned statistics that are no tensors or numbers ({error}): leave those out") from error


def checked_by_token(owner: object, method: str, given: Any, n_tokens: int) -> Tensor:
    """What `method` of `owner` returned: (n_tokens,), a number for each token of the batch, those of prompts included.

    Raises:
        ValueError: it is something else; says what is wanted.
    """
    if not isinstance(given, Tensor) or given.shape != (n_tokens,):
        raise ValueError(
            f"{type(owner).__name__}.{method} returned {_shown(given)}: return a tensor of shape ({n_tokens},), a number for "
            f"each token of the batch; torch.repeat_interleave(x, batch.cu_seqlens.diff().long()) makes it of one for each answer"
        )
    return given


def _shown(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    if isinstance(given, tuple):
        return f"({', '.join(type(part).__name__ for part in given)})"
    return "None" if given is None else f"a {type(given).__name__}"
