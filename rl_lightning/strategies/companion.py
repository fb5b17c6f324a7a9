"""Companion: what a run has beside its ranks, and what outlives them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from ray.util.placement_group import PlacementGroup

    from rl_lightning.strategies.demand import Demand


@runtime_checkable
class Companion(Protocol):
    """A data module with actors that belong to the driver, not to a rank: a rank that dies does not take them with it.

    RayStrategy finds it among the arguments of `fit`, `validate`, `test` or `predict`.  `join` is called in every rank on its
    copy, before the trainer does anything with it, the other methods on the driver.
    """

    def check_on_driver(self, trainer: Trainer) -> None:
        """Reads what the ranks get a copy of, and refuses what is wrong with it, before anything is started.

        Raises:
            ValueError: names the options that do not go together, or the file and line.
        """

    def demand(self) -> Demand:
        """What the actors ask of the cluster that the driver has joined."""

    def start_on_driver(self, check: Callable[[], None], places: PlacementGroup | None = None) -> Any:
        """Starts the actors, or takes those of an earlier attempt; returns what the ranks need to reach them.

        `check` is called again and again while it waits, and may raise to give up. In `places` each bundle has room for one
        rank and one part of a `demand` that is `beside_ranks`; it is None for others.
        """

    def end_on_driver(self, error: BaseException | None) -> bool:
        """The ranks have ended, all well or with `error`: ends the actors, or keeps them for the next attempt and says so."""

    def join(self, shared: Any) -> None:
        """Takes what `start_on_driver` returned."""


def find_companion(values: Iterable[Any]) -> Companion | None:
    """The first companion among `values`."""
    return next((value for value in values if isinstance(value, Companion)), None)
