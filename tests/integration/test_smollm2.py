"""SmolLM2 out of its package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_lightning.models.smollm2 import write_smollm2


@pytest.mark.slow
def test_smollm2_is_a_real_language_model(tmp_path: Path) -> None:
    folder = write_smollm2(tmp_path / "smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.rms_norm_eps == 1e-5
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    with pytest.raises(ValueError, match="not empty"):
        write_smollm2(folder)
