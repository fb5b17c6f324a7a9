"""SlotCache: keys and values of running requests, one slot each, and the attention that reads them.

A slot is a row of a rectangular cache `(slots, kv_heads, capacity, head_dim)` per layer.  Running requests fill the first
slots without gaps, so that a decode step attends to a plain slice.  The cache grows with what it holds, up to a limit.

`slot_attention` is registered with transformers under `SLOT_ATTENTION`; any model that uses transformers' attention
interface passes the keyword `step` of its forward through to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOT_ATTENTION = "rl_lightning_slots"

GROWTH = 1.5
"""By which factor the cache grows when it is full, so that copies stay rare."""


@dataclass(slots=True)
class SlotStep:
    """The tokens of one forward pass, end to end, and where they live in the cache.

    Attributes:
        cache: keys and values.
        slots: the slots concerned: a slice in a decode step, else (r,) int64.
        token_slots: (T,) int64 slot of each token.
        positions: (T,) int64 position of each token in its sequence.
        padded: (T,) int64 place of each token in the (r * q_len) grid of queries; None where T = r and q_len = 1.
        q_len: most tokens of one slot.
        kv_len: most positions that a token attends to.
        query_positions: (r, q_len) int64, 0 in unused places.
        n_layers: how many layers took part; counted by `slot_attention`.
    """

    cache: SlotCache
    slots: slice | Tensor
    token_slots: Tensor
    positions: Tensor
    padded: Tensor | None
    q_len: int
    kv_len: int
    query_positions: Tensor
    n_layers: int = 0
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(r, 1, repeats * q_len, kv_len): 0 where a query may look, else -inf. Made once per step."""
        key = (repeats, window)
        if key not in self.masks:
            keys = torch.arange(self.kv_len, device=self.positions.device)
            queries = self.query_positions[:, :, None]
            visible = keys <= queries
            if window is not None:
                visible &= keys > queries - window
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self.masks[key] = mask.repeat(1, repeats, 1)[:, None]
        return self.masks[key]


class SlotCache:
    """Keys and values of all layers.

    Args:
        max_slots: most requests that run at once.
        max_tokens: most places, slots times capacity.
    """

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.n_slots = 0
        self.capacity = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one place takes in all layers together; known after the first forward pass."""
        return sum(t.element_size() * t.shape[1] * t.shape[3] for pair in self._layers.values() for t in pair)

    def fits(self, n_slots: int, length: int) -> bool:
        """Whether `n_slots` sequences of up to `length` tokens may be held."""
        return n_slots <= self.max_slots and n_slots * length <= self.max_tokens

    def reserve(self, n_slots: int, length: int) -> None:
        """Makes room for `n_slots` sequences of up to `length` tokens; what is held stays."""
        assert self.fits(n_slots, length), (n_slots, length, self.max_slots, self.max_tokens)
        if n_slots <= self.n_slots and length <= self.capacity:
            return
        slots, capacity = max(n_slots, self.n_slots), max(length, self.capacity)
        if slots * capacity > self.max_tokens:
            slots, capacity = n_slots, length
        roomy = min(_grown(self.n_slots, slots, 8), self.max_slots), _grown(self.capacity, capacity, 32)
        self.n_slots, self.capacity = roomy if roomy[0] * roomy[1] <= self.max_tokens else (slots, capacity)
        for index, (keys, values) in self._layers.items():
            self._layers[index] = self._resized(keys), self._resized(values)

    def _resized(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.n_slots, old.shape[1], self.capacity, old.shape[3])
        n, length = min(len(old), self.n_slots), min(old.shape[2], self.capacity)
        new[:n, :, :length] = old[:n, :, :length]
        return new

    def copy(self, sources: np.ndarray, targets: np.ndarray, length: int) -> None:
        """Copies the first `length` positions of each slot in `sources` to the one in `targets`."""
        for pair in self._layers.values():
            for cached in pair:
                cached[targets, :, :length] = cached[sources, :, :length]

    def clear(self) -> None:
        """Forgets everything, also values that are not finite."""
        self.n_slots = self.capacity = 0
        self._layers = {index: (k[:0, :, :0].clone(), v[:0, :, :0].clone()) for index, (k, v) in self._layers.items()}

    def write(self, layer: int, step: SlotStep, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (T, kv_heads, dim) keys and values of the step's tokens; returns those of its slots up to `kv_len`."""
        if layer not in self._layers:
            shapes = [(self.n_slots, t.shape[1], self.capacity, t.shape[2]) for t in (key, value)]
            self._layers[layer] = key.new_zeros(shapes[0]), value.new_zeros(shapes[1])
        keys, values = self._layers[layer]
        keys[step.token_slots, :, step.positions] = key
        values[step.token_slots, :, step.positions] = value
        return keys[step.slots, :, : step.kv_len], values[step.slots, :, : step.kv_len]


