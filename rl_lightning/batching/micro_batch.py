"""MicroBatch: sequences of a batch as one flat forward pass that computes only what the loss needs.

The last token of a sequence predicts nothing, so it is not run.  With `share_prompts` the prompt of answers to the same
question that meet in a micro-batch is run once, and each answer attends to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from rl_lightning.batching.filling import Family, fill
from rl_lightning.batching.layout import PackedLayout
from rl_lightning.batching.packing import too_long
from rl_lightning.batching.transfer import to_device
from rl_lightning.types import Batch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N tokens to run and M tokens to score.

    Attributes:
        token_ids: (N,) int64, what the model reads.
        layout: positions of these N tokens and the attention between them.
        predictors: (R,) int64, indices below N of the tokens that predict a target; ascending.
        rows: (M,) int64, for each target the index below R of its predictor. Answers that share a prompt share its last token.
        targets: (M,) int64, the scored token ids: those under the batch's loss mask.
        sources: (M,) int64, where each target stands in the batch's flat tensors; empty for a stand-in.
        cu_seqlens: (S + 1,) int64, where the targets of each sequence start among M.
        sequences: the batch's sequences in here, in this order.
        is_empty: a stand-in that keeps this rank in step with the others; it has one target that counts nothing.
    """

    token_ids: Tensor
    layout: PackedLayout
    predictors: Tensor
    rows: Tensor
    targets: Tensor
    sources: Tensor
    cu_seqlens: Tensor
    sequences: tuple[int, ...]
    is_empty: bool = False

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> MicroBatch:
        """A stand-in: two tokens, so that every parameter takes part in forward and backward."""
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        nothing, layout = torch.zeros(0, dtype=torch.int64), PackedLayout([2], [0], device)
        return cls(zero.repeat(2), layout, zero, zero, zero, nothing, torch.zeros(1, dtype=torch.int64), (), True)


def pack_micro_batches(
    batch: Batch,
    sequences: Sequence[int],
    max_tokens: int,
    *,
    min_groups: int = 1,
    share_prompts: bool = False,
) -> list[tuple[int, ...]]:
    """Which of `sequences` go into which micro-batch; those without a token to score go nowhere.

    As few micro-batches as `fill` finds, about equally full. Answers share a prompt that stand next to each other in `sequences`.

    Args:
        batch: on the CPU.
        sequences: indices of the batch's sequences.
        max_tokens: most tokens that a micro-batch runs: not the last of a sequence, and a shared prompt once.
        min_groups: micro-batches to make where there are as many sequences.
        share_prompts: answers may share their prompt.

    Raises:
        ValueError: a sequence is longer than `max_tokens` and its last token.
    """
    scored = _targets_per_sequence(batch)
    chosen = [s for s in sequences if scored[s]]
    lengths = batch.cu_seqlens.diff().tolist()
    if chosen and (longest := max(lengths[s] for s in chosen)) - 1 > max_tokens:
        raise too_long(longest, max_tokens)
    dealt = fill(_priced(batch, chosen, share_prompts), max_tokens, min_groups=min_groups)
    return [tuple(chosen[i] for i in members) for members in dealt]


def make_micro_batch(
    batch: Batch, sequences: Sequence[int], *, share_prompts: bool = False, device: torch.device | str = "cpu"
) -> MicroBatch:
    """The forward pass over `sequences` of `batch` (on the CPU), its tensors on `device`."""
    plan = _Plan(batch, sequences, share_prompts)
    sources = torch.from_numpy(np.concatenate(plan.sources))
    predictors, rows = np.unique(np.concatenate(plan.predictors), return_inverse=True)
    counts = [len(targets) for targets in plan.sources]
    return MicroBatch(
        token_ids=to_device(batch.token_ids[torch.from_numpy(np.concatenate(plan.run))], device),
        layout=PackedLayout([len(run) for run in plan.run], plan.parents, device),
        predictors=to_device(torch.from_numpy(predictors), device),
        rows=to_device(torch.from_numpy(rows), device),
        targets=to_device(batch.token_ids[sources], device),
        sources=sources,
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        sequences=tuple(sequences),
    )


def saved_by_sharing(batch: Batch, sequences: Sequence[int]) -> float:
    """Share of the tokens of `sequences` that prompts take which stand there already: what sharing them saves at most."""
    starts, prompt_lens = batch.cu_seqlens.tolist(), batch.prompt_lens.tolist()
    saved = sum((len(family) - 1) * prompt_lens[family[0]] for family in _families(batch, sequences))
    return saved / max(1, sum(starts[s + 1] - starts[s] for s in sequences))


