"""SupervisedJsonl: questions with the answers to imitate, from a JSONL file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rl_lightning.prompts.json_lines import decode_object, read_lines, text_field
from rl_lightning.prompts.tokenizer import encode_texts
from rl_lightning.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class SupervisedJsonl:
    """A JSONL file whose lines hold `prompt` (str, the final text) and `answer` (str, what should follow it).

    An end-of-sequence token is added to answers that do not end in one.

    Args:
        path: the file.
        max_seq_len: most tokens of prompt and answer together; longer examples are dropped, counted and reported.
        allow_bad_lines: drop, count and report bad lines instead of stopping at them.

    Attributes:
        counts: dropped examples by reason.
    """

    def __init__(self, path: str | Path, max_seq_len: int = 4096, allow_bad_lines: bool = False) -> None:
        if max_seq_len < 2:
            raise ValueError(f"max_seq_len={max_seq_len} must hold at least a prompt and an answer token")
        self.path = Path(path).expanduser()
        self.max_seq_len, self.allow_bad_lines = max_seq_len, allow_bad_lines
        self.counts = {"bad_lines": 0, "too_long": 0}
        self._examples: list[tuple[list[int], list[int]]] = []

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> tuple[list[int], list[int]]:
        """Token ids of prompt and of answer, the end-of-sequence token included."""
        return self._examples[i]

    def setup(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads, checks and tokenises the file.

        Raises:
            ValueError: the file is missing or empty, lines are bad, or nothing is left; names file, line and remedy.
        """
        rows, self.counts["bad_lines"] = read_lines(
            self.path, _parse, fields="prompt and answer", allow_bad_lines=self.allow_bad_lines
        )
        prompts = encode_texts(tokenizer, [prompt for prompt, _ in rows])
        answers = tokenizer([answer for _, answer in rows], add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        answers = [answer if answer[-1:] == end else [*answer, *end] for answer in answers]
        pairs = [(list(prompt), list(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        self._examples = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= self.max_seq_len]
        self.counts["too_long"] = len(pairs) - len(self._examples)
        if not self._examples:
            raise ValueError(f"all {len(pairs)} examples of {self.path} are longer than max_seq_len={self.max_seq_len}; raise it")
        logger.info("%s: %d examples, %s", self.path, len(self), ", ".join(f"{n} {what}" for what, n in self.counts.items()))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The examples as one flat batch; the loss is on answers and their end only."""
        pairs = [self._examples[i] for i in indices]
        prompt_lens = torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.int32)
        answer_lens = torch.tensor([len(answer) for _, answer in pairs], dtype=torch.int32)
        token_ids = torch.from_numpy(np.fromiter((t for pair in pairs for part in pair for t in part), np.int64))
        starts = torch.zeros(len(pairs) + 1, dtype=torch.int32)
        torch.cumsum(prompt_lens + answer_lens, 0, out=starts[1:])
        is_answer = torch.tensor([False, True]).repeat(len(pairs))
        lengths = torch.stack([prompt_lens, answer_lens], 1).flatten()
        return Batch(
            token_ids=token_ids,
            cu_seqlens=starts,
            prompt_lens=prompt_lens,
            group_ids=torch.tensor(list(indices), dtype=torch.int64),
            loss_mask=torch.repeat_interleave(is_answer, lengths),
            behav_logprobs=torch.zeros(len(token_ids)),
            versions=torch.full((len(token_ids),), -1, dtype=torch.int32),
            rewards=torch.zeros(len(pairs)),
            truncated=torch.zeros(len(pairs), dtype=torch.bool),
        )


def _parse(line: bytes) -> tuple[str, str]:
    """(prompt, answer) of one line."""
    fields = decode_object(line)
    return text_field(fields, "prompt"), text_field(fields, "answer")
