"""Inputs of the simulation: a model on its GPUs, and a training run. Nothing here is fitted to what the simulation shows."""

from __future__ import annotations

import bisect
import random
from dataclasses import asdict, dataclass
from typing import Any

H100_FLOPS = 989e12
H100_BYTES_PER_S = 3.35e12


@dataclass(frozen=True)
class Hardware:
    """Seconds that one GPU needs, for a dense model in bfloat16.

    Attributes:
        step_s: (running answers, seconds of one decode step) with short contexts, ascending; in between it is linear.
        max_running: answers that one engine decodes at a time; the others wait in its queue.
        kv_bytes: of one token in the key-value cache, read again at every decode step.
        bytes_per_s: memory bandwidth.
        parameters: that compute: embeddings are looked up, the head counts.
        attention_width, layers: heads x head size, and how many times; for the part of the work that grows with the context.
        flops: peak of the GPU.
        train_mfu: share of it that training reaches, recomputation not counted as work.
        forward_mfu: share that a forward pass reaches, in the trainer and in the engine.
        sync_s: generation stopped for one weight update, without the contexts that are computed again afterwards.
    """

    step_s: tuple[tuple[int, float], ...] = ((1, 1 / 388), (32, 32 / 7826), (256, 256 / 23035))
    max_running: int = 256
    kv_bytes: int = 2 * 28 * 2 * 128 * 2
    bytes_per_s: float = H100_BYTES_PER_S
    parameters: float = 1.54e9
    attention_width: int = 12 * 128
    layers: int = 28
    flops: float = H100_FLOPS
    train_mfu: float = 0.367
    forward_mfu: float = 0.453
    sync_s: float = 0.066

    def decode_s(self, running: int) -> float:
        """Seconds of one decode step of `running` answers, without the reading of their contexts."""
        place = min(max(1, bisect.bisect_left(self.step_s, (running,))), len(self.step_s) - 1)
        (n0, s0), (n1, s1) = self.step_s[place - 1], self.step_s[place]
        return s0 + (s1 - s0) * (running - n0) / (n1 - n0)

    @property
    def read_s(self) -> float:
        """Seconds that one token of context adds to a decode step."""
        return self.kv_bytes / self.bytes_per_s

    def forward_s(self, tokens: float, squares: float) -> float:
        """Seconds of a forward pass over sequences of `tokens` in all, whose squared lengths sum to `squares`."""
        return self._forward_flops(tokens, squares) / (self.flops * self.forward_mfu)

    def train_s(self, tokens: float, squares: float) -> float:
        """Seconds of forward and backward pass over such sequences."""
        return 3 * self._forward_flops(tokens, squares) / (self.flops * self.train_mfu)

    def _forward_flops(self, tokens: float, squares: float) -> float:
        # A token attends to half of its sequence on average; scores and weighted values take two operations each.
        return 2 * self.parameters * tokens + 2 * self.layers * self.attention_width * squares


@dataclass(frozen=True)
class Workload:
    """A training run.

    Attributes:
        prompts: B, of one training step.
        answers: to each prompt.
        prompt_len: tokens of a prompt.
        median_len, spread: answer lengths are log-normal, with this standard deviation of their logarithm.
        between_prompts: share of its variance that all answers to a prompt have in common.
        max_new_tokens: where answers are cut.
        minibatches: optimiser updates of a step; pi_prox of the first needs no forward pass of its own.
        seed: of the lengths.
    """

    prompts: int = 512
    answers: int = 16
    prompt_len: int = 150
    median_len: float = 6000.0
    spread: float = 0.9
    between_prompts: float = 0.5
    max_new_tokens: int = 27648
    minibatches: int = 4
    seed: int = 1

    def lengths(self, index: int) -> list[int]:
        """Tokens of each answer to prompt `index`: a pure function of that and the seed."""
        rng = random.Random(f"{self.seed} {index}")
        common, own = self.spread * self.between_prompts**0.5, self.spread * (1 - self.between_prompts) ** 0.5
        median = self.median_len * rng.lognormvariate(0.0, common)
        drawn = (median * rng.lognormvariate(0.0, own) for _ in range(self.answers))
        return [min(self.max_new_tokens, max(1, round(length))) for length in drawn]


SOURCES = {
    "step_s": "SGLang 0.5.17 on one H100, Qwen3-1.7B in bf16 with log-probabilities, prompts of 128 tokens: "
    "388, 7,826 and 23,035 tokens/s at 1, 32 and 256 answers",
    "max_running": "the most that was measured; CUDA graphs end there, and 2M tokens of context fill 57 GB",
    "kv_bytes": "DeepSeek-R1-Distill-Qwen-1.5B: keys and values, 28 layers, 2 heads of 128, bf16",
    "bytes_per_s": "H100 SXM data sheet",
    "parameters": "DeepSeek-R1-Distill-Qwen-1.5B without the embedding table",
    "attention_width": "12 heads of 128",
    "layers": "the model's configuration",
    "flops": "H100 SXM data sheet, dense bf16",
    "train_mfu": "one H100, Qwen3-1.7B, packed 16 x 2,048, layers compiled, with activation checkpointing: 32,900 tokens/s",
    "forward_mfu": "the same without checkpointing, forward and backward: 40,600 tokens/s; taken for prompts in the engine too",
    "sync_s": "two H100, 3.4 GB by NCCL, 256 requests interrupted; taken for any number of GPUs, the slower first one left out",
    "prompts": "AReaL's published setting",
    "answers": "AReaL's published setting",
    "prompt_len": "assumed; next to nothing beside the answers",
    "median_len": "so that a cut at 8,192 leaves 5,600 on average: DeepScaleR reports 5,500 for this model and cut",
    "spread": "assumed; see the table of lengths",
    "between_prompts": "assumed: half of it is the prompt's",
    "max_new_tokens": "AReaL's published setting",
    "minibatches": "this library's default; pi_prox of the first needs no forward pass of its own",
    "seed": "of the lengths",
}


def stated(hardware: Hardware, workload: Workload) -> dict[str, dict[str, Any]]:
    """Every input by name: its value, and where that is from."""
    values = asdict(hardware) | asdict(workload)
    return {name: {"value": values[name], "source": source} for name, source in SOURCES.items()}