def _grown(have: int, need: int, least: int) -> int:
    return have if need <= have else max(need, least, int(have * GROWTH))


def decode_step(cache: SlotCache, lengths: np.ndarray, device: torch.device) -> SlotStep:
    """One new token for each of the first n slots, at position `lengths` (n,)."""
    positions = torch.from_numpy(lengths).to(device)
    slots = torch.arange(len(lengths), device=device)
    return SlotStep(
        cache, slice(0, len(lengths)), slots, positions, None, 1, int(lengths.max()) + 1, query_positions=positions[:, None]
    )


def prefill_step(cache: SlotCache, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, device: torch.device) -> SlotStep:
    """Several new tokens for some slots: `counts` (r,) tokens from position `starts` (r,) of each of `slots` (r,)."""
    row = np.repeat(np.arange(len(slots)), counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    q_len = int(counts.max())
    grid = np.zeros((len(slots), q_len), np.int64)
    grid[row, offset] = starts[row] + offset
    arrays = (slots, slots[row], starts[row] + offset, row * q_len + offset, grid)
    slot_ids, token_slots, positions, padded, query_positions = (torch.from_numpy(a).to(device) for a in arrays)
    return SlotStep(
        cache, slot_ids, token_slots, positions, padded, q_len, int((starts + counts).max()), query_positions=query_positions
    )


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: SlotStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention of a step's tokens to their slots, in the signature that transformers calls.

    Query heads that share a key head are laid side by side as further queries of it, so nothing is repeated in memory.

    Args:
        module: the attention layer; its `layer_idx` names the layer in the cache.
        query: (1, heads, T, head_dim).
        key: (1, kv_heads, T, head_dim).
        value: (1, kv_heads, T, value_dim).
        attention_mask: not used; the step says what each token sees.
        step: the tokens' places.
        scaling: factor on the scores.
        sliding_window: a token sees only so many last positions.

    Returns:
        (1, T, heads, value_dim) and None (no attention weights).
    """
    step.n_layers += 1
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    repeats = heads // kv_heads
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = step.cache.write(layer, step, key[0].transpose(0, 1), value[0].transpose(0, 1))
    rows, q_len = len(keys), step.q_len
    queries = query[0].transpose(0, 1)
    if step.padded is not None:
        queries = queries.new_zeros(rows * q_len, heads, dim).index_copy_(0, step.padded, queries)
    grid = queries.reshape(rows, q_len, kv_heads, repeats, dim).permute(0, 2, 3, 1, 4)
    grid = grid.reshape(rows, kv_heads, repeats * q_len, dim)
    mask = step.mask(repeats, sliding_window, query.dtype)
    out = F.scaled_dot_product_attention(grid, keys, values, attn_mask=mask, scale=scaling)
    out = out.view(rows, kv_heads, repeats, q_len, -1).permute(0, 3, 1, 2, 4).reshape(rows * q_len, heads, -1)
    return (out if step.padded is None else out[step.padded])[None], None


def register_slot_attention() -> str:
    """Makes `SLOT_ATTENTION` known to transformers and returns it. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(SLOT_ATTENTION, slot_attention)
    return SLOT_ATTENTION
