"""What went wrong in which rank, told as one error."""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace

CONSEQUENCES = (
    "connection closed by peer",
    "connection reset",
    "broken pipe",
    "socket closed",
    "gloo",
    "nccl",
    "timed out waiting",
    "tcpstore",
    "process group",
)
"""Words by which a collective complains that a peer is gone."""


class RayWorkerError(RuntimeError):
    """A training worker failed.

    Attributes:
        rank: the rank that failed first, None if no single one did.
        cause: the exception raised there, or the reason of its death.
        worker_traceback: traceback of the worker, empty where it died without one.
    """

    def __init__(
        self, message: str, rank: int | None = None, cause: BaseException | None = None, worker_traceback: str = ""
    ) -> None:
        super().__init__(message)
        self.rank, self.cause, self.worker_traceback = rank, cause, worker_traceback

    def __reduce__(self) -> tuple[type[RayWorkerError], tuple[str, int | None, BaseException | None, str]]:
        return type(self), (str(self), self.rank, self.cause, self.worker_traceback)


@dataclass(frozen=True)
class WorkerFailure:
    """How one rank failed.

    Attributes:
        rank: of the failed worker.
        where: its process and node, for messages.
        cause: what it raised; for one that died, Ray's account of it.
        traceback: as printed in the worker, empty if it died.
        died: the process ended without a word.
        at: time by the driver's monotonic clock at which the driver saw it, in seconds.
    """

    rank: int
    where: str
    cause: BaseException
    traceback: str = ""
    died: bool = False
    at: float = 0.0

    @classmethod
    def of(cls, error: BaseException, rank: int, where: str) -> WorkerFailure:
        """Built in the worker, of any exception: one that does not pickle is told by its text."""
        from ray import cloudpickle

        text = "".join(traceback.format_exception(error))
        try:
            cause = cloudpickle.loads(cloudpickle.dumps(error.with_traceback(None)))
        except (pickle.PickleError, TypeError, AttributeError, ValueError, RecursionError):
            cause = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(rank, where, cause, text)

    def seen_at(self, at: float) -> WorkerFailure:
        """The same, stamped by the driver."""
        return replace(self, at=at)

    @property
    def is_consequence(self) -> bool:
        """Whether it only says that another rank is gone."""
        text = f"{type(self.cause).__name__}: {self.cause}".lower()
        return not self.died and isinstance(self.cause, RuntimeError) and any(words in text for words in CONSEQUENCES)

    @property
    def headline(self) -> str:
        """Rank, place and cause in one line."""
        text = str(self.cause).strip()
        if self.died:
            return f"rank {self.rank} ({self.where}) died: {_reason_of_death(text)}"
        return f"rank {self.rank} ({self.where}) raised {type(self.cause).__name__}: {text}"


def root_cause(failures: Sequence[WorkerFailure]) -> WorkerFailure:
    """The failure that explains the others: deaths before exceptions before broken connections, then the first, then by rank."""
    return min(failures, key=lambda f: (f.is_consequence, not f.died, f.at, f.rank))


def worker_error(failures: Sequence[WorkerFailure]) -> RayWorkerError:
    """One error for all failures of a run."""
    root = root_cause(failures)
    others = [f"rank {f.rank} ({type(f.cause).__name__})" for f in failures if f is not root]
    message = f"training worker {root.headline}"
    if others:
        message += f"\nalso failed, most likely because of it: {', '.join(sorted(others))}"
    if root.traceback:
        message += f"\n--- traceback of rank {root.rank} ---\n{root.traceback.rstrip()}"
    return RayWorkerError(message, root.rank, root.cause, root.traceback)


def _reason_of_death(account: str) -> str:
    """What Ray's account says of this death, without its paragraphs of advice."""
    detail = re.search(r"Worker exit detail: (.*?)(?: Some common causes|$)", account, re.DOTALL)
    if detail is None:
        return " ".join(account.split())
    return (
        f"{' '.join(detail[1].split())} Its process ended without a Python exception: it was killed (kill -9, or the kernel when "
        f"memory ran out, see dmesg), called os._exit, or crashed in native code"
    )
