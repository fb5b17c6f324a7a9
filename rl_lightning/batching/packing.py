"""pack: sequences into micro-batches without padding."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int, *, min_groups: int = 1) -> list[list[int]]:
    """Splits sequences into micro-batches of at most `max_tokens` tokens (Algorithm 1 of arXiv 2505.24298).

    Longest first; a new micro-batch is opened while fewer than `min_groups` exist or nothing fits, else the sequence
    goes into the fitting micro-batch with the fewest sequences (ties: the least loaded, then the oldest).

    Args:
        lengths: tokens of each sequence.
        max_tokens: most tokens of one micro-batch.
        min_groups: micro-batches to open where there are as many sequences.

    Returns:
        Indices into `lengths` by micro-batch, ascending inside each and by their first index; none is empty.

    Raises:
        ValueError: a sequence is longer than `max_tokens`, or an argument is not positive.
    """
    if max_tokens < 1 or min_groups < 1:
        raise ValueError(f"need max_tokens >= 1 and min_groups >= 1, got max_tokens={max_tokens} and min_groups={min_groups}")
    if lengths and max(lengths) > max_tokens:
        raise too_long(max(lengths), max_tokens)
    groups: list[list[int]] = []
    loads: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = [g for g, load in enumerate(loads) if load + length <= max_tokens]
        if len(groups) < min_groups or not fitting:
            groups.append([index])
            loads.append(length)
            continue
        best = min(fitting, key=lambda g: (len(groups[g]), loads[g]))
        groups[best].append(index)
        loads[best] += length
    return sorted(sorted(group) for group in groups)


def too_long(length: int, max_tokens: int) -> ValueError:
    """The error about a sequence of `length` tokens."""
    return ValueError(
        f"a sequence of {length} tokens is longer than max_tokens_per_mb={max_tokens}: "
        f"raise max_tokens_per_mb to at least {length}, or lower max_prompt_len or max_new_tokens"
    )
