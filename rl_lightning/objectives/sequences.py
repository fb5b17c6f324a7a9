"""Sequences: sums and means over the loss tokens of each answer."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """T flat tokens as S sequences. Sums run in float64: an answer of 30,000 tokens has a mean good to the last digit.

    Args:
        loss_mask: (T,) bool, the tokens that count.
        cu_seqlens: (S + 1,) int, where each sequence starts.
        needed_by: the option that looks at whole sequences, for the message where `cu_seqlens` is missing.

    Attributes:
        counts: (S,) float64, loss tokens of each sequence.

    Raises:
        ValueError: no `cu_seqlens`, or of another number of tokens.
    """

    def __init__(self, loss_mask: Tensor, cu_seqlens: Tensor | None, *, needed_by: str) -> None:
        if cu_seqlens is None:
            raise ValueError(f"{needed_by} looks at whole sequences: give cu_seqlens, where each of them starts")
        lengths = cu_seqlens.to(device=loss_mask.device, dtype=torch.int64).diff()
        self._loss_mask, self._n_seqs = loss_mask, len(lengths)
        self._of_token = torch.repeat_interleave(lengths)
        n_tokens = len(loss_mask)
        if len(self._of_token) != n_tokens:
            raise ValueError(f"cu_seqlens spans {len(self._of_token)} tokens, but there are {n_tokens}: give those of one batch")
        self.counts = self.sums(torch.ones_like(loss_mask, dtype=torch.float64))

    def sums(self, values: Tensor) -> Tensor:
        """(S,) float64 sums of (T,) values over each sequence's loss tokens."""
        masked = torch.where(self._loss_mask, values.double(), 0.0)
        return masked.new_zeros(self._n_seqs).index_add(0, self._of_token, masked)

    def means(self, values: Tensor) -> Tensor:
        """(T,) in the type of `values`: for each token the mean over its sequence's loss tokens, 0 where there are none."""
        return self.spread(self.sums(values) / self.counts.clamp(min=1)).to(values.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """(T,): for each token its sequence's entry of the (S,) values."""
        return values[self._of_token]
