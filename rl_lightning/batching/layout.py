"""PackedLayout: which token of a flat micro-batch sees which.

A micro-batch is one flat run of tokens cut into segments.  A token sees the earlier tokens of its own segment and all
tokens of its segment's parent; a whole sequence is a segment without a parent, and an answer whose prompt is computed
once for its group is a segment whose parent is that prompt.

    segments   [ prompt A ][ answer A1 ][ answer A2 ][ sequence B ]
    parents        -            A            A            -
    positions    0 .. P-1     P ..         P ..         0 ..

Prompts that are shared come first, then the answers to them in the same order, then all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lightning.batching.spans import Spans
from rl_lightning.batching.transfer import to_device

DENSE_TREE_TOKENS = 128
"""A group up to this size is one dense attention problem: few gathers, but answers are multiplied with answers that they do not
see. A larger one is computed answer by answer."""
BLOCK_SCORES = 1 << 22
"""Most attention scores (queries times keys) of one batched block."""


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """A padded batch of independent attention problems.

    Attributes:
        queries: (B, Lq) int64, indices of tokens; rows are padded by repeating their first entry.
        keys: (B, Lk) int64, likewise.
        query_counts: real entries of each row of `queries`.
        key_counts: real entries of each row of `keys`.
        causal: entry i of a row of `queries` sees the entries 0..i of `keys`, so that no mask is needed.
    """

    queries: Tensor
    keys: Tensor
    query_counts: tuple[int, ...]
    key_counts: tuple[int, ...]
    causal: bool


@dataclass(frozen=True, slots=True)
class _Problem:
    """One row of a block: segments whose tokens ask, segments whose tokens answer."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    n_queries: int
    n_keys: int


