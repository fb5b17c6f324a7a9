"""Ragged random tokens for tests of the objective, and how they are cut at sequence borders."""

from __future__ import annotations

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
