"""Activation checkpointing of decoder layers: what is kept for the backward pass, and what is computed again there.

| level | a layer keeps, in numbers a token | it computes again |
|---|---|---|
| `none` | everything that the backward pass reads: 4 D + 3 A + 4 K + 3 I | nothing |
| `light` | its input, what attention gives and the matrix products: 2 D + 2 A + 2 K + 2 I | norms, rotation, activation |
| `selective` | the same without the MLP's products: 2 D + 2 A + 2 K | these and the MLP's wide products |
| `full` | its input: D | everything |

D: hidden size, A: query heads x head size, K: key/value heads x head size, I: width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rl_lightning.models.layers import decoder_layers
from rl_lightning.models.logprobs import CHUNK_LOGITS
from rl_lightning.models.memory import spare_gpu_bytes
from rl_lightning.models.sharding import piece_size
from rl_lightning.models.varlen import ATTENTION_OP

Level = Literal["none", "light", "selective", "full"]
Checkpointing = Literal["none", "light", "selective", "full", "auto"]
"""A level for all layers; `auto`: for each layer the one that memory allows."""

LADDER: tuple[tuple[Level, Level], ...] = (("selective", "full"), ("light", "selective"), ("none", "light"))
"""Each level with the one below it, in the order in which memory pays: most computation saved for a byte first."""

EAGER_FACTOR = 1.5
"""Layers that are not compiled keep about half as much again (Qwen3-1.7B: 113 against 74 KB a token and layer)."""

MATRIX_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def checkpoint_layers(model: nn.Module, levels: Level | Sequence[Level]) -> None:
    """Sets the level of each decoder layer, or one for all. Weights, names and state dict stay as they are."""
    layers = decoder_layers(model)
    chosen = [levels] * len(layers) if isinstance(levels, str) else levels
    for layer, level in zip(layers, chosen, strict=True):
        kind: Any = getattr(type(layer), "plain_kind", type(layer))
        layer.__class__ = kind if level == "none" else _checkpointed(kind, level)


def level_of(option: bool | Checkpointing) -> Checkpointing:
    """The option `gradient_checkpointing`, true and false included.

    Raises:
        ValueError: it is no level.
    """
    if isinstance(option, bool):
        return "full" if option else "none"
    if option not in get_args(Checkpointing):
        raise ValueError(f"gradient_checkpointing={option} must be one of {', '.join(get_args(Checkpointing))}, true or false")
    return option


def plan_levels(model: Any, n_tokens: int, spare_bytes: float, *, element: int = 2, compiled: bool = True) -> list[Level]:
    """For each decoder layer the level that computes least again, so that the activations of one micro-batch fit.

    Args:
        model: of transformers, or a module that holds one.
        n_tokens: of the largest micro-batch.
        spare_bytes: memory for activations; what the weights, gradients and optimiser need is not in it.
        element: bytes of an activation.
        compiled: whether the layers are compiled.
    """
    config = next(module.config for module in model.modules() if hasattr(module, "config"))
    kept, factor = kept_numbers(config), 1.0 if compiled else EAGER_FACTOR
    price = {level: kept[level] * element * n_tokens * (1.0 if level == "full" else factor) for level in kept}
    levels: list[Level] = ["full"] * len(decoder_layers(model))
    spare = spare_bytes - len(levels) * price["full"] - 2 * price["none"]  # the layer at work keeps all of it, and its gradients
    for level, below in LADDER:  # a step up for as many layers as can have it, before any layer gets the next
        extra = price[level] - price[below]
        for i in [i for i, present in enumerate(levels) if present == below][: max(0, int(spare // extra))]:
            levels[i], spare = level, spare - extra
    return levels


def activation_bytes(models: Sequence[nn.Module], device: torch.device) -> float:
    """Memory of the GPU that activations may take: nine tenths of what is free, less what training `models` will allocate.

    Counted are gradients and optimiser states (float32; master copies too where weights are half precision), bfloat16 copies
    of float32 weights under autocast, and a chunk of logits with its share of the output layer's gradient.
    """
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    owed = sum(piece_size(p) * (14 if p.dtype == torch.float32 else 18) for p in trained)
    largest = max((p.numel() for model in models for p in model.parameters()), default=0)
    return 0.9 * spare_gpu_bytes(device) - owed - 4 * largest - 4 * CHUNK_LOGITS["cuda"]


def kept_numbers(config: Any) -> dict[Level, int]:
    """Numbers that a layer keeps for each token, by level: the table of this module."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    return {
        "none": 4 * hidden + 3 * queries + 4 * keys + 3 * config.intermediate_size,
        "light": 2 * hidden + 2 * queries + 2 * keys + 2 * config.intermediate_size,
        "selective": 2 * hidden + 2 * queries + 2 * keys,
        "full": hidden,
    }


@cache
def _checkpointed(kind: Any, level: Level) -> type[nn.Module]:
    """`kind` whose forward pass is checkpointed: one class for all layers, so that they share their compiled code."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if level != "full":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, keeps_wide=level == "light"))

    def forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(kind.forward, self, **kwargs), hidden, *args, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "plain_kind": kind})


def _policy(ctx: Any, op: Any, *args: Any, keeps_wide: bool, **kwargs: Any) -> CheckpointPolicy:
    """Keeps attention and products of about square matrices; the MLP's wide ones too if `keeps_wide`.

    What its narrowing matrix gives is read by no backward pass.
    """
    if op == ATTENTION_OP:
        return CheckpointPolicy.MUST_SAVE
    if op in MATRIX_PRODUCTS:
        n_in, n_out = args[-1].shape
        if n_in <= 2 * n_out and (keeps_wide or n_out <= 2 * n_in):
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
