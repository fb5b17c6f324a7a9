"""A rank waits for its share alone or with all others, sends weights meanwhile, and says what was missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rl_lightning.rollout.errors import RolloutError, StepLostError
from rl_lightning.rollout.share import Share, Waiting
from rl_lightning.rollout.share_wait import ShareWait

SHARE = Share(0, ())
NOTHING, NO_WEIGHTS = Waiting("2 of 3 groups"), Waiting("no weights", (("worker", "handle"),))


def answers(*given: Share | Waiting) -> Callable[[], Share | Waiting]:
    return iter(given).__next__


def test_weights_are_sent_to_workers_that_have_none() -> None:
    sent: list[Sequence[tuple[str, Any]]] = []
    wait = ShareWait(60, sent.append)
    assert wait.until(answers(NOTHING, NO_WEIGHTS, SHARE), "batch") is SHARE
    assert sent == [(("worker", "handle"),)]
    assert ShareWait(60).until(answers(NO_WEIGHTS, SHARE), "batch") is SHARE


def test_who_waits_too_long_says_for_what() -> None:
    with pytest.raises(RolloutError, match="no batch within 0 s: 2 of 3 groups"):
        ShareWait(0).until(lambda: NOTHING, "batch")


def test_together_ranks_wait_until_rank_0_has_its_share() -> None:
    views = iter([NO_WEIGHTS, NOTHING, None, None])
    sent: list[Any] = []
    ahead = ShareWait(60, sent.append, lambda mine: next(views))
    assert ahead.until(answers(SHARE), "batch") is SHARE and len(sent) == 1  # takes part though it has its share
    behind = ShareWait(60, sent.append, lambda mine: next(views))
    assert behind.until(answers(NO_WEIGHTS, NO_WEIGHTS, SHARE), "batch") is SHARE and len(sent) == 1


def test_lost_answers_are_waited_for_by_a_rank_alone_only() -> None:
    ShareWait(60).check_lost([1, 2])
    together = ShareWait(60, agree=lambda mine: mine)
    together.check_lost([])
    with pytest.raises(StepLostError, match="the answers of 2 prompts were lost"):
        together.check_lost([1, 2])
