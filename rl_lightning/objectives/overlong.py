"""overlong_penalty: what an answer pays for coming near the longest allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(answer_lens: Tensor, *, max_new_tokens: int, buffer: int, penalty: float) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13), to be added to the score.

        0                                                      up to max_new_tokens - buffer
        -penalty * (len - (max_new_tokens - buffer)) / buffer  from there to max_new_tokens
        -penalty                                               beyond

    Args:
        answer_lens: (S,) int, tokens of each answer.
        max_new_tokens: most tokens of one answer.
        buffer: tokens before that limit over which the penalty grows.
        penalty: what an answer of the full length pays.

    Returns:
        (S,) float32, never above 0.

    Raises:
        ValueError: a buffer that is not within 1 and max_new_tokens, or a negative penalty.
    """
    if not 1 <= buffer <= max_new_tokens:
        raise ValueError(f"the overlong buffer of {buffer} tokens must lie between 1 and max_new_tokens={max_new_tokens}")
    if penalty < 0:
        raise ValueError(f"the overlong penalty of {penalty} is subtracted from the score and must not be negative")
    excess = answer_lens.double() - (max_new_tokens - buffer)
    return ((excess / -buffer).clamp(-1, 0) * penalty).to(torch.float32)
