"""PromptDataset: a finite, ordered set of questions."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from rl_lightning.types import Prompt


@runtime_checkable
class PromptDataset(Protocol):
    """Where prompts come from, for training and for validation alike.

    An instance is configured in YAML by its class path (its methods need the annotations shown here); `__init__` only
    stores and checks its settings.  `setup` is called once, in the driver and before any engine starts, so that bad data
    is found before a GPU is taken; afterwards the instance must pickle, and be cheap to ask: `__getitem__` is called on
    the controller's event loop.

    A dataset may also have `counts: dict[str, int]` (what was dropped, by reason), which the run then shows.
    """

    def setup(self, tokenizer: Any, /) -> None:
        """Loads and tokenises, with the model's tokenizer from transformers.

        Raises:
            ValueError: one sentence that names the place and the remedy.
        """
        ...

    def __len__(self) -> int:
        """Number of prompts of one epoch, at least 1; fixed after `setup`."""
        ...

    def __getitem__(self, i: int, /) -> Prompt:
        """Prompt `i`, the same one whenever and wherever it is asked for, 0 <= i < len."""
        ...
