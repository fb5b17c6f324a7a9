"""Pure functions that draw tokens from logits.

Randomness is a function of (seed, position in the answer), so an answer does not depend on what else is in the batch.
Log-probabilities are those of the temperature-scaled distribution over the whole vocabulary: `top_p`, `top_k` and
`min_new_tokens` change which token is drawn, never the number that is reported for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FIRST_CANDIDATES = 512
"""How many of the likeliest tokens are looked at before the whole vocabulary is sorted for `top_p`."""

BLOCK = 128
"""Tokens whose probabilities are summed together when a cumulative distribution is inverted."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each of n rows of logits is sampled, as arrays.

    Attributes:
        temperature: (n,) float32, above 0; 1 in greedy rows.
        top_p: (n,) float32 in (0, 1].
        top_k: (n,) int64, -1 for all.
        greedy: (n,) bool.
        uniform: (n,) float64 in [0, 1).
        banned: (n, s) int64 token ids that must not be drawn, -1 for none; or None if no row bans any.
    """

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    greedy: np.ndarray
    uniform: np.ndarray
    banned: np.ndarray | None = None


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Independent uniform numbers in [0, 1), one per (seed, position): SplitMix64 (Steele et al., 2014) of both.

    Args:
        seeds: (n,) uint64.
        positions: (n,) integers, the index of the token in its answer.

    Returns:
        (n,) float64 with 52 random bits, so that even the largest times a total stays below the total.
    """
    stream = _mix(seeds + _GOLDEN)
    bits = _mix(stream + _GOLDEN * (positions.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def sample(logits: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting its cumulative distribution.

    Args:
        logits: (n, V), any float dtype.
        rows: how to sample each of the n rows.

    Returns:
        (n,) int64 tokens and (n,) float32 log-probabilities.
    """
    logits = logits.float()
    if (rows.temperature != 1).any():
        logits = logits / _on(rows.temperature, logits)[:, None]
    probs = logits.softmax(-1)
    weights = probs if rows.banned is None else _ban(logits, probs, rows.banned)
    uniform = _on(rows.uniform, logits)
    tokens = weights.argmax(-1) if rows.greedy.all() else _invert(weights, uniform)
    if rows.greedy.any() and not rows.greedy.all():
        tokens = torch.where(_on(rows.greedy, logits), weights.argmax(-1), tokens)
    restricted = ~rows.greedy & ((rows.top_p < 1) | (rows.top_k != -1))
    if restricted.any():
        chosen = _on(np.flatnonzero(restricted), logits)
        top_p, top_k = _on(rows.top_p[restricted], logits), rows.top_k[restricted]
        tokens[chosen] = _sample_restricted(weights[chosen], top_p, top_k, uniform[chosen])
    return tokens, _logprobs(logits, probs, tokens)


def _on(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds `uniform` times the total; never one of weight 0.

    Sums of blocks are accumulated first and then the one block that holds the target, which spares a cumulative sum over
    the whole vocabulary.
    """
    spare = -weights.shape[1] % BLOCK
    blocks = (F.pad(weights, (0, spare)) if spare else weights).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1)
    ends = sums.cumsum(-1, dtype=torch.float64)
    target = uniform[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0]
    rest = target - (ends.gather(1, block) - sums.gather(1, block))
    index = (inside.cumsum(-1, dtype=torch.float64) <= rest).sum(-1, keepdim=True).clamp_(max=BLOCK - 1)
    index = torch.where(inside.gather(1, index) > 0, index, inside.argmax(-1, keepdim=True))
    return (block * BLOCK + index)[:, 0]


def _ban(logits: Tensor, probs: Tensor, banned: np.ndarray) -> Tensor:
    """Probabilities with the banned tokens at 0; renormalised in logits where nothing else had any probability left."""
    row, column = np.nonzero(banned >= 0)
    where = (_on(row, logits), _on(banned[row, column], logits))
    weights = probs.clone()
    weights[where] = 0
    starved = weights.sum(-1) == 0
    if starved.any():
        rest = logits.clone()
        rest[where] = -torch.inf
        weights[starved] = rest[starved].softmax(-1)
    return weights


def _sample_restricted(weights: Tensor, top_p: Tensor, top_k: np.ndarray, uniform: Tensor) -> Tensor:
    """Draws among the `top_k` likeliest tokens and the smallest set of likeliest tokens that holds `top_p` of the mass."""
    vocabulary, total = weights.shape[1], weights.sum(-1)
    limit = _on(np.where(top_k == -1, vocabulary, top_k), weights)
    for width in (min(FIRST_CANDIDATES, vocabulary), vocabulary):
        candidates, ids = weights.topk(width)
        mass = candidates.cumsum(-1, dtype=torch.float64) / total[:, None]
        if bool(((mass[:, -1] >= top_p) | (limit <= width)).all()):
            break
    rank = torch.arange(width, device=weights.device)
    keep = (mass - candidates / total[:, None] < top_p[:, None]) & (rank < limit[:, None])
    keep[:, 0] = True
    return ids.gather(1, _invert(candidates * keep, uniform)[:, None])[:, 0]


def _logprobs(logits: Tensor, probs: Tensor, tokens: Tensor) -> Tensor:
    """log softmax at `tokens`; recomputed from the logits where the probability is too small for float32."""
    chosen = probs.gather(1, tokens[:, None])[:, 0]
    tiny = chosen < 1e-30
    logprobs = chosen.log()
    if tiny.any():
        logprobs[tiny] = logits[tiny].log_softmax(-1).gather(1, tokens[tiny, None])[:, 0]
    return logprobs
