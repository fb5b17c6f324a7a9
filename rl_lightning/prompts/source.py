"""PromptSource: the run's endless stream of prompts, addressed by one integer."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rl_lightning.prompts.dataset import PromptDataset
from rl_lightning.types import Prompt


class PromptSource:
    """Turns stream positions 0, 1, 2, ... into prompts; a prompt is a pure function of (seed, epoch, position).

    The whole state of a reader is therefore the next index and the indices still open, and nothing has to be replayed
    after a restart.

    Args:
        dataset: the prompts, already set up.
        seed: of the order; each epoch has its own.
        shuffle: whether epochs are shuffled. Off, each runs in the dataset's order.

    Raises:
        ValueError: the dataset is empty.
    """

    def __init__(self, dataset: PromptDataset, seed: int = 1, shuffle: bool = True) -> None:
        if len(dataset) < 1:
            raise ValueError("the prompt dataset is empty; give it at least one prompt")
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Prompts of one epoch; the stream itself has no end."""
        return len(self.dataset)

    def prompt(self, index: int) -> Prompt:
        """The prompt at position `index` >= 0 of the stream."""
        epoch, item = self.locate(index)
        return self.dataset[item]

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, dataset item) of position `index`; every epoch holds every item once."""
        if index < 0:
            raise IndexError(f"stream position {index} is negative")
        epoch, offset = divmod(index, len(self.dataset))
        if not self.shuffle:
            return epoch, offset
        return epoch, int(epoch_order(len(self.dataset), self.seed, epoch)[offset])


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """(size,) int64: the order of the items in `epoch`. Two epochs may be open at once, hence the small cache."""
    order = np.random.default_rng([seed & (2**64 - 1), epoch]).permutation(size)  # numpy takes no negative seed
    order.setflags(write=False)
    return order
