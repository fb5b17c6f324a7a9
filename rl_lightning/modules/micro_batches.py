"""deal_micro_batches: a rank's sequences packed, with equally many micro-batches on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rl_lightning.batching.micro_batch import MicroBatch, make_micro_batch, pack_micro_batches
from rl_lightning.modules.data_parallel import DataParallel
from rl_lightning.types import Batch


def deal_micro_batches(
    batch: Batch,
    sequences: Sequence[int],
    max_tokens: int,
    *,
    share_prompts: bool,
    ranks: DataParallel,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Where a rank has fewer than another its sequences are spread thinner, and stand-ins follow. A collective.

    Args:
        batch: on the CPU.
        sequences: this rank's, of those that are run together.
        max_tokens: most tokens of a micro-batch.
        share_prompts: answers to the same question share their prompt.
        ranks: those that run at the same time.
        device: where micro-batches are used.
    """
    packed = pack_micro_batches(batch, sequences, max_tokens, share_prompts=share_prompts)
    wanted = ranks.max(len(packed), device)
    if 0 < len(packed) < wanted:
        finer = pack_micro_batches(batch, sequences, max_tokens, min_groups=wanted, share_prompts=share_prompts)
        packed = finer if len(finer) <= wanted else packed
    for chosen in packed:
        yield make_micro_batch(batch, chosen, share_prompts=share_prompts, device=device)
    for _ in range(wanted - len(packed)):
        yield MicroBatch.empty(device)
