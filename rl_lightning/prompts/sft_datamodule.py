"""SFTDataModule: examples to imitate, as a LightningDataModule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from rl_lightning.prompts.supervised import SupervisedJsonl
from rl_lightning.types import Batch


class SFTDataModule(LightningDataModule):
    """Feeds `SFTModule` from JSONL files with `prompt` and `answer`.

    Args:
        train_path: training examples.
        model_path: folder or hub name whose tokenizer is used; linked to the model's by the command line.
        val_path: validation examples; None for no validation.
        batch_size: examples per training step over all ranks.
        max_seq_len: most tokens of an example; longer ones are dropped and counted.
        allow_bad_lines: drop and count bad lines instead of stopping at them.
        shuffle: whether each epoch has its own order.
        seed: of that order.
    """

    def __init__(
        self,
        train_path: str,
        model_path: str,
        val_path: str | None = None,
        batch_size: int = 512,
        max_seq_len: int = 4096,
        allow_bad_lines: bool = False,
        shuffle: bool = True,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model_path, self.batch_size, self.shuffle, self.seed = model_path, batch_size, shuffle, seed
        self.train_set = SupervisedJsonl(train_path, max_seq_len, allow_bad_lines)
        self.val_set = SupervisedJsonl(val_path, max_seq_len, allow_bad_lines) if val_path else None
        self._loaded = False

    def check_inputs(self) -> None:
        """Reads and tokenises all examples, so that bad data is found before anything starts. Idempotent.

        Raises:
            ValueError: names the file, the line and the remedy.
        """
        if self._loaded:
            return
        from rl_lightning.prompts.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.model_path)
        for dataset in (self.train_set, self.val_set):
            if dataset is not None:
                dataset.setup(tokenizer)
        self._loaded = True

    def setup(self, stage: str) -> None:
        """Reads the files.

        Raises:
            ValueError: names the file, the line and the remedy; or a batch that does not reach every rank.
        """
        self.check_inputs()
        rank, world_size = self._ranks()
        if min(self.batch_size, len(self.train_set)) < world_size:
            raise ValueError(
                f"batch_size={self.batch_size} of {len(self.train_set)} examples leaves some of {world_size} ranks without any"
            )

    def train_dataloader(self) -> SupervisedLoader:
        """This rank's batches of one epoch."""
        assert self.trainer is not None
        trainer = self.trainer
        seed = (lambda: self.seed + trainer.current_epoch) if self.shuffle else None
        # not what was given: a batch that was fetched as the run was asked to stop is trained on after the restart
        return SupervisedLoader(self.train_set, self.batch_size, *self._ranks(), seed, lambda: trainer.fit_loop.batch_idx + 1)

    def val_dataloader(self) -> SupervisedLoader | list[Batch]:
        """This rank's share of the validation examples; nothing where there are none."""
        if self.val_set is None:
            return []
        return SupervisedLoader(self.val_set, self.batch_size, *self._ranks(), None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches stay on the CPU, where they are packed: micro-batches go to the device when their turn comes."""
        return batch

    def _ranks(self) -> tuple[int, int]:
        """(rank, world size) of data parallelism."""
        assert self.trainer is not None, "the data module is not attached to a Trainer"
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (self.trainer.global_rank, self.trainer.world_size)


class SupervisedLoader:
    """One rank's batches of one epoch, each a strided share of a batch over all ranks.

    Of a last batch with fewer examples than ranks some get one without any: they take part, and no example counts twice.

    Args:
        dataset: the examples.
        batch_size: over all ranks.
        rank, world_size: of data parallelism.
        seed: of the present epoch's order, asked when an epoch begins; None keeps the file's order.
        done: batches of the present epoch that an earlier run trained on, asked likewise. Not a state of the loader: where the
            optimiser asks how many steps there are, Lightning makes the loader before it reads a checkpoint, and gives it none.
    """

    def __init__(
        self,
        dataset: SupervisedJsonl,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: Callable[[], int] | None,
        done: Callable[[], int] = lambda: 0,
    ) -> None:
        self._dataset, self._batch_size, self._rank, self._world_size = dataset, batch_size, rank, world_size
        self._seed, self._done = seed, done

    def __len__(self) -> int:
        return math.ceil(len(self._dataset) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self._order()
        for position in range(self._done(), len(self)):
            chosen = order[position * self._batch_size : (position + 1) * self._batch_size]
            yield self._dataset.batch(chosen[self._rank :: self._world_size])

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: `done` knows."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore. With this method Lightning knows that the epoch can be gone on with."""

    def _order(self) -> list[int]:
        if self._seed is None:
            return list(range(len(self._dataset)))
        generator = torch.Generator().manual_seed(self._seed())
        return torch.randperm(len(self._dataset), generator=generator).tolist()
