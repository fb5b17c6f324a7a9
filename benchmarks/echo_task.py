"""The task that all systems of `cpu_throughput.py` run: repeat a letter, with a random model of 300,000 parameters.

Imported by programs in different virtual environments, so it needs nothing but the standard library until a model is written.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

PROMPTS, ANSWERS, NEW_TOKENS = 16, 8, 64
"""Of one step: 16 prompts, 8 answers to each, every answer exactly 64 tokens long."""

TOKENS = PROMPTS * ANSWERS * NEW_TOKENS
LEARNING_RATE = 1e-3
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-=*/?!., "


def prompt_texts(steps: int, seed: int = 0) -> list[str]:
    """`abc=` and the like, a different one for every prompt of `steps` steps."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghij", k=3)) + "=" for _ in range(steps * PROMPTS)]


def share_of_first_letter(prompt: str, answer: str) -> float:
    """The reward: how much of the answer is the prompt's first letter."""
    return answer.count(prompt[0]) / max(1, len(answer))


def write_model(folder: Path, seed: int = 0) -> None:
    """A random Qwen2 (2 layers, width 128) with one token per character, as a Hugging Face folder. Needs rl_lightning."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rl_lightning.models.tiny import character_tokenizer

    tokenizer = character_tokenizer(CHARACTERS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class StepReporter:
    """Prints one line of JSON for every training step; `cpu_throughput.py` reads them.

    Attributes:
        steps: how many were reported.
    """

    def __init__(self, **about: object) -> None:
        print(json.dumps({"about": about}), flush=True)
        self.steps = 0
        self._last_s = time.perf_counter()

    def restart(self) -> None:
        """The first step begins now."""
        self._last_s = time.perf_counter()

    def step(self, tokens: int, reward: float, **details: float) -> None:
        """A step has ended: `tokens` generated tokens were trained on, with this mean reward."""
        now = time.perf_counter()
        self.steps += 1
        line = {"step": self.steps, "seconds": now - self._last_s, "tokens": tokens, "reward": reward, **details}
        print(json.dumps(line), flush=True)
        self._last_s = now
