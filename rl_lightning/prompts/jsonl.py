"""JsonlPrompts: questions from a JSONL file, one object a line."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_lightning.prompts.json_lines import BadLine, read_lines
from rl_lightning.prompts.jsonl_line import parse_line
from rl_lightning.prompts.tokenizer import encode_texts, render_messages
from rl_lightning.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZE_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class _Row:
    """One good line: everything of its Prompt but the tokens."""

    query_id: str
    text: str
    task: str
    reference: Mapping[str, Any]


class JsonlPrompts:
    r"""A JSONL file of questions.

    A line holds `query_id` (str); `prompt` (str, the final text) or `messages` (chat, the model's template is applied);
    `task`, one of math (default), code, stem; `solutions` (list of str, LaTeX, the answer in `\boxed{}`) for math and
    stem; `input_output` (JSON string or object: inputs, outputs, fn_name) for code.  Further fields reach the rewards
    in `Prompt.reference`.

    Args:
        path: the file.
        max_prompt_len: most tokens of a prompt; longer ones are dropped, counted and reported.
        allow_bad_lines: drop, count and report bad lines instead of stopping at them.
        extra_tasks: names of tasks of your own, whose lines need no reference answer here.
        template_options: variables for the chat template, such as `enable_thinking`.
    """

    def __init__(
        self,
        path: str | Path,
        max_prompt_len: int = 1024,
        allow_bad_lines: bool = False,
        extra_tasks: Sequence[str] = (),
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if max_prompt_len < 1:
            raise ValueError(f"max_prompt_len={max_prompt_len} must be at least 1 token")
        self.path = Path(path).expanduser()
        self.max_prompt_len = max_prompt_len
        self.allow_bad_lines = allow_bad_lines
        self.extra_tasks = tuple(extra_tasks)
        self.template_options = dict(template_options or {})
        self.counts: dict[str, int] = {"bad_lines": 0, "too_long": 0, "duplicate_query_ids": 0}
        self._rows: list[_Row] = []
        self._tokens = np.zeros(0, np.int32)
        self._starts = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Prompt:
        if not 0 <= i < len(self._rows):
            raise IndexError(f"prompt {i} of {len(self._rows)}")
        row = self._rows[i]
        token_ids = tuple(self._tokens[self._starts[i] : self._starts[i + 1]].tolist())
        return Prompt(row.query_id, row.text, token_ids, row.task, row.reference)

    def setup(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reads, checks and tokenises the file; what it dropped is in `counts` and in the log.

        Raises:
            ValueError: the file is missing or empty, lines are bad, or nothing is left.
        """
        rows, self.counts["bad_lines"] = read_lines(
            self.path,
            lambda line: self._row(line, tokenizer),
            fields="query_id and prompt",
            allow_bad_lines=self.allow_bad_lines,
        )
        self.counts["duplicate_query_ids"] = self._warn_of_duplicates(rows)
        self._keep_short(rows, tokenizer)
        logger.info("%s: %d prompts, %s", self.path, len(self), ", ".join(f"{n} {what}" for what, n in self.counts.items()))

    def _row(self, line: bytes, tokenizer: PreTrainedTokenizerBase) -> _Row:
        fields = parse_line(line, self.extra_tasks)
        text = fields.pop("prompt", None)
        if text is None:
            try:
                text = render_messages(tokenizer, fields.pop("messages"), self.template_options)
            except ValueError as error:
                raise BadLine(str(error)) from error
        return _Row(fields.pop("query_id"), text, fields.pop("task"), fields)

    def _warn_of_duplicates(self, rows: list[_Row]) -> int:
        repeated = [query_id for query_id, n in Counter(row.query_id for row in rows).items() if n > 1]
        if repeated:
            message = "%s: %d query_id(s) occur more than once, first %r; all lines are kept"
            logger.warning(message, self.path, len(repeated), repeated[0])
        return len(repeated)

    def _keep_short(self, rows: list[_Row], tokenizer: PreTrainedTokenizerBase) -> None:
        kept: list[_Row] = []
        tokens: list[np.ndarray] = []
        for first in range(0, len(rows), TOKENIZE_AT_ONCE):
            part = rows[first : first + TOKENIZE_AT_ONCE]
            for row, ids in zip(part, encode_texts(tokenizer, [row.text for row in part]), strict=True):
                if len(ids) <= self.max_prompt_len:
                    kept.append(row)
                    tokens.append(np.array(ids, np.int32))
        self._check_lengths(len(rows), len(kept))
        self._rows = kept
        self._tokens = np.concatenate(tokens)
        self._starts = np.cumsum([0, *(len(ids) for ids in tokens)])

    def _check_lengths(self, n_rows: int, n_kept: int) -> None:
        self.counts["too_long"] = n_dropped = n_rows - n_kept
        if not n_kept:
            raise ValueError(
                f"all {n_rows} prompts of {self.path} are longer than max_prompt_len={self.max_prompt_len} tokens; "
                "raise max_prompt_len"
            )
        if n_dropped:
            message = "%s: dropped %d of %d prompts over max_prompt_len=%d"
            logger.warning(message, self.path, n_dropped, n_rows, self.max_prompt_len)
