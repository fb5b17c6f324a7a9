"""SlotDecoder: a Hugging Face model over a SlotCache. Token ids and places in, logits out.

It knows nothing of requests, sampling or versions, and is used within `torch.inference_mode()`.  The model runs as
transformers wrote it, on flat tokens without padding; only its attention function is ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rl_lightning.engines.engine import EngineError
from rl_lightning.engines.slot_cache import SlotCache, SlotStep, decode_step, prefill_step, register_slot_attention
from rl_lightning.models.linear import accelerate_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PREFILL_TOKENS = 4096
"""Most tokens of one prefill pass."""

PREFILL_SCORES = 1 << 23
"""Most attention scores per head of one prefill pass; bounds its mask."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence that go into the cache: `tokens` (m,) int64 of `slot`, from position `start`, m >= 1."""

    slot: int
    start: int
    tokens: np.ndarray

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


class SlotDecoder:
    """The model, its weights and its cache.

    Args:
        model_path: Hugging Face folder or name.
        dtype: of weights and cache; `auto` is float32 on CPU and the checkpoint's own elsewhere.
        device: where it runs.
        max_slots: most requests that run at once.
        kv_cache_gib: most memory of the cache.

    Attributes:
        cache: keys and values.
        context_length: most tokens of prompt and answer together.
        last_pass_s: when the model last finished a forward pass (`time.monotonic`).

    Raises:
        ValueError: the model does not use transformers' attention interface, or keeps another state than keys and values.
    """

    def __init__(self, model_path: str, *, dtype: str, device: torch.device, max_slots: int, kv_cache_gib: float) -> None:
        self.device = device
        self.model = _load(model_path, dtype, device)
        self.cache = SlotCache(1, 1)
        tokens = int(kv_cache_gib * 2**30 / self._probe(model_path))
        self.cache = SlotCache(max_slots, tokens)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context_length = min(tokens, positions or tokens)

    @torch.inference_mode()
    def _probe(self, model_path: str) -> int:
        """Bytes per cached token, found by one pass, which also shows that every layer goes through our attention."""
        self.cache.reserve(1, 1)
        step = decode_step(self.cache, np.zeros(1, np.int64), self.device)
        self._forward(np.zeros(1, np.int64), step)
        expected = self.model.config.get_text_config().num_hidden_layers
        if step.n_layers != expected:
            raise ValueError(
                f"{model_path}: {step.n_layers} of {expected} layers use transformers' attention interface, TorchEngine needs "
                "all; use SGLangEngine for this model"
            )
        return self.cache.bytes_per_token

    def _forward(self, tokens: np.ndarray, step: SlotStep, keep: Tensor | int = 0) -> Tensor:
        ids = torch.from_numpy(tokens).to(self.device)
        positions = step.positions[None]
        out = self.model(input_ids=ids[None], position_ids=positions, use_cache=False, logits_to_keep=keep, step=step)
        self.last_pass_s = time.monotonic()
        return out.logits[0]

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Appends one token to each of the first n slots.

        Args:
            tokens: (n,) int64.
            lengths: (n,) int64, tokens that each slot holds already.

        Returns:
            (n, V) logits of the tokens that follow.
        """
        self.cache.reserve(len(tokens), int(lengths.max()) + 1)
        return self._forward(tokens, decode_step(self.cache, lengths, self.device))

    def prefill(self, pieces: list[Piece]) -> dict[int, Tensor]:
        """Puts `pieces`, at most one per slot, into the cache; pieces of like length go through the model together.

        Returns:
            (V,) logits after the last token of each piece, by slot.
        """
        found: dict[int, Tensor] = {}
        for batch in _passes(sorted(pieces, key=lambda p: len(p.tokens))):
            counts = np.array([len(p.tokens) for p in batch], np.int64)
            slots, starts = (np.array([getattr(p, name) for p in batch], np.int64) for name in ("slot", "start"))
            step = prefill_step(self.cache, slots, starts, counts, self.device)
            last = torch.from_numpy(np.cumsum(counts) - 1).to(self.device)
            logits = self._forward(np.concatenate([p.tokens for p in batch]), step, keep=last)
            found.update(zip((p.slot for p in batch), logits, strict=True))
        return found

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies named weights into the model, cast to its dtype.

        Raises:
            EngineError: a name or shape is not the model's, or one of its parameters is missing.
        """
        own: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        own.update(self.model.named_buffers(remove_duplicate=False))
        loaded: set[int] = set()
        for name, tensor in weights:
            target = own.get(name)
            if target is None or target.shape != tensor.shape:
                has = "no such parameter" if target is None else f"shape {tuple(target.shape)}"
                raise EngineError(f"TorchEngine was sent weight {name} of shape {tuple(tensor.shape)}, its model has {has}")
            target.copy_(tensor)
            loaded.add(id(target))
        missing = [name for name, parameter in self.model.named_parameters() if id(parameter) not in loaded]
        if missing:
            raise EngineError(f"TorchEngine was sent no weight for {len(missing)} parameters, the first is {missing[0]}")

    def weight(self, name: str) -> Tensor | None:
        """The parameter called `name`, or None."""
        return dict(self.model.named_parameters(remove_duplicate=False)).get(name)


def _passes(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Cuts pieces into forward passes of bounded size, long ones into parts that follow one another."""
    batch: list[Piece] = []
    for piece in (part for whole in pieces for part in _parts(whole)):
        grown = [*batch, piece]
        q_len, kv_len = max(len(p.tokens) for p in grown), max(p.end for p in grown)
        tokens = sum(len(p.tokens) for p in grown)
        if batch and (batch[-1].slot == piece.slot or tokens > PREFILL_TOKENS or len(grown) * q_len * kv_len > PREFILL_SCORES):
            yield batch
            grown = [piece]
        batch = grown
    if batch:
        yield batch


def _parts(piece: Piece) -> Iterator[Piece]:
    size = max(1, min(PREFILL_TOKENS, PREFILL_SCORES // piece.end))
    for offset in range(0, len(piece.tokens), size):
        yield Piece(piece.slot, piece.start + offset, piece.tokens[offset : offset + size])


def _load(model_path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model_path).get_text_config()
    _check_supported(model_path, config)
    wanted = "float32" if dtype == "auto" and device.type == "cpu" else dtype
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=wanted, attn_implementation=register_slot_attention())
    nn.Module.to(model, device).eval().requires_grad_(False)
    changed = accelerate_linears(model) if device.type == "cpu" else 0
    log.info("TorchEngine holds %s in %s on %s (%d linears through oneDNN)", model_path, model.dtype, device, changed)
    return model


def _check_supported(model_path: str, config: Any) -> None:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if layers:
        raise ValueError(f"{model_path} has layers of type {sorted(layers)}, TorchEngine knows attention only; use SGLangEngine")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(f"{model_path} caps its attention scores, which TorchEngine does not; use SGLangEngine")
