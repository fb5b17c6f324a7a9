"""fill: answers into as few micro-batches as possible, about equally full, their prompts run again where that makes fewer.

A micro-batch has a price of its own, whatever its size: kernels are launched one by one for every layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rl_lightning.batching.packing import pack

WORTH = 8
"""For each micro-batch saved, prompts may be run again up to this fraction of a micro-batch."""

STEPS_OF_EVENNESS = 8
"""Limits that are tried between equally full micro-batches and `max_tokens`."""


class Family(NamedTuple):
    """Answers that can share a prompt.

    Attributes:
        prompt: tokens that are run once for all of its answers in a micro-batch.
        members: the caller's numbers of these answers.
        answers: tokens that are run of each.
    """

    prompt: int
    members: tuple[int, ...]
    answers: tuple[int, ...]

    @property
    def load(self) -> int:
        """Tokens that are run if all are in one micro-batch."""
        return self.prompt + sum(self.answers)

    def part(self, begin: int, end: int) -> Family:
        """Some of the answers, with the same prompt."""
        return Family(self.prompt, self.members[begin:end], self.answers[begin:end])


def fill(families: Sequence[Family], max_tokens: int, *, min_groups: int = 1) -> list[list[int]]:
    """Deals answers to micro-batches that run at most `max_tokens` tokens each.

    Never more micro-batches than Algorithm 1 makes (`pack`) of families that are cut only where they do not fit. Fewer, where
    an even deal of these does it, or one that divides families at a price of at most `1 / WORTH` of a micro-batch for each
    that is saved. Among equally many those that run fewer tokens.

    Args:
        families: with at least one answer each.
        max_tokens: most tokens of one micro-batch; no answer with its prompt has more.
        min_groups: micro-batches to make where there are as many answers.

    Returns:
        Members by micro-batch, ascending inside each; none is empty.
    """
    pieces = _split([piece for family in families for piece in _cut(family, max_tokens)], min_groups)
    packed = pack([piece.load for piece in pieces], max_tokens, min_groups=min_groups)
    dealt = _deal(pieces, len(packed), max_tokens, divides=False)
    best = dealt or [sorted(member for i in group for member in pieces[i].members) for group in packed]
    affordable = sum(piece.load for piece in pieces)
    least = max(-(-sum(family.load for family in families) // max_tokens), min(min_groups, len(pieces)))
    most = len(packed)
    while least < most:
        n = (least + most) // 2
        found = _deal(pieces, n, max_tokens, divides=False)
        found = found or _divide(families, n, max_tokens, affordable + (len(packed) - n) * max_tokens // WORTH)
        if found is None:
            least = n + 1
        else:
            best, most = found, n
    return sorted(best)


def _cut(family: Family, max_tokens: int) -> Iterator[Family]:
    """Parts that fit, each as large as can be."""
    begin, load = 0, family.prompt
    for i, answer in enumerate(family.answers):
        if i > begin and load + answer > max_tokens:
            yield family.part(begin, i)
            begin, load = i, family.prompt
        load += answer
    yield family.part(begin, len(family.answers))


def _split(pieces: list[Family], wanted: int) -> list[Family]:
    """Halves the pieces with the most answers until there are `wanted` or nothing can be halved."""
    while len(pieces) < wanted and max((len(piece.members) for piece in pieces), default=0) > 1:
        largest = max(range(len(pieces)), key=lambda i: len(pieces[i].members))
        piece, n = pieces[largest], len(pieces[largest].members)
        pieces[largest : largest + 1] = [piece.part(0, n // 2), piece.part(n // 2, n)]
    return pieces


def _divide(families: Sequence[Family], n: int, max_tokens: int, affordable: int) -> list[list[int]] | None:
    """`n` micro-batches that share families, as even as can be; None if they do not fit or run more than `affordable` tokens."""
    if all(len(family.members) == 1 for family in families) or _deal(families, n, max_tokens, divides=True) is None:
        return None
    even = -(-sum(family.load for family in families) // n)
    for step in range(STEPS_OF_EVENNESS + 1):
        limit = even + (max_tokens - even) * step // STEPS_OF_EVENNESS
        found = _deal(families, n, limit, divides=True)
        if found is not None and len(found) == n and _run_tokens(families, found) <= affordable:
            return found
    return None


def _run_tokens(families: Sequence[Family], micro_batches: Sequence[Sequence[int]]) -> int:
    """Tokens that these run, each prompt once in each."""
    place = {member: i for i, family in enumerate(families) for member in family.members}
    prompts = (families[i].prompt for members in micro_batches for i in {place[member] for member in members})
    return sum(prompts) + sum(sum(family.answers) for family in families)


def _deal(families: Sequence[Family], n: int, limit: int, *, divides: bool) -> list[list[int]] | None:
    """Longest first into the emptiest of `n` micro-batches, answers to where their prompt is already; None if they do not fit.

    Args:
        families: to deal.
        n: micro-batches, of which those that stay empty are left out.
        limit: most tokens of each.
        divides: answer by answer; otherwise a family stays together.
    """
    dealt: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    by_load = [(0, b) for b in range(n)]  # with entries that are out of date
    for family in sorted(families, key=lambda family: -family.load):
        homes: list[int] = []  # micro-batches that run this prompt
        for tokens, members in _units(family, divides):
            home = min((b for b in homes if loads[b] + tokens <= limit), key=loads.__getitem__, default=None)
            if home is None:
                while by_load[0][0] != loads[by_load[0][1]]:
                    heapq.heappop(by_load)
                home = by_load[0][1]
                homes.append(home)
                tokens += family.prompt
            loads[home] += tokens
            if loads[home] > limit:
                return None
            dealt[home] += members
            heapq.heappush(by_load, (loads[home], home))
    return [sorted(members) for members in dealt if members]


def _units(family: Family, divides: bool) -> list[tuple[int, tuple[int, ...]]]:
    """Tokens and members of what stays together, most tokens first; the prompt is not counted."""
    if not divides:
        return [(sum(family.answers), family.members)]
    order = sorted(range(len(family.members)), key=lambda i: -family.answers[i])
    return [(family.answers[i], (family.members[i],)) for i in order]
