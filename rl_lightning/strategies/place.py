"""Place: where a rank runs, and which rank it is for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl_lightning.strategies.environment import Rank

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs."""

    node_id: str
    address: str
    pid: int

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.address}"


def in_order(places: list[Place], first_node: str) -> list[int]:
    """Indices such that places of one node follow each other, `first_node` first, else as they came."""
    seen: dict[str, int] = {first_node: -1}
    for i, place in enumerate(places):
        seen.setdefault(place.node_id, i)
    return sorted(range(len(places)), key=lambda i: (seen[places[i].node_id], i))


def number(places: list[Place], port: int) -> list[Rank]:
    """Ranks of ordered places; rank 0 holds the store at `port`."""
    nodes: dict[str, int] = {}
    local: dict[str, int] = {}
    ranks = []
    for i, place in enumerate(places):
        node = nodes.setdefault(place.node_id, len(nodes))
        local[place.node_id] = local.get(place.node_id, -1) + 1
        ranks.append(Rank(i, len(places), local[place.node_id], node, places[0].address, port))
    return ranks


def in_bundle(places: PlacementGroup | None, i: int) -> dict[str, Any]:
    """Options of an actor that stands in bundle i; none where there is no such bundle: Ray then chooses."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if places is None or i >= places.bundle_count:
        return {}
    strategy = PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=i, placement_group_capture_child_tasks=False)
    return {"scheduling_strategy": strategy}
