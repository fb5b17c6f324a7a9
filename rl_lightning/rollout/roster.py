"""WorkerRoster: which rollout workers live, hold which weights and carry how much."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SchedulePolicy = Literal["round_robin", "least_requests", "least_token_usage"]
"""Which of several workers with room gets the next group."""


@dataclass(slots=True)
class WorkerEntry:
    """What the controller knows of one worker.

    Attributes:
        name: stable over restarts.
        incarnation: new with every start of its process or engine; leases of an older one are void.
        handle: how the trainer reaches it (an actor handle).
        version: weights its engine proved to hold, None until the first.
        running: groups it holds.
        tokens: tokens of the answers it holds, estimated between heartbeats.
        last_seen_s, last_grant: for the deadline and for round robin.
        report: the latest heartbeat's counters.
    """

    name: str
    incarnation: str
    handle: Any
    last_seen_s: float
    version: int | None = None
    running: int = 0
    tokens: int = 0
    last_grant: int = 0
    report: dict[str, float] = field(default_factory=dict)


class WorkerRoster:
    """Registration, heartbeats and choice of workers.

    Args:
        timeout_s: silence after which a worker counts as lost.
        policy: see `SchedulePolicy`.
    """

    def __init__(self, timeout_s: float, policy: SchedulePolicy) -> None:
        self.timeout_s = timeout_s
        self.policy = policy
        self.restarts = 0
        self._entries: dict[str, WorkerEntry] = {}
        self._known: set[str] = set()
        self._grants = 0

    def __iter__(self) -> Iterator[WorkerEntry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> WorkerEntry | None:
        """The worker called `name`, if it is registered."""
        return self._entries.get(name)

    def register(self, name: str, incarnation: str, handle: Any, now_s: float) -> None:
        """A worker is ready to generate, for the first time or again; it holds no proven weights yet."""
        self.restarts += name in self._known
        self._known.add(name)
        self._entries[name] = WorkerEntry(name, incarnation, handle, now_s)

    def heartbeat(self, name: str, incarnation: str, report: Mapping[str, float], now_s: float) -> bool:
        """Notes that the worker lives; False if it must register again."""
        entry = self._entries.get(name)
        if entry is None or entry.incarnation != incarnation:
            return False
        entry.last_seen_s, entry.report, entry.tokens = now_s, dict(report), int(report.get("tokens", entry.tokens))
        return True

    def remove(self, name: str) -> None:
        """The worker is lost; its next sign of life registers it anew."""
        self._entries.pop(name, None)

    def lost(self, now_s: float) -> list[str]:
        """Workers silent for longer than the deadline."""
        return [e.name for e in self._entries.values() if now_s - e.last_seen_s > self.timeout_s]

    def next_loss_s(self, now_s: float) -> float:
        """Until then no worker can count as lost, nor one that registers later."""
        return min((entry.last_seen_s for entry in self._entries.values()), default=now_s) + self.timeout_s

    def mark_synced(self, names: Iterable[str], version: int) -> None:
        """These workers proved that they hold `version`."""
        for name in names:
            if (entry := self._entries.get(name)) is not None:
                entry.version = version

    def unsynced(self, version: int) -> list[WorkerEntry]:
        """Workers whose engine does not hold `version`."""
        return [e for e in self._entries.values() if e.version != version]

    def turns(self, rooms: Mapping[str, int], version: int) -> Iterator[WorkerEntry]:
        """Who gets one group after another, the best worker by the policy at each, until none has room.

        Args:
            rooms: by worker, how many groups it can take.
            version: only workers that hold these weights count.

        Yields:
            An entry; the caller notes the grant before it asks for the next one.
        """
        left = {name: room for name, room in rooms.items() if room > 0}
        queue = [(self._rank(entry), place, entry) for place, entry in enumerate(self._with_weights(left, version))]
        heapq.heapify(queue)
        while queue:
            _, place, entry = queue[0]
            yield entry
            left[entry.name] -= 1
            if left[entry.name] > 0:
                heapq.heapreplace(queue, (self._rank(entry), place, entry))
            else:
                heapq.heappop(queue)

    def _with_weights(self, names: Iterable[str], version: int) -> list[WorkerEntry]:
        return [e for name in names if (e := self._entries.get(name)) is not None and e.version == version]

    def _rank(self, entry: WorkerEntry) -> tuple[int, ...]:
        """Whoever has the least gets the next group."""
        if self.policy == "round_robin":
            return (entry.last_grant,)
        if self.policy == "least_requests":
            return (entry.running, entry.last_grant)
        return (entry.tokens, entry.running, entry.last_grant)

    def note_grant(self, entry: WorkerEntry, tokens: int) -> None:
        """A group of about `tokens` tokens went to this worker."""
        self._grants += 1
        entry.last_grant = self._grants
        entry.running += 1
        entry.tokens += tokens

    def note_return(self, name: str) -> None:
        """A group came back from this worker, answered or not."""
        if (entry := self._entries.get(name)) is not None:
            entry.running = max(0, entry.running - 1)

    def total(self, key: str) -> float:
        """Sum of one counter over the latest heartbeats."""
        return sum(e.report.get(key, 0.0) for e in self._entries.values())
