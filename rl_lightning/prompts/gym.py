"""GymPrompts: endless generated tasks from reasoning-gym."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_lightning.prompts.tokenizer import encode_texts, render_messages
from rl_lightning.types import Prompt

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset
    from transformers import PreTrainedTokenizerBase

PROBED = 16
TRIES = 16


class GymPrompts:
    """One reasoning-gym task; item i is a pure function of (seed, i). Score it with `GymReward`.

    Where an item's prompt is over the limit, the same item of another seed takes its place (up to 16 seeds are tried).

    Args:
        task: reasoning-gym's name, such as `chain_sum` or `gsm_symbolic`; statistics show it.
        size: number of prompts of one epoch.
        seed: a validation set takes another seed than the training set, and has other items then.
        options: the task's own settings, such as `min_terms`.
        shots: solved examples before the question, different ones for each item.
        template: text of one question, with `{question}`; the answer follows it.
        chat: put the question into the model's chat template instead (shots become turns).
        system_prompt: first message where `chat` is on; empty for none.
        max_prompt_len: most tokens of a prompt.
        template_options: variables for the chat template, such as `enable_thinking`.
    """

    def __init__(
        self,
        task: str,
        size: int = 10000,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        shots: int = 0,
        template: str = "Question: {question}\nAnswer: ",
        chat: bool = False,
        system_prompt: str = "",
        max_prompt_len: int = 1024,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if size < 1 or shots < 0 or max_prompt_len < 1:
            raise ValueError(f"need size >= 1, shots >= 0, max_prompt_len >= 1, got {size=}, {shots=}, {max_prompt_len=}")
        if "{question}" not in template:
            raise ValueError(f"template={template!r} must contain {{question}}")
        if system_prompt and not chat:
            raise ValueError("system_prompt has an effect with chat=true only; set chat=true, or put the text into template")
        self.task = task
        self.size = size
        self.seed = seed
        self.options = dict(options or {})
        self.shots = shots
        self.template = template
        self.chat = chat
        self.system_prompt = system_prompt
        self.max_prompt_len = max_prompt_len
        self.template_options = dict(template_options or {})
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def setup(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes a few items, so that a wrong task, option or limit shows here.

        Raises:
            ValueError: unknown task, wrong options, or prompts that never fit.
        """
        self._tokenizer = tokenizer
        for i in range(min(PROBED, self.size)):
            self[i]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Prompt:
        if not 0 <= i < self.size:
            raise IndexError(f"prompt {i} of {self.size}")
        for attempt in range(TRIES):
            prompt = self._prompt(i, attempt)
            if len(prompt.token_ids) <= self.max_prompt_len:
                return prompt
        raise ValueError(
            f"{TRIES} prompts of task {self.task} in a row are longer than max_prompt_len={self.max_prompt_len} tokens; "
            "raise max_prompt_len, or choose easier options or fewer shots"
        )

    def _prompt(self, i: int, attempt: int) -> Prompt:
        assert self._tokenizer is not None, "setup() comes first"
        seed = far_seed(self.seed, attempt, 0)
        entry = self._entry(i, seed)
        # Each example has a seed of its own, so that no question is its own example.
        examples = [self._entry(i, far_seed(self.seed, attempt, 1 + shot)) for shot in range(self.shots)]
        text = self._chat_text(entry, examples) if self.chat else self._plain_text(entry, examples)
        return Prompt(
            query_id=f"{self.task}-{seed}-{i}",
            text=text,
            token_ids=tuple(encode_texts(self._tokenizer, [text])[0]),
            task=self.task,
            reference={
                "answer": entry["answer"],
                "gym": {"task": self.task, "seed": seed, "size": self.size, "options": self.options, "item": i},
            },
        )

    def _entry(self, i: int, seed: int) -> dict[str, Any]:
        entry = gym_dataset(self.task, seed, self.size, self.options)[i]
        if self.shots and entry["answer"] is None:
            raise ValueError(f"task {self.task} has no single right answer to show as an example; set shots=0")
        return entry

    def _plain_text(self, entry: dict[str, Any], examples: list[dict[str, Any]]) -> str:
        solved = [self.template.format(question=e["question"]) + f"{e['answer']}\n\n" for e in examples]
        return "".join(solved) + self.template.format(question=entry["question"])

    def _chat_text(self, entry: dict[str, Any], examples: list[dict[str, Any]]) -> str:
        assert self._tokenizer is not None
        messages = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for example in examples:
            messages.append({"role": "user", "content": example["question"]})
            messages.append({"role": "assistant", "content": str(example["answer"])})
        messages.append({"role": "user", "content": entry["question"]})
        return render_messages(self._tokenizer, messages, self.template_options)


def far_seed(seed: int, attempt: int, role: int) -> int:
    """A seed for reasoning-gym, below 2^31, far from those of all other arguments.

    Item i of its seed s is item 0 of its seed s + i: data sets of seeds 0 and 1 hold the same items but one.
    """
    (word,) = np.random.SeedSequence((seed & 0xFFFFFFFF, attempt, role)).generate_state(1, np.uint32)
    return int(word) >> 1


def gym_dataset(task: str, seed: int, size: int, options: Mapping[str, Any]) -> ProceduralDataset:
    """reasoning-gym's dataset of `task`; recently used ones are kept.

    Raises:
        ValueError: reasoning-gym is missing, knows no such task, or refuses the options.
    """
    return _dataset(task, seed, size, _frozen(options))


@lru_cache(maxsize=64)
def _dataset(task: str, seed: int, size: int, frozen_options: str) -> ProceduralDataset:
    gym = import_gym()
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    try:
        return gym.create_dataset(task, seed=seed, size=size, **json.loads(frozen_options))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym refuses the options {frozen_options} (size {size}) of task {task!r}: {error}") from None


def _frozen(options: Mapping[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def import_gym() -> Any:
    """The package reasoning_gym; the first import takes seconds.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError("reasoning-gym is not installed; install it with `pip install reasoning-gym`") from error
    return reasoning_gym
