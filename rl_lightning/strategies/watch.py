"""Watch: the driver's side of a run that is under way."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from rl_lightning.strategies.failures import RayWorkerError, WorkerFailure, worker_error
from rl_lightning.strategies.place import Place
from rl_lightning.strategies.progress import ProgressUpdate, ProgressView
from rl_lightning.strategies.result import RunResult
from rl_lightning.strategies.stop_signals import StopSignals

logger = logging.getLogger(__name__)

POLL_S = 0.25
DRAIN_S = 0.3
CHANNEL_TIMEOUT_S = 5.0
FAILURE_GRACE_S = 1.0
CONSEQUENCE_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the driver waits for ranks that should be about to end, in seconds.

    Attributes:
        stop_s: from the first signal until the run is given up.
        straggler_s: for the other ranks, once one has ended.
    """

    stop_s: float
    straggler_s: float


class Watch:
    """The driver's loop: hands on events, collects outcomes, ends the run on a failure or a signal.

    Args:
        runs: rank by reference to its outcome.
        places: where the workers are, by rank, to say where a dead one was.
        channel: handle of the RunChannel.
        signals: of the driver.
        patience: see `Patience`.
        view: draws progress.
    """

    def __init__(
        self,
        runs: dict[Any, int],
        places: Sequence[Place],
        channel: Any,
        signals: StopSignals,
        patience: Patience,
        view: ProgressView,
    ) -> None:
        self._pending, self._places, self._channel = dict(runs), places, channel
        self._signals, self._patience, self._view = signals, patience, view
        self._result: RunResult | None = None
        self._failures: list[WorkerFailure] = []
        self._drain: Any = channel.drain.remote(DRAIN_S)
        self._give_up_at = self._first_end = math.inf

    def until_over(self) -> RunResult | None:
        """Rank 0's result; None where a stop was asked for and the ranks did not manage it in time.

        Raises:
            RayWorkerError: a rank failed, or did not end long after another one had.
        """
        while self._pending:
            awaited = [*self._pending, *([self._drain] if self._drain is not None else [])]
            ready, _ = ray.wait(awaited, num_returns=1, timeout=POLL_S)
            for reference in ready:
                if reference is self._drain:
                    self._hand_on()
                else:
                    self._take(reference)
            if self._stop_is_due() or self._has_failed():
                break
            self._check_stragglers()
        if self._signals.received is not None and (self._pending or self._failures):
            return None
        if self._failures:
            error = worker_error(self._failures)
            raise error from error.cause
        return self._result

    def close(self) -> None:
        """Shows what is still on its way, then ends the bar."""
        for _ in range(2):  # what was asked for before the ranks ended, and what came after
            if self._drain is not None:
                self._hand_on()
        self._view.close()

    def _hand_on(self) -> None:
        try:
            self._show(ray.get(self._drain, timeout=CHANNEL_TIMEOUT_S))
            self._drain = self._channel.drain.remote(DRAIN_S)
        except ray.exceptions.RayError as error:
            logger.warning("progress and log of the workers are no longer shown: %s", error)
            self._drain = None

    def _show(self, events: list[bytes]) -> None:
        for event in map(pickle.loads, events):
            if isinstance(event, ProgressUpdate):
                self._view.show(event)
                continue
            target = logging.getLogger(event.name)
            if target.isEnabledFor(event.levelno):
                with self._view.hidden():
                    target.handle(event)

    def _take(self, reference: Any) -> None:
        rank = self._pending.pop(reference)
        try:
            outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            died = isinstance(error, ray.exceptions.RayActorError)
            outcome = WorkerFailure(rank, str(self._places[rank]), error, died=died)
        if isinstance(outcome, WorkerFailure):
            self._failures.append(outcome.seen_at(time.monotonic()))
            return
        self._first_end = min(self._first_end, time.monotonic())
        if rank == 0:
            self._result = outcome

    def _stop_is_due(self) -> bool:
        """Passes the first signal on; whether the time to stop in good order is over."""
        if self._signals.received is None:
            return False
        if self._give_up_at == math.inf:
            self._give_up_at = time.monotonic() + self._patience.stop_s
            self._channel.request_stop.remote()
            logger.warning(
                "%s: stopping after this step, within %g s; a second signal stops at once",
                self._signals.received.name,
                self._patience.stop_s,
            )
        return time.monotonic() > self._give_up_at or self._signals.count > 1

    def _has_failed(self) -> bool:
        """Whether there is a failure and the others had the time to say theirs: ranks that wait for a lost one never end."""
        if not self._failures:
            return False
        roots = [failure for failure in self._failures if not failure.is_consequence]
        grace_s = FAILURE_GRACE_S if roots else CONSEQUENCE_GRACE_S
        return time.monotonic() > (roots or self._failures)[0].at + grace_s

    def _check_stragglers(self) -> None:
        waited_s = time.monotonic() - self._first_end
        if waited_s > self._patience.straggler_s:
            late = ", ".join(f"rank {rank} ({self._places[rank]})" for rank in sorted(self._pending.values()))
            raise RayWorkerError(f"{late} did not end within {waited_s:.0f} s after another rank had (collective_timeout_s)")
