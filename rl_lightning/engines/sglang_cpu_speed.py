"""Makes SGLang's CPU path several times faster for small models, through its plugin hooks and PyTorch's own operators.

SGLang's `torch_native` attention walks through a batch sequence by sequence, its sampler draws a random number for every token
of the vocabulary, and PyTorch's default BLAS leaves half of some processors idle.  Here a batch's sequences are attended to
together, one random number is drawn for each, and matrix products go through `models.linear`.  Cases
that this does not cover (encoder-decoder, sliding windows, very uneven lengths) take SGLang's own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ATTENTION = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
LINEAR = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply"
SAMPLE = "sglang.srt.layers.sampler.sampling_from_probs_torch"
LM_HEAD = "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head"

WASTE_LIMIT = 3
"""Padding to the longest sequence may multiply the work by so much."""

SCORES_LIMIT = 1 << 26
"""Most attention scores of one call, in values."""


def register_speed() -> None:
    """Registers the hooks; SGLang applies them when its scheduler starts."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from rl_lightning.models.linear import onednn_pays

    HookRegistry.register(f"{ATTENTION}._run_sdpa_forward_decode", _decode, HookType.AROUND)
    HookRegistry.register(f"{ATTENTION}._run_sdpa_forward_extend", _extend, HookType.AROUND)
    HookRegistry.register(SAMPLE, _sample, HookType.AROUND)
    if onednn_pays():
        HookRegistry.register(LINEAR, _apply_linear, HookType.AROUND)
        HookRegistry.register(LM_HEAD, _apply_lm_head, HookType.AROUND)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """Attention of B padded sequences, grouped queries included.

    Args:
        query: (B, Q, H, D).
        key: (B, L, K, D), H a multiple of K.
        value: (B, L, K, D).
        visible: (B, Q, L) bool.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, Q, H, D).
    """
    n_seqs, n_queries, heads, dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.view(n_seqs, n_queries, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    rows = grouped.reshape(n_seqs, kv_heads, -1, dim) * (dim**-0.5 if scale is None else scale)
    scores = (rows @ key.permute(0, 2, 3, 1)).view(n_seqs, kv_heads, -1, n_queries, key.shape[1])
    scores.masked_fill_(~visible[:, None, None], float("-inf"))
    mixed = scores.softmax(-1).view(n_seqs, kv_heads, -1, key.shape[1]) @ value.transpose(1, 2)
    return mixed.view(n_seqs, kv_heads, -1, n_queries, dim).permute(0, 3, 1, 2, 4).reshape(n_seqs, n_queries, heads, dim)


def _decode(
    original: Any,
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One query of each sequence."""
    longest = int(seq_lens.max())
    uneven = longest * len(seq_lens) > WASTE_LIMIT * int(seq_lens.sum())
    if uneven or encoder_lens is not None or kwargs.get("sliding_window_size") is not None or k_cache.dtype != query.dtype:
        return original(
            backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens, **kwargs
        )
    slots = req_to_token[req_pool_indices, :longest]
    visible = torch.arange(longest) < seq_lens[:, None]
    output.copy_(attend(query[:, None], k_cache[slots], v_cache[slots], visible[:, None], kwargs.get("scaling"))[:, 0])
    return output


def _extend(
    original: Any,
    backend: Any,
    query: Tensor,
    output: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_prefix_lens: Tensor,
    extend_seq_lens: Tensor,
    encoder_lens: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The last `extend_seq_lens` queries of each sequence."""
    longest, most = int(seq_lens.max()), int(extend_seq_lens.max())
    padded = len(seq_lens) * longest * most
    uneven = padded > WASTE_LIMIT * int((seq_lens * seq_lens).sum()) or padded * query.shape[1] > SCORES_LIMIT
    plain = encoder_lens is None and kwargs.get("sliding_window_size") is None and kwargs.get("causal", False)
    if uneven or not plain or k_cache.dtype != query.dtype:
        return original(
            backend, query, output, k_cache, v_cache, req_to_token, req_pool_indices,
            seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens, **kwargs,
        )  # fmt: skip
    lengths = extend_seq_lens.long()
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    column = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
    padded_query = query.new_zeros(len(lengths), most, *query.shape[1:])
    padded_query[row, column] = query
    slots = req_to_token[req_pool_indices, :longest]
    last_visible = extend_prefix_lens[:, None] + torch.arange(most)
    visible = torch.arange(longest) <= last_visible[:, :, None]
    mixed = attend(padded_query, k_cache[slots], v_cache[slots], visible, kwargs.get("scaling"))
    output.copy_(mixed[row, column])
    return output


def _sample(original: Any, probs: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """One index of each row, by inverting the distribution function: one random number a row, not one a token."""
    if sampling_seed is not None:
        return original(probs, sampling_seed, positions)
    below = probs.cumsum(-1)
    total = below[:, -1:]
    point = torch.minimum(torch.rand_like(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(below, point, right=True).view(-1).to(torch.int32)


def _apply_linear(original: Any, method: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    from rl_lightning.models.linear import linear

    if x.dtype != torch.float32 or layer.weight.dtype != torch.float32:
        return original(method, layer, x, bias)
    return linear(x, layer.weight, bias)


def _apply_lm_head(
    original: Any, processor: Any, hidden_states: Tensor, lm_head: Any, embedding_bias: Tensor | None = None
) -> Tensor:
    from rl_lightning.models.linear import linear

    plain = type(lm_head).__name__ in ("ParallelLMHead", "VocabParallelEmbedding") and embedding_bias is None
    if not plain or hidden_states.dtype != torch.float32 or lm_head.weight.dtype != torch.float32:
        return original(processor, hidden_states, lm_head, embedding_bias)
    return linear(hidden_states, lm_head.weight)
