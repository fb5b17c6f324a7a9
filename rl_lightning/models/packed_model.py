"""load_packed: a model of transformers that runs flat micro-batches instead of padded rows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.attention import register_packed_attention
from rl_lightning.models.checkpointing import Checkpointing, checkpoint_layers, level_of
from rl_lightning.models.linear import accelerate_linears
from rl_lightning.models.logprobs import token_logprobs
from rl_lightning.models.sharded_loading import WeightFiles, empty_model
from rl_lightning.models.sharding import Sharding, run_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

NEW_WEIGHTS = ("score.weight", "score.bias")
"""Of a critic that starts from a language model."""

LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")

LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
"""Layers whose tokens meet in attention only. Others (`conv`, `mamba`, `linear_attention`, ...) would mix packed sequences."""


def load_packed(
    path: str, dtype: torch.dtype, auto_class: Any = None, *, sharding: Sharding | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model in `path` with packed attention and no dropout.

    Args:
        path: folder or hub name.
        dtype: of its weights.
        auto_class: the head, as a class of transformers; a causal language model's by default.
        sharding: how it is cut over ranks; None: all of it is here.
        **options: of its configuration.

    Returns:
        The model, and what `from_pretrained` tells about loading it (`missing_keys`, ...).

    Raises:
        ValueError: its attention or output layer cannot be run packed.
    """
    from transformers import AutoModelForCausalLM

    kind: Any = auto_class or AutoModelForCausalLM
    attention = register_packed_attention()
    loaded = None if sharding is None else _load_pieces(path, dtype, kind, attention, sharding, options)
    if loaded is not None:
        return loaded
    model, loading = kind.from_pretrained(path, dtype=dtype, attn_implementation=attention, output_loading_info=True, **options)
    _prepare(model)
    if sharding is None:
        accelerate_linears(model)
    else:
        sharding.apply(model)
    return model, loading


def _load_pieces(
    path: str, dtype: torch.dtype, kind: Any, attention: str, sharding: Sharding, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """The model read block by block; None where its files do not allow that."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **options)
    model, files = empty_model(kind, config, dtype, attention), WeightFiles(path, dtype, new=NEW_WEIGHTS)
    if not files.cover(model):
        logger.info("%s holds no safetensors under the names of the model: every rank loads all of it first", path)
        return None
    _prepare(model)
    sharding.apply(model, files.fill)
    return model, {"missing_keys": set(files.missing)}


def _prepare(model: Any) -> None:
    check_supported(model)
    turn_off_dropout(model)


def prepare_training(model: PreTrainedModel, *, gradient_checkpointing: bool | Checkpointing) -> PreTrainedModel:
    """The model in training mode, its activations checkpointed; `auto` is decided when training starts and memory is known."""
    level = level_of(gradient_checkpointing)
    if level != "auto":
        checkpoint_layers(model, level)
    return model.train()


def hidden_states(model: Any, micro: MicroBatch) -> Tensor:
    """(R, D) last hidden states of the tokens of `micro` that predict a target."""
    output = model.base_model(
        input_ids=micro.token_ids.unsqueeze(0),
        position_ids=micro.layout.positions.unsqueeze(0),
        layout=micro.layout,
        use_cache=False,
    )
    return output.last_hidden_state.squeeze(0).index_select(0, micro.predictors)


def score_targets(
    model: Any, micro: MicroBatch, *, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(M,) log-probabilities of the targets of `micro`, and the (M,) entropy if wanted; see `token_logprobs`."""
    return run_packed(model, _score_targets, micro, temperature, with_entropy)


def _score_targets(model: Any, micro: MicroBatch, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    one_to_one = not micro.layout.shared and len(micro.predictors) == len(micro.targets)
    return token_logprobs(
        hidden_states(model, micro),
        head.weight,
        micro.targets,
        rows=None if one_to_one else micro.rows,
        bias=head.bias,
        temperature=temperature,
        with_entropy=with_entropy,
    )


def check_supported(model: PreTrainedModel) -> None:
    """Refuses models whose forward pass `score_targets` would not reproduce."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not use transformers' attention interface, so it cannot be trained without padding")
    config = model.config.get_text_config()  # of a model that sees or hears as well, the part that reads and writes
    transforms = [key for key in LOGIT_TRANSFORMS if getattr(config, key, None) not in (None, 1.0)]
    if transforms:
        raise ValueError(f"{name} transforms its logits ({', '.join(transforms)}), which packed scoring does not do")
    if between := _before_output(model):
        raise ValueError(f"{name} has weights before its output layer ({between[0]}, ...), which packed scoring leaves out")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if others:
        raise ValueError(
            f"{name} has layers of {', '.join(others)}, which would mix the tokens of sequences that are packed end to end: "
            f"take a model with full or sliding attention in all layers"
        )


def _before_output(model: Any) -> list[str]:
    """Names of what stands between the last hidden state and the output layer, where there is one."""
    head = model.get_output_embeddings()
    if head is None:
        return []
    known = {id(p) for module in (model.base_model, head) for p in module.parameters()}
    return [name for name, p in model.named_parameters() if id(p) not in known]


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Log-probabilities of the trainer must be those of the engine, which drops nothing and adds no noise.

    Models keep such rates in layers of their own or as plain numbers (`residual_dropout`, `layerdrop`, `jitter_noise`, ...).
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(layer, name, 0.0)
