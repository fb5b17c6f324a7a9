"""Spans: where the segments of a flat micro-batch lie, for kernels of attention and in tensors only.

A number would be part of compiled code, which would be made again for the next micro-batch. Lists of starts are all equally
long, because compiled code takes two equal lengths for one and the same.

    segments  [ prompt A ][ prompt B ][ answer A1 ][ answer A2 ][ answer B1 ][ sequence C ]
              '-- shared prompts ----''------------ their answers ----------'
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rl_lightning.batching.transfer import to_device


class Spans(NamedTuple):
    """K segments of N tokens. Each sees its own earlier tokens, and answers see all of their group's prompt.

    Attributes:
        starts: (K + 1,) int32 on the device, where each segment starts, and N.
        prompt_starts: (K + 1,) int32 on the device, where the G shared prompts start, and their end, which is repeated.
        answer_starts: (K + 1,) int32 on the device, where the answers to each of them start, counted from the first answer, and
            their end, which is repeated.
        longest: () int64 on the CPU, tokens of the longest segment.
        longest_prompt: () int64 on the CPU, of the shared ones.
        longest_answers: () int64 on the CPU, most tokens of all answers to one prompt.
        n_groups: () int64 on the CPU, G; 0 where nothing is shared.
        n_prompt_tokens: () int64 on the CPU, of the shared prompts.
        n_answer_tokens: () int64 on the CPU, of the answers to them.
    """

    starts: Tensor
    prompt_starts: Tensor
    answer_starts: Tensor
    longest: Tensor
    longest_prompt: Tensor
    longest_answers: Tensor
    n_groups: Tensor
    n_prompt_tokens: Tensor
    n_answer_tokens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], parents: Sequence[int], device: torch.device | str = "cpu") -> Spans:
        """Those of segments in the order of this module's picture; see `PackedLayout` for the arguments."""
        answers: dict[int, int] = {}
        for segment, parent in enumerate(parents):
            if parent != segment:
                answers[parent] = answers.get(parent, 0) + lengths[segment]
        n_groups = len(answers)
        n_shared = n_groups + sum(parent != segment for segment, parent in enumerate(parents))
        followers = list(parents[n_groups:n_shared])
        assert list(answers) == list(range(n_groups)) and followers == sorted(followers), "prompts, their answers, the rest"
        prompts, totals = list(lengths[:n_groups]), list(answers.values())
        starts, prompt_starts, answer_starts = (_starts(sizes, len(lengths)) for sizes in (lengths, prompts, totals))
        longest = (torch.tensor(max(sizes, default=0)) for sizes in (lengths, prompts, totals))
        counts = (torch.tensor(count) for count in (n_groups, sum(prompts), sum(totals)))
        tensors = [*(to_device(x, device) for x in (starts, prompt_starts, answer_starts)), *longest, *counts]
        return cls(*tensors)


def _starts(sizes: Sequence[int], n: int) -> Tensor:
    """(n + 1,) int32 of up to `n` sizes."""
    bounds = [0, *accumulate(sizes)]
    return torch.tensor(bounds + bounds[-1:] * (n + 1 - len(bounds)), dtype=torch.int32)