class PackedLayout:
    """Segments of a flat micro-batch of N tokens and the attention between them.

    Args:
        lengths: tokens of each of K segments, positive.
        parents: for each segment the index of the one that precedes it in its sequences, or its own index for none.
            A parent has no parent itself.
        device: where `positions` and the attention masks live.

    Attributes:
        positions: (N,) int64, place of each token in its sequence.
        spans: of the segments, for attention by one kernel.
        max_seqlen: longest segment.
        shared: whether any segment has a parent.
    """

    def __init__(self, lengths: Sequence[int], parents: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._lengths, self._parents, self.device = list(lengths), list(parents), torch.device(device)
        sizes = torch.tensor(self._lengths)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(sizes, 0, out=starts[1:])
        offsets = torch.tensor([0 if p == k else self._lengths[p] for k, p in enumerate(self._parents)])
        self._starts = starts
        self._segments = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
        self._positions = torch.arange(int(starts[-1])) + torch.repeat_interleave(offsets - starts[:-1], sizes)
        self.positions = to_device(self._positions, self.device)
        self.spans = Spans.of(self._lengths, self._parents, self.device)
        self.max_seqlen = max(self._lengths)
        self.shared = any(p != k for k, p in enumerate(self._parents))
        self._blocks: list[AttentionBlock] | None = None
        self._inverse: Tensor | None = None
        self._biases: dict[tuple[int | None, torch.dtype], list[Tensor | None]] = {}

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return len(self._positions)

    @property
    def n_pairs(self) -> int:
        """How many pairs of tokens there are of which one sees the other, or itself."""
        own = sum(n * (n + 1) // 2 for n in self._lengths)
        return own + sum(self._lengths[k] * self._lengths[p] for k, p in enumerate(self._parents) if p != k)

    @property
    def blocks(self) -> list[AttentionBlock]:
        """The attention of all tokens as few padded batches; every token is a query exactly once."""
        if self._blocks is None:
            self._blocks = [self._block(problems) for problems in _bucket(self._problems())]
        return self._blocks

    @property
    def inverse(self) -> Tensor:
        """(N,) int64: where each token's output lies in the blocks' outputs, flattened and put end to end."""
        if self._inverse is None:
            self._inverse = torch.empty(self.n_tokens, dtype=torch.int64)
            offset = 0
            for block in self.blocks:
                queries = block.queries.cpu()
                width = queries.shape[1]
                for row, count in enumerate(block.query_counts):
                    self._inverse[queries[row, :count]] = torch.arange(count) + offset + row * width
                offset += queries.numel()
            self._inverse = self._inverse.to(self.device)
        return self._inverse

    def biases(self, window: int | None, dtype: torch.dtype) -> list[Tensor | None]:
        """One additive mask (B, 1, Lq, Lk) of `dtype` by block, None where plain causal attention does.

        Args:
            window: a token sees only the last `window` positions, itself among them; None for all.
        """
        key = (window, dtype)
        if key not in self._biases:
            self._biases[key] = [self._bias(block, window, dtype) for block in self.blocks]
        return self._biases[key]

    def _problems(self) -> list[_Problem]:
        children: dict[int, list[int]] = {k: [] for k, p in enumerate(self._parents) if p == k}
        for segment, parent in enumerate(self._parents):
            if parent != segment:
                children[parent].append(segment)
        problems = []
        for root, answers in children.items():
            tree = (root, *answers)
            if sum(self._lengths[s] for s in tree) <= DENSE_TREE_TOKENS:
                problems.append(self._problem(tree, tree))
            else:
                problems.append(self._problem((root,), (root,)))
                problems.extend(self._problem((answer,), (root, answer)) for answer in answers)
        return problems

    def _problem(self, queries: tuple[int, ...], keys: tuple[int, ...]) -> _Problem:
        return _Problem(queries, keys, sum(self._lengths[s] for s in queries), sum(self._lengths[s] for s in keys))

    def _block(self, problems: Sequence[_Problem]) -> AttentionBlock:
        queries = self._rows([p.queries for p in problems], max(p.n_queries for p in problems))
        keys = self._rows([p.keys for p in problems], max(p.n_keys for p in problems))
        causal = all(len(p.queries) == 1 and p.queries == p.keys for p in problems)
        counts = tuple(p.n_queries for p in problems), tuple(p.n_keys for p in problems)
        return AttentionBlock(queries.to(self.device), keys.to(self.device), *counts, causal)

    def _rows(self, rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
        filled = torch.empty(len(rows), width, dtype=torch.int64)
        for out, segments in zip(filled, rows, strict=True):
            tokens = torch.cat([torch.arange(int(self._starts[s]), int(self._starts[s + 1])) for s in segments])
            out[: len(tokens)] = tokens
            out[len(tokens) :] = tokens[0]
        return filled

    def _bias(self, block: AttentionBlock, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if block.causal and (window is None or window >= self.max_seqlen):
            return None
        queries, keys = block.queries.cpu().unsqueeze(2), block.keys.cpu().unsqueeze(1)
        parents = torch.tensor(self._parents)
        own, asked = self._segments[queries], self._segments[keys]
        distance = self._positions[queries] - self._positions[keys]
        seen = ((own == asked) | (parents[own] == asked)) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        seen &= (torch.arange(keys.shape[2]) < torch.tensor(block.key_counts).unsqueeze(1)).unsqueeze(1)
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
        return bias.unsqueeze(1).to(self.device)


def _bucket(problems: list[_Problem]) -> list[list[_Problem]]:
    """Batches problems of similar size: padding stays under half of the work, and one batch under `BLOCK_SCORES`."""
    buckets: list[list[_Problem]] = []
    for problem in sorted(problems, key=lambda p: (p.n_queries, p.n_keys), reverse=True):
        if buckets and _joins(problem, buckets[-1]):
            buckets[-1].append(problem)
        else:
            buckets.append([problem])
    return buckets


def _joins(problem: _Problem, bucket: Sequence[_Problem]) -> bool:
    n_queries, n_keys = bucket[0].n_queries, max(p.n_keys for p in (*bucket, problem))
    area = n_queries * n_keys
    causal = problem.queries == problem.keys and len(problem.keys) == 1
    bucket_causal = bucket[0].queries == bucket[0].keys and len(bucket[0].keys) == 1
    small = 2 * problem.n_queries * problem.n_keys >= area and 2 * bucket[0].n_queries * bucket[0].n_keys >= area
    return causal == bucket_causal and small and (len(bucket) + 1) * area <= BLOCK_SCORES
