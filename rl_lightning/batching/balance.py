"""balance: rollout groups over ranks, equally many and about equally long."""

from __future__ import annotations

from collections.abc import Sequence


def balance(loads: Sequence[int], n_parts: int) -> list[list[int]]:
    """Deals items to `n_parts` so that each part has equally many and their loads are close.

    Heaviest first, each to the least loaded part that still has a free place.

    Args:
        loads: weight of each item, for example the tokens of a rollout group.
        n_parts: number of parts, for example trainer ranks.

    Returns:
        Indices into `loads` by part, ascending inside each part.

    Raises:
        ValueError: the items cannot be dealt equally.
    """
    if n_parts < 1 or len(loads) % n_parts:
        raise ValueError(
            f"{len(loads)} prompts cannot be dealt equally to {n_parts} ranks: make batch_size a multiple of {n_parts}"
        )
    places = len(loads) // n_parts
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    totals = [0] * n_parts
    for index in sorted(range(len(loads)), key=lambda i: -loads[i]):
        part = min((p for p in range(n_parts) if len(parts[p]) < places), key=lambda p: totals[p])
        parts[part].append(index)
        totals[part] += loads[index]
    return [sorted(part) for part in parts]
