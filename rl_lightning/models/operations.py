"""Operations: how many floating-point operations a pass over a micro-batch takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.layers import decoder_layers


@dataclass(frozen=True, slots=True)
class Operations:
    """Of a decoder's matrix products and attention scores, two for a multiplication and its addition.

    What is run counts: a shared prompt once, and answers' attention to it. What is computed again for the backward pass, or
    multiplied only to be masked, does not.

    Attributes:
        weights: of the decoder layers' matrices that a token goes through: of a mixture's experts as many as it is sent to.
        trained_weights: those of them that get a gradient.
        head: weights of the output layer, for tokens that predict a target.
        trained_head: those of them that get a gradient.
        pair: for two tokens, one of which sees the other: multiplications of their keys, queries and values in all layers.
    """

    weights: int
    trained_weights: int
    head: int
    trained_head: int
    pair: int

    @classmethod
    def of(cls, module: nn.Module) -> Operations:
        """Those of the model of transformers that `module` is or holds; of the whole of it where it is cut over ranks."""
        model: Any = next(m for m in module.modules() if hasattr(m, "base_model"))
        config, head = model.config.get_text_config(), getattr(model, "score", None) or model.get_output_embeddings()
        matrices = [p for layer in decoder_layers(model.get_decoder()) for p in layer.parameters() if p.dim() > 1]
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            weights=sum(_used(p, config) for p in matrices),
            trained_weights=sum(_used(p, config) for p in matrices if p.requires_grad),
            head=head.weight.numel(),
            trained_head=head.weight.numel() if head.weight.requires_grad else 0,
            pair=2 * config.num_hidden_layers * heads * head_dim,
        )

    def forward(self, micro: MicroBatch) -> float:
        """Of a forward pass."""
        n_tokens, n_predictors = micro.layout.n_tokens, len(micro.predictors)
        return 2.0 * (self.weights * n_tokens + self.head * n_predictors + self.pair * micro.layout.n_pairs)

    def training(self, micro: MicroBatch) -> float:
        """Of a forward and a backward pass: as much again for the gradients of activations, and of weights that are trained."""
        of_weights = self.trained_weights * micro.layout.n_tokens + self.trained_head * len(micro.predictors)
        return 2.0 * self.forward(micro) + 2.0 * (of_weights + self.pair * micro.layout.n_pairs)


def _used(matrix: Tensor, config: Any) -> int:
    """Weights of `matrix` that a token is multiplied with; those of experts are (experts, out, in)."""
    n_experts = len(matrix) if matrix.dim() == 3 else 1
    return matrix.numel() // n_experts * min(n_experts, getattr(config, "num_experts_per_tok", None) or n_experts)
