"""Whose failure is it: the user's, which no restart mends, or the machine's, which one may."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from rl_lightning.engines.engine import WeightMismatchError
from rl_lightning.rollout.errors import RejectionsError, RewardsError


class NonFiniteError(RuntimeError):
    """Training steps in a row could not be made; the message names the dump of the last one and how to see it again."""


class NoClusterError(ConnectionError):
    """The Ray cluster that was named cannot be joined."""


CONFIGURATION_ERRORS = (ValueError, FileNotFoundError, MisconfigurationException, WeightMismatchError, NoClusterError)
"""Wrong options, wrong data, wrong weights, no cluster: their message says what to do."""

CODE_ERRORS = (TypeError, AttributeError, NameError, ImportError)
"""Wrong code: their traceback says where. Like the others they come again however often one tries."""

TRAINING_ERRORS = (NonFiniteError, RejectionsError, RewardsError)
"""Training that cannot go on from where it stands: the message says how to look into it."""

WRONG_MONITOR = "Early stopping conditioned on metric"
"""So begins Lightning's RuntimeError for an option, `monitor`; another attempt may skip the check that raised it."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Of a disk that stays full, or read-only, however fast one tries again."""

SAME_FAILURES = 3
"""So many in a row are no accident."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it was raised from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def find_cause(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The innermost of `error` and its causes that is one of `kinds`, None if none is."""
    return next((cause for cause in reversed(list(causes(error))) if isinstance(cause, kinds)), None)


def may_be_mended_by_restart(error: BaseException) -> bool:
    """Whether trying again has any prospect."""
    if any(str(cause).startswith(WRONG_MONITOR) or getattr(cause, "errno", None) in NO_ROOM for cause in causes(error)):
        return False
    return find_cause(error, (*CONFIGURATION_ERRORS, *CODE_ERRORS, *TRAINING_ERRORS)) is None


class Repetition:
    """Notices a failure that comes again and again, as a mistake in a user's loss does whose exception could be any.

    Only of kinds that code raises rather than machines: a lost connection or full memory may say the same many times.
    """

    def __init__(self) -> None:
        self._last: object = None
        self._times = 0

    def is_certain(self, error: BaseException, progress: object) -> bool:
        """Whether `error` is the same, but for numbers, for the third time in a row, and nothing was got done in between.

        Args:
            error: of this attempt.
            progress: equal to that of the attempt before if that saved nothing.
        """
        cause = list(causes(error))[-1]
        is_of_code = type(cause) is RuntimeError or isinstance(cause, (LookupError, ArithmeticError, AssertionError))
        this = (type(cause), re.sub(r"\d+", "0", str(cause)), progress)
        self._times = self._times + 1 if this == self._last else 1
        self._last = this
        return is_of_code and self._times >= SAME_FAILURES
