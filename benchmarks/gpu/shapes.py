"""Shapes of models for the GPU benchmarks, and the arithmetic that a training step on them takes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[2] / "recipes")]

from random_qwen3 import SHAPES as PUBLISHED  # noqa: E402

PEAK_FLOPS = 989e12
"""Dense bfloat16 operations per second of an H100 SXM or H200, from their data sheets."""

FORMULA = (
    "model FLOPs = 6 (N_layers T + V D R) + 6 L H d sum(len^2) + a third of that for tokens of a separate pi_prox pass; "
    "N_layers: weights of the decoder's matrices, T: tokens run, V D R: output embedding times scored tokens, "
    "L H d: layers, heads, head dimension, len: of each sequence, causal; recomputed activations are not counted"
)


@dataclass(frozen=True)
class Shape:
    """A Qwen3 with tied embeddings.

    Attributes:
        hidden, layers, heads, kv_heads, intermediate, head_dim, vocabulary: as in its configuration.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 128
    vocabulary: int = 151936

    @property
    def layer_weights(self) -> int:
        """Weights of all decoder layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def flops(self, lengths: Sequence[int], n_scored: int) -> float:
        """Forward and backward pass over sequences of `lengths` tokens run, `n_scored` of which predict a target."""
        matrices = self.layer_weights * sum(lengths) + self.vocabulary * self.hidden * n_scored
        scores = self.layers * self.heads * self.head_dim * sum(n * n for n in lengths)
        return 6.0 * (matrices + scores)

    def write(self, folder: Path) -> str:
        """A model folder of this shape: random bfloat16 weights, no tokenizer."""
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            head_dim=self.head_dim,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen3ForCausalLM(config)
        model.bfloat16().save_pretrained(folder)
        return str(folder)


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, head_dim=16, vocabulary=512),
    "small": Shape(256, 6, 8, 4, 768, head_dim=32, vocabulary=8192),
    **{name: Shape(*PUBLISHED[name]) for name in ("0.6b", "1.7b")},
}
"""Qwen3's published shapes, one for a try on a CPU, and one that a CPU can be measured with."""


def lognormal_lengths(n_tokens: int, *, median: float, sigma: float, longest: int, seed: int) -> list[int]:
    """Lengths from a lognormal distribution, cut at `longest`, that add up to about `n_tokens` and never more."""
    import numpy as np

    rng, lengths = np.random.default_rng(seed), list[int]()
    while True:
        length = max(16, min(longest, round(median * math.exp(sigma * rng.standard_normal()))))
        if sum(lengths) + length > n_tokens:
            return lengths or [min(longest, n_tokens)]
        lengths.append(length)
