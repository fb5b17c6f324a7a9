"""What the benchmarks of a single SGLang server share: models of real shapes, steady load, circumstances, results."""

from __future__ import annotations

import asyncio
import logging
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_machine import describe_machine, write_results
from random_qwen3 import shape_config

if TYPE_CHECKING:
    import torch

    from rl_lightning.engines.sglang import SGLangEngine

logger = logging.getLogger(__name__)

PROMPT_TOKENS = 128


def write_shape(folder: Path, shape: str) -> Path:
    """A folder with configuration and character tokenizer; a real shape has a real vocabulary's size too. No weights."""
    from rl_lightning.models.tiny import character_tokenizer

    path = folder / shape
    shape_config(shape).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def random_weights(folder: Path, device: str) -> list[tuple[str, torch.Tensor]]:
    """(name, float32 master weight) of a model of that shape, as a trainer holds them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def server_args(cpu: bool, gpu: int, **more: Any) -> dict[str, Any]:
    """Arguments of a server with random weights; the first update brings the trainer's."""
    args = {"load_format": "dummy", "context_length": 4608, "base_gpu_id": gpu}
    if not cpu:
        args |= {"attention_backend": "fa3", "cuda_graph_max_bs": 256, "mm_feature_transport": "cpu"}
        args |= {"cuda_graph_backend_prefill": "disabled"}
    return args | more


class Lengths:
    """Lognormal answer lengths, a function of (seed, request).

    Args:
        median: tokens.
        sigma: of the logarithm.
        longest: tokens.
    """

    def __init__(self, median: int, sigma: float, longest: int) -> None:
        self.median, self.sigma, self.longest = median, sigma, longest

    def __call__(self, seed: int) -> int:
        drawn = self.median * math.exp(self.sigma * np.random.default_rng(seed).standard_normal())
        return max(1, min(self.longest, round(drawn)))


class Load:
    """Keeps `concurrency` requests in flight on an engine, one after another's end, and counts the tokens of finished ones.

    Args:
        engine: started.
        concurrency: requests at a time.
        length: answer's tokens by the request's number.
    """

    def __init__(self, engine: SGLangEngine, concurrency: int, length: Callable[[int], int]) -> None:
        self.engine, self.concurrency, self.length = engine, concurrency, length
        self.tokens = self.answers = 0
        self._next = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._running = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(self.concurrency)]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drain(self) -> None:
        """Starts nothing more and returns when nothing runs."""
        self._open.clear()
        await self._idle.wait()

    def go_on(self) -> None:
        """After `drain`."""
        self._open.set()

    async def _ask_on(self) -> None:
        while True:
            await self._open.wait()
            self._running += 1
            self._idle.clear()
            try:
                answer = await self.engine.generate(request(self._next_number(), self.length, exact=False))
                self.tokens, self.answers = self.tokens + len(answer), self.answers + 1
            finally:
                self._running -= 1
                if not self._running:
                    self._idle.set()

    def _next_number(self) -> int:
        self._next += 1
        return self._next


def request(number: int, length: Callable[[int], int], *, exact: bool = True) -> Any:
    """Request `number`: a random prompt, and an answer of the drawn length, which may end before unless it is `exact`.

    Exactness has its price: engines rule the end out anew for every token.
    """
    from rl_lightning.types import GenerationRequest, SamplingParams

    prompt = tuple(np.random.default_rng((1, number)).integers(3, 48, PROMPT_TOKENS).tolist())
    tokens = length(number)
    params = SamplingParams(max_new_tokens=tokens, min_new_tokens=tokens if exact else 0)
    return GenerationRequest(f"r{number}", prompt, params, seed=number)


def write_rows(
    args: Namespace, script: str, title: str, rows: Sequence[dict[str, Any]], columns: dict[str, str], **more: Any
) -> None:
    """JSON and page at `args.out`, and the table to the log; called after every row, so that a run cut short leaves some."""
    import torch

    where, shown = describe_machine(script, torch.cuda.device_count()), table(rows, columns)
    paragraphs = [shown] if "task" not in more else [more["task"] + ".", shown]
    write_results(args.out, {**where, **more, "rows": list(rows)}, title, *paragraphs)
    logger.info("\n%s\n", shown)


def table(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> str:
    """Markdown, one line for each row; `columns` are titles by key."""
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
