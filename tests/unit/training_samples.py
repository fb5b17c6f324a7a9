"""Small models, batches and a Trainer for tests of the training core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from rl_lightning.batching.collate import collate
from rl_lightning.modules.async_ppo import AsyncPPOModule
from rl_lightning.types import Batch, Completion, Prompt, Rollout, RolloutGroup

VOCABULARY = 50


def write_model(folder: Path, kind: str = "llama", **options: Any) -> str:
    """A random model with two layers in `folder`; `kind` is llama, qwen2 or qwen3."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "initializer_range": 0.3}
    config = getattr(transformers, f"{name}Config")(**{**shape, "tie_word_embeddings": True, **options})
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


def model_with_eyes(**options: Any) -> Any:
    """A random Gemma 3 whose language model is a part of it, with `options`."""
    import transformers

    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY, "query_pre_attn_scalar": 8, **options}
    eyes = {**shape, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def make_groups(
    seed: int = 0,
    n_groups: int = 3,
    group_size: int = 4,
    prompt_lens: tuple[int, int] = (2, 9),
    answer_lens: tuple[int, int] = (1, 12),
    version: int = 0,
) -> list[RolloutGroup]:
    """Random groups: some tokens not the policy's own, some answers truncated, rewards +-1."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(n_groups):
        prompt = Prompt(f"q{index}", "text", tuple(rng.integers(1, VOCABULARY, rng.integers(*prompt_lens)).tolist()))
        rollouts = []
        for _ in range(group_size):
            n = int(rng.integers(*answer_lens))
            mask = rng.random(n) < 0.9
            mask[-1] = True
            tokens = rng.integers(1, VOCABULARY, n).astype(np.int32)
            logprobs = -4 * rng.random(n).astype(np.float32)
            reason: Any = "length" if rng.random() < 0.3 else "stop"
            completion = Completion(tokens, logprobs, np.full(n, version, np.int32), reason)
            rollouts.append(Rollout(completion, "", float(rng.choice([-1, 1])), {}, mask))
        groups.append(RolloutGroup(index, prompt, tuple(rollouts)))
    return groups


def make_batch(seed: int = 0, version: int = 0, **options: Any) -> Batch:
    """`make_groups`, collated."""
    return collate(make_groups(seed, version=version, **options), version=version)


class Batches:
    """A loader of given batches."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def norm_in_float64(model: torch.nn.Module) -> None:
    """transformers' RMSNorm works in float32, which would hide errors below 1e-7 behind rounding."""
    for layer in model.modules():
        if type(layer).__name__.endswith("RMSNorm"):
            layer.forward = partial(_rms_norm, layer)


def _rms_norm(layer: Any, x: Tensor) -> Tensor:
    return layer.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.variance_epsilon)


class Alone(AsyncPPOModule):
    """AsyncPPOModule without engines to publish to; keeps the gradient of each update; float64 to the last digit."""

    def configure_model(self) -> None:
        super().configure_model()
        if self.dtype_name == "float64":
            norm_in_float64(self.model)

    def configure_callbacks(self) -> list[pl.Callback]:
        return []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        kept = ((name, p.grad) for name, p in self.model.named_parameters())
        self.gradients = {name: grad.detach().clone() for name, grad in kept if grad is not None}


def make_trainer(**options: Any) -> pl.Trainer:
    """A quiet Trainer of one process on the CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options})


def fit(module: pl.LightningModule, batches: Sequence[Batch], **options: Any) -> pl.Trainer:
    """Trains `module` on `batches` once."""
    trainer = make_trainer(**options)
    trainer.fit(module, Batches(batches))
    return trainer


def padded_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(T,) log-probabilities of the batch's tokens by an ordinary padded forward pass, NaN off the loss mask."""
    starts = batch.cu_seqlens.tolist()
    rows = [batch.token_ids[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids, attention_mask=mask).logits / temperature
    logprobs = logits.log_softmax(-1)
    flat = []
    for i, row in enumerate(rows):
        scored = logprobs[i, torch.arange(len(row) - 1), row[1:]]
        flat.append(torch.cat([torch.full((1,), torch.nan, dtype=scored.dtype), scored]))
    return torch.where(batch.loss_mask, torch.cat(flat), torch.nan)
