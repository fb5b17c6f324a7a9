"""LoRAConfig: low-rank adapters (arXiv 2106.09685) through peft, trained in place of a model's own weights.

Inside training the weights stay apart; whoever else asks for them gets `merged_weights`, under Hugging Face's names.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters W + alpha / rank * B A. They have no dropout: log-probabilities must be those of the engine, which has none.

    Attributes:
        rank: of B A.
        alpha: its scale, times `rank`.
        target_modules: names of the linear layers that get one (`q_proj`, ...), not the output layer; None for all but that.
    """

    rank: int = 16
    alpha: int = 32
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora.rank={self.rank} and lora.alpha={self.alpha} must be positive")
        if importlib.util.find_spec("peft") is None:
            raise ValueError(
                f"lora.rank={self.rank} needs the package peft: run pip install rl-lightning[lora], or leave lora at null"
            )


def inject_lora(model: Any, config: LoRAConfig, *, seed: int) -> None:
    """Puts adapters that change nothing yet into `model`, and freezes the rest of it.

    Args:
        model: of transformers.
        config: which.
        seed: of the matrices A; B starts at zero.

    Raises:
        ValueError: the model has no layers of the given names, or one of them is its output layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    blocks = model.base_model.named_modules()
    targets = config.target_modules or {name.rpartition(".")[2] for name, m in blocks if isinstance(m, nn.Linear)}
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=sorted(targets)), model)
    head = model.get_output_embeddings()
    for name, layer in _adapted(model).items():
        if layer.weight is head.weight:  # what tokens are scored with, and in an embedding that is tied to it
            raise ValueError(
                f"lora.target_modules names {name}, whose weight is that of the output layer, which cannot have an adapter: "
                f"leave it out"
            )


def has_lora(model: Any) -> bool:
    """Whether `inject_lora` was here."""
    return ADAPTER in getattr(model, "peft_config", {})


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is what it was before `inject_lora`. Not for passes whose gradient is wanted."""
    layers = list(_adapted(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight, shared ones once, adapters added to a copy of what they adapt."""
    adapted = _adapted(model)
    for name, parameter in model.named_parameters():
        layer, is_base, kind = name.partition(".base_layer.")
        if is_base and kind == "weight":
            delta = adapted[layer].get_delta_weight(ADAPTER)
            yield f"{layer}.weight", parameter.detach() + delta.to(parameter.dtype)
        elif is_base:
            yield f"{layer}.{kind}", parameter.detach()
        elif name.partition(".lora_")[0] not in adapted:
            yield name, parameter.detach()


def save_adapter(model: Any, folder: str | Path, *, base: str) -> None:
    """Writes the adapter as peft's `PeftModel.from_pretrained` and inference servers read it.

    Args:
        model: with adapters.
        folder: made if needed.
        base: folder or hub name of the model that it adapts.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    config.save_pretrained(folder)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by name."""
    if not has_lora(model):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
