"""Demand: what a run asks of the cluster, compared with what there is before anything starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl_lightning.strategies.cluster import started_here
from rl_lightning.strategies.failures import RayWorkerError

logger = logging.getLogger(__name__)

POLL_S = 1.0
PROGRESS_S = 10.0
RESOURCES = ("GPU", "CPU")
ROUNDING = 1e-6

Node = Mapping[str, float]
"""Resources of one node, whoever uses them now."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Equal parts of a run, each of which needs its place on one node.

    Attributes:
        name: of one part, e.g. `engine`.
        count: how many there are.
        each: Ray resources of one.
        options: what the user sets to ask for less.
        beside_ranks: each stands beside a trainer rank, on its node and, where both ask for a part of one, on its GPU.
    """

    name: str
    count: int
    each: Mapping[str, float]
    options: str
    beside_ranks: bool = False

    def total(self, resource: str) -> float:
        """Of all parts."""
        return self.count * self.each.get(resource, 0.0)

    def __str__(self) -> str:
        return f"{self.count} {self.name}{'s' * (self.count != 1)}"


def await_resources(demands: Sequence[Demand], timeout_s: float, check: Callable[[], None]) -> None:
    """Says what the run needs and what the cluster has; on a joined cluster waits for nodes that are missing.

    Args:
        demands: all parts of the run.
        timeout_s: longest wait.
        check: called again and again while waiting; may raise to give up.

    Raises:
        ValueError: the cluster was started here, so no node will join it.
        RayWorkerError: the nodes did not come in time.
    """
    began = told = time.monotonic()
    while (problem := shortage(demands, nodes := _nodes())) is not None:
        options = ", ".join(demand.options for demand in demands)
        if started_here():
            raise ValueError(f"{problem}; ask for less ({options}), or join a cluster (address)")
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise RayWorkerError(
                f"{problem} after {waited_s:.0f} s (start_timeout_s={timeout_s:g}); add nodes or ask for less ({options})"
            )
        if waited_s == 0 or time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            logger.info("waiting for nodes since %.0f s, at most %.0f s: %s", waited_s, timeout_s, problem)
        check()
        time.sleep(POLL_S)
    logger.info("%s", sentence(demands, nodes, [name for name in RESOURCES if _wanted(demands, name)]))


def shortage(demands: Sequence[Demand], nodes: Sequence[Node]) -> str | None:
    """What is missing, in a sentence; None if everything finds a place."""
    short = [name for name in RESOURCES if _wanted(demands, name) > sum(node.get(name, 0.0) for node in nodes) + ROUNDING]
    if short:
        return sentence(demands, nodes, short)
    if (homeless := _homeless(demands, nodes)) is not None:
        each = " and ".join(_amount(amount, name) for name, amount in homeless.each.items() if amount)
        return f"{sentence(demands, nodes, list(RESOURCES))}, but not {each} together on one node for each {homeless.name}"
    return None


def sentence(demands: Sequence[Demand], nodes: Sequence[Node], resources: Sequence[str]) -> str:
    """`needs 8 GPUs (4 for 4 engines, 4 for 4 trainer ranks): the cluster has 4 on 1 node`, of these resources."""
    needs, has = [], []
    for name in resources:
        parts = ", ".join(f"{demand.total(name):g} for {demand}" for demand in demands if demand.total(name))
        needs.append(_amount(_wanted(demands, name), name) + (f" ({parts})" if parts else ""))
        has.append(_amount(sum(node.get(name, 0.0) for node in nodes), name))
    where = f"on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    return f"the run needs {' and '.join(needs)}: the cluster has {' and '.join(has)} {where}"


def _homeless(demands: Sequence[Demand], nodes: Sequence[Node]) -> Demand | None:
    """The first demand, large parts first, of which one finds no node with room for it."""
    free: list[dict[str, float]] = [{name: node.get(name, 0.0) for name in RESOURCES} for node in nodes]
    for demand in sorted(demands, key=lambda demand: [-demand.each.get(name, 0.0) for name in RESOURCES]):
        for _ in range(demand.count):
            home = next((node for node in free if all(node.get(k, 0.0) + ROUNDING >= v for k, v in demand.each.items())), None)
            if home is None:
                return demand
            for name, amount in demand.each.items():
                home[name] = home.get(name, 0.0) - amount
    return None


def _wanted(demands: Sequence[Demand], resource: str) -> float:
    return sum(demand.total(resource) for demand in demands)


def _amount(amount: float, resource: str) -> str:
    return f"{amount:g} {resource}{'s' * (amount != 1)}"


def _nodes() -> list[Node]:
    import ray

    nodes: list[Any] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return nodes
