"""deal_minibatches: a rank's answers cut into the parts that it updates on one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def deal_minibatches(group_ids: Sequence[int], n_minibatches: int, *, seed: int) -> list[list[int]]:
    """Indices of the answers by minibatch, equally many in each.

    Groups are shuffled and cut by the count of answers, so that answers to one prompt mostly stay together.

    Args:
        group_ids: of each answer.
        n_minibatches: parts; one keeps the order.
        seed: of the shuffle.

    Raises:
        ValueError: the answers cannot be cut into equal parts.
    """
    n_answers = len(group_ids)
    if n_answers % n_minibatches:
        raise ValueError(f"{n_answers} answers on a rank cannot be cut into ppo.n_minibatches={n_minibatches} equal parts")
    groups: dict[int, list[int]] = {}
    for answer, group in enumerate(group_ids):
        groups.setdefault(group, []).append(answer)
    members = list(groups.values())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(members), generator=generator).tolist() if n_minibatches > 1 else range(len(members))
    shuffled = [answer for group in order for answer in members[group]]
    size = n_answers // n_minibatches
    return [shuffled[start : start + size] for start in range(0, n_answers, size)]