class _Plan:
    """Which tokens of a batch are run, in which segments, and which of them predict which target."""

    def __init__(self, batch: Batch, sequences: Sequence[int], share_prompts: bool) -> None:
        self._starts, self._prompt_lens = batch.cu_seqlens.tolist(), batch.prompt_lens.tolist()
        self._loss_mask = batch.loss_mask.numpy()
        self._n_run = 0
        self._prompt_ends: dict[int, int] = {}
        self._answer_starts: dict[int, int] = {}
        self.run: list[np.ndarray] = []
        self.parents: list[int] = []
        families = _families(batch, sequences) if share_prompts else [[s] for s in sequences]
        self._lay_out([(family, len(family) > 1 and any(map(self._continues, family))) for family in families])
        self.sources, self.predictors = zip(*map(self._score, sequences), strict=True)

    def _lay_out(self, families: Sequence[tuple[Sequence[int], bool]]) -> None:
        """Runs shared prompts, then the answers to them, then all else: the order of a layout."""
        shared = [family for family, is_shared in families if is_shared]
        for family in shared:
            self._run_prompt(family, self._answer(family[0]))
        for segment, family in enumerate(shared):
            for s in filter(self._continues, family):
                self._answer_starts[s] = self._append(self._answer(s), self._starts[s + 1] - 1, segment)
        for family in (family for family, is_shared in families if not is_shared):
            self._run_prompt(family, self._starts[family[0] + 1] - 1)

    def _answer(self, s: int) -> int:
        """Where the answer of `s` starts in the batch."""
        return self._starts[s] + self._prompt_lens[s]

    def _continues(self, s: int) -> bool:
        """Whether the answer of `s` has tokens that predict others of it."""
        return self._starts[s + 1] - 1 > self._answer(s)

    def _run_prompt(self, family: Sequence[int], end: int) -> None:
        """Runs the batch's tokens from the prompt of `family` up to `end`, which is behind the answer of a family of one."""
        begin = self._append(self._starts[family[0]], end, len(self.run))
        for s in family:
            self._prompt_ends[s] = self._answer_starts[s] = begin + self._prompt_lens[s]

    def _append(self, begin: int, end: int, parent: int) -> int:
        """Runs the batch's tokens `begin .. end` as one segment; returns where it starts."""
        self.run.append(np.arange(begin, end))
        self.parents.append(parent)
        self._n_run += end - begin
        return self._n_run - (end - begin)

    def _score(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """What is scored of `s`, and what predicts it: the first token of its answer is predicted by the prompt's last."""
        answer = self._answer(s)
        offsets = np.flatnonzero(self._loss_mask[answer : self._starts[s + 1]])
        return offsets + answer, np.where(offsets == 0, self._prompt_ends[s] - 1, self._answer_starts[s] + offsets - 1)


def _families(batch: Batch, sequences: Sequence[int]) -> list[list[int]]:
    """Answers to one prompt that stand next to each other."""
    families: list[list[int]] = []
    group_ids = batch.group_ids.tolist()
    for s in sequences:
        if families and group_ids[families[-1][-1]] == group_ids[s]:
            families[-1].append(s)
        else:
            families.append([s])
    return families


def _priced(batch: Batch, sequences: Sequence[int], share_prompts: bool) -> list[Family]:
    """What `sequences` run of their prompts and answers; members are places in `sequences`."""
    lengths, prompt_lens = batch.cu_seqlens.diff().tolist(), batch.prompt_lens.tolist()
    families, places = [], iter(range(len(sequences)))
    for members in _families(batch, sequences) if share_prompts else [[s] for s in sequences]:
        prompt = prompt_lens[members[0]]
        families.append(Family(prompt, tuple(islice(places, len(members))), tuple(lengths[s] - 1 - prompt for s in members)))
    return families


def _targets_per_sequence(batch: Batch) -> list[int]:
    """Tokens under the loss mask by sequence."""
    total = torch.zeros(len(batch.loss_mask) + 1, dtype=torch.int64)
    torch.cumsum(batch.loss_mask, 0, out=total[1:])
    return total[batch.cu_seqlens.long()].diff().tolist()
