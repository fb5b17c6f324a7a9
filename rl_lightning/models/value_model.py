"""ValueModel: a backbone of transformers that gives one number a token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.checkpointing import Checkpointing
from rl_lightning.models.packed_model import hidden_states, load_packed, prepare_training
from rl_lightning.models.sharding import Sharding, run_packed


class ValueModel(nn.Module):
    """A linear value head on the last hidden state, run without padding as the actor is.

    The head comes from the folder if it holds one (a critic, or a reward model whose head is called `score`). A new one is
    zero: it says nothing before it has learnt something.

    Args:
        path: folder or hub name of a language model, a critic or a reward model.
        dtype: of its weights.
        gradient_checkpointing: see `LanguageModule`.
        sharding: how it is cut over ranks; None: all of it is here.

    Raises:
        ValueError: transformers has no token classifier of this kind of model, or it cannot be run packed.
    """

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        *,
        gradient_checkpointing: bool | Checkpointing = False,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__()
        from transformers import AutoModelForTokenClassification

        model, loading = load_packed(path, dtype, AutoModelForTokenClassification, sharding=sharding, num_labels=1)
        if not isinstance(getattr(model, "score", None), nn.Linear):
            raise ValueError(f"{type(model).__name__} in {path} has no linear layer `score`, so it cannot be a critic")
        if "score.weight" in loading["missing_keys"]:
            for parameter in model.score.parameters():
                nn.init.zeros_(parameter)
        self.model: Any = prepare_training(model, gradient_checkpointing=gradient_checkpointing)

    def forward(self, micro: MicroBatch) -> Tensor:
        """(M,) float32 values (float64 for float64 weights) of the states in which the targets of `micro` were chosen."""
        return run_packed(self.model, _values, micro)


def _values(model: Any, micro: MicroBatch) -> Tensor:
    hidden, head = hidden_states(model, micro), model.score
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(dtype)
        values = F.linear(hidden.to(dtype), head.weight.to(dtype), bias)
    return values.squeeze(1)[micro.rows]
