"""ShareWait: how a rank waits for its share of what engines answered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rl_lightning.rollout.errors import RolloutError, StepLostError
from rl_lightning.rollout.share import Share, Waiting

logger = logging.getLogger(__name__)

Resync = Callable[[Sequence[tuple[str, Any]]], None]
"""Sends the current weights to these workers (name, handle)."""

Agree = Callable[[Any], Any]
"""A collective: gives every rank what rank 0 put in."""

PROGRESS_S = 30.0


@dataclass(frozen=True, slots=True)
class ShareWait:
    """Alone, or together with all ranks where all of them take part in sending weights.

    Attributes:
        timeout_s: longest wait for one share.
        resync: see `Resync`; None on ranks that do not publish.
        agree: where ranks wait together, gives them rank 0's view of whether to wait; None: each its own.
    """

    timeout_s: float
    resync: Resync | None = None
    agree: Agree | None = None

    def until(self, ask: Callable[[], Share | Waiting], what: str) -> Share:
        """Asks until there is a share, sending weights to workers that came back without them.

        Args:
            ask: waits a little for this rank's share.
            what: is waited for.

        Raises:
            RolloutError: none within `timeout_s`; says what was missing.
        """
        started = told = time.monotonic()
        answer = ask()
        while (waiting := self._missing(answer)) is not None:
            now = time.monotonic()
            if now - started > self.timeout_s:
                raise RolloutError(f"no {what} within {self.timeout_s:.0f} s: {waiting.report}")
            if now - told > PROGRESS_S:
                told = now
                logger.info("waiting for %s since %.0f s: %s", what, now - started, waiting.report)
            if waiting.unsynced and self.resync is not None:
                self.resync(waiting.unsynced)
            answer = answer if isinstance(answer, Share) else ask()
        # rank 0 has its share, so this one's is there too
        return answer if isinstance(answer, Share) else ShareWait(self.timeout_s).until(ask, what)

    def check_lost(self, lost: Sequence[int]) -> None:
        """Answers may be waited for anew only by a rank that waits for itself, and whose share no other rank has too.

        Raises:
            StepLostError: all ranks wait together, and those that have their answers have gone on.
        """
        if lost and self.agree is not None:
            raise StepLostError(f"the answers of {len(lost)} prompts were lost with their node; go on from the checkpoint")

    def _missing(self, answer: Share | Waiting) -> Waiting | None:
        mine = answer if isinstance(answer, Waiting) else None
        agreed: Waiting | None = mine if self.agree is None else self.agree(mine)
        return agreed
