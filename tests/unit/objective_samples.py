"""Ragged random tokens for tests of the objective, cut at sequence borders, and slow loops over them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """T tokens of S sequences in float64, NaN off the mask: whatever looks there shows."""

    n: Tensor
    o: Tensor
    p: Tensor
    a: Tensor
    m: Tensor
    cu_seqlens: Tensor

    @property
    def n_seqs(self) -> int:
        return len(self.cu_seqlens) - 1

    def loss_tokens(self) -> list[list[int]]:
        """For each sequence the indices of its loss tokens."""
        return [[t for t in range(a, b) if self.m[t]] for a, b in pairwise(self.cu_seqlens.tolist())]

    def part(self, first: int, last: int) -> Tokens:
        """The sequences first .. last - 1."""
        start, end = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        values = {f.name: getattr(self, f.name)[start:end] for f in fields(self) if f.name != "cu_seqlens"}
        return Tokens(**values, cu_seqlens=self.cu_seqlens[first : last + 1] - start)

    def span(self, first: int, last: int) -> slice:
        """Where these sequences stand among all tokens."""
        return slice(int(self.cu_seqlens[first]), int(self.cu_seqlens[last]))


def make_tokens(lengths: list[int], seed: int, spread: float = 0.5) -> Tokens:
    """Random log-probabilities whose ratios are about exp(+-spread), masks with holes, some sequences without a loss token."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal() -> Tensor:
        return torch.randn(total, generator=generator, dtype=torch.float64)

    m = torch.rand(total, generator=generator) < 0.75
    o = normal() - 2
    p = o + spread * normal()
    n = p + spread * normal()
    n, o, p, a = (torch.where(m, x, torch.nan) for x in (n, o, p, normal()))
    return Tokens(n, o, p, a, m, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))


tokens = st.builds(make_tokens, st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 10_000))
"""Strategy: up to 6 sequences of up to 7 tokens, possibly without any."""


def cuts(n_seqs: int, n_parts: int) -> Iterator[tuple[int, int]]:
    """`n_parts` runs of neighbouring sequences, as even as they go."""
    borders = [n_seqs * i // n_parts for i in range(n_parts + 1)]
    return pairwise(borders)


CORRECTIONS: list[tuple[str, dict[str, float]]] = [
    ("decoupled", {}),
    ("decoupled", {"cap": 1.2}),
    ("tis", {"cap": 1.2}),
    ("icepop", {"cap": 1.5, "floor": 0.7}),
    ("sequence-mask", {"cap": 1.2, "floor": 0.9}),
    ("m2po", {"m2_threshold": 0.1}),
]
"""Every correction, with options that act on these random tokens."""


def naive_m2_keep(x: Tokens, threshold: float) -> set[int]:
    """Drops the largest until the mean of the rest is small enough."""
    squares = {t: float(x.o[t] - x.p[t]) ** 2 for chosen in x.loss_tokens() for t in chosen}
    while squares and math.fsum(squares.values()) / len(squares) > threshold:
        squares.pop(max(squares, key=lambda t: squares[t]))
    return set(squares)


def naive_weights(x: Tokens, correction: str, options: dict[str, float]) -> tuple[list[float], list[bool]]:
    """Weights and dropped tokens, one token at a time."""
    cap, floor = options.get("cap", math.inf), options.get("floor", 0.0)
    weights, dropped = [0.0] * len(x.n), [False] * len(x.n)
    kept = naive_m2_keep(x, options["m2_threshold"]) if correction == "m2po" else set()
    for chosen in x.loss_tokens():
        gaps = [float(x.p[t] - x.o[t]) for t in chosen]
        geometric_mean = math.exp(sum(gaps) / max(1, len(gaps)))
        for t, gap in zip(chosen, gaps, strict=True):
            w = math.exp(gap)
            if correction == "tis":
                w = min(w, cap)
            elif correction == "m2po":
                dropped[t] = t not in kept
            else:
                dropped[t] = not floor <= (geometric_mean if correction == "sequence-mask" else w) <= cap
            weights[t] = 0.0 if dropped[t] else w
    return weights, dropped


def naive_aggregate(losses: list[float], sequences: list[list[int]], aggregation: str) -> float:
    """Mean of means, or whatever it is, literally."""
    answers = [[losses[t] for t in sequence] for sequence in sequences if sequence]
    if not answers:
        return 0.0
    if aggregation == "token-mean":
        flat = [x for answer in answers for x in answer]
        return sum(flat) / len(flat)
    if aggregation == "sequence-mean-token-mean":
        return sum(sum(answer) / len(answer) for answer in answers) / len(answers)
    mean_of_sums = sum(map(sum, answers)) / len(answers)
    return mean_of_sums if aggregation == "sequence-mean-token-sum" else mean_of_sums / max(map(len, answers))
