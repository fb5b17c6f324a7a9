"""The tiny model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_lightning.models.tiny import CHARACTERS, write_tiny_model


def test_a_tiny_model_is_a_function_of_its_seed(tmp_path: Path) -> None:
    folders = [write_tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, same, other = (AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_each_character_is_one_token_and_comes_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(tmp_path / "m"))
    ids = tokenizer(CHARACTERS)["input_ids"]
    assert ids == list(range(3, 3 + len(CHARACTERS)))
    assert tokenizer.decode(ids) == CHARACTERS
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("sizes", [{"hidden": 30}, {"kv_heads": 3}, {"characters": "aa"}])
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="multiple of|twice"):
        write_tiny_model(tmp_path / "m", **sizes)  # type: ignore[arg-type]
