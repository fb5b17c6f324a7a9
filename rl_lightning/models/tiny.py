"""A random Qwen3 of a few hundred thousand parameters with one token per character, for tests and training from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-=*/?!., \n"


def write_tiny_model(
    folder: str | Path,
    *,
    characters: str = CHARACTERS,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate: int | None = None,
    max_positions: int = 1024,
    seed: int = 0,
) -> Path:
    """Writes a Hugging Face folder: float32 weights that are a function of `seed`, config and tokenizer; returns it.

    Args:
        folder: made if needed; files of the same names are replaced.
        characters: the vocabulary, after pad, bos and eos (ids 0, 1, 2).
        hidden: model width, a multiple of `heads`.
        layers: number of decoder layers.
        heads, kv_heads: query heads and key/value heads.
        intermediate: width of the MLP, twice `hidden` by default.
        max_positions: longest sequence in tokens.
        seed: of the weights.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if hidden % heads or heads % kv_heads:
        raise ValueError(f"hidden={hidden} must be a multiple of heads={heads}, and heads of kv_heads={kv_heads}")
    tokenizer = character_tokenizer(characters)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=intermediate or 2 * hidden,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character; unknown characters become the pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(characters)) != len(characters):
        raise ValueError(f"characters={characters!r} names one twice; each is a token of its own")
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left")
