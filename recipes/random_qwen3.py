"""Writes a Qwen3 of a published shape with random weights and one token per character, for runs that measure speed.

python recipes/random_qwen3.py 0.6b models/qwen3-0.6b-random
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rl_lightning.models.tiny import character_tokenizer

SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (256, 4, 4, 2, 512),
    "0.6b": (1024, 28, 16, 8, 3072),
    "1.7b": (2048, 28, 16, 8, 6144),
}
"""Width, layers, heads, key/value heads and width of the MLP: Qwen3's published shapes, and one for a try on a CPU."""

VOCABULARY = 151936
"""Tokens of the published shapes; the characters are the first of them."""


def shape_config(shape: str) -> Any:
    """The configuration, of a vocabulary of characters where the shape is not a published one."""
    from transformers import Qwen3Config

    width, layers, heads, kv_heads, mlp_width = SHAPES[shape]
    return Qwen3Config(
        vocab_size=len(character_tokenizer()) if shape == "tiny" else VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp_width,
        head_dim=64 if shape == "tiny" else 128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["Qwen3ForCausalLM"],
    )


def write_random_qwen3(folder: Path, shape: str, seed: int = 0) -> Path:
    """A Hugging Face folder with bfloat16 weights, which an engine in bfloat16 and a trainer in float32 hold alike."""
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3ForCausalLM(shape_config(shape))
    model.bfloat16().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_random_qwen3(args.folder, args.shape)


if __name__ == "__main__":
    main()
