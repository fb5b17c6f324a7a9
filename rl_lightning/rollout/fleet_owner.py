"""FleetOwner: a data module with engines; whose they are, and how long they live."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from rl_lightning.failure import find_cause, may_be_mended_by_restart
from rl_lightning.rollout.errors import RolloutError

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from ray.util.placement_group import PlacementGroup

    from rl_lightning.rollout.fleet import Check, RolloutFleet
    from rl_lightning.strategies.demand import Demand

logger = logging.getLogger(__name__)

STOP_S = 10.0
STOP_AFTER_FAILURE_S = 3.0


class FleetOwner(LightningDataModule, ABC):
    """Starts a fleet when training begins and ends it with the run.

    Where a RayStrategy trains it is a `Companion`: the fleet belongs to the driver and outlives the ranks, so that the next
    attempt after a failure finds its engines up. With any other strategy there is one trainer process, which owns the fleet.

    Args:
        ray_init: arguments of `ray.init`, for a trainer whose strategy does not bring a Ray cluster.

    Attributes:
        fleet: controller and workers; None before they start and after they ended.
        keeps_fleet: whether the driver of a RayStrategy keeps them when the trainer fails, for `adopt`.
    """

    def __init__(self, ray_init: dict[str, Any] | None) -> None:
        super().__init__()
        self.ray_init = ray_init
        self.fleet: RolloutFleet | None = None
        self.keeps_fleet = False
        self._connected = False

    # -- of the subclass

    @abstractmethod
    def check_run(self, stage: str) -> None:
        """Finds what can be wrong with the data, before an engine starts; `stage` is `fit` or another of Lightning's."""

    @abstractmethod
    def demand(self) -> Demand:
        """See `Companion`: what the fleet asks of the cluster."""

    @abstractmethod
    def launch(self, check: Check, places: PlacementGroup | None = None) -> RolloutFleet:
        """Starts a fleet in the cluster that this process has joined; waits for its controller, not for its engines.

        `places`: see `Companion.start_on_driver`.
        """

    # -- LightningDataModule

    def setup(self, stage: str) -> None:
        """Starts controller and workers, unless the driver has; they load while the trainer builds its model.

        Raises:
            ValueError: several ranks that no RayStrategy started: they are in no Ray cluster.
        """
        assert self.trainer is not None
        if self.fleet is None:
            if self.trainer.world_size > 1:
                raise ValueError(
                    f"{self.trainer.world_size} trainer ranks with engines need trainer.strategy=ray or ray_model_parallel "
                    f"(it is {type(self.trainer.strategy).__name__}); or set trainer.devices=1"
                )
            self.check_run(stage)
            self.fleet = self._connect_and_launch(lambda: None)
        self.fleet.restores = self.trainer.is_global_zero

    def teardown(self, stage: str) -> None:
        """Ends engines, rewards and actors."""
        if self.fleet is not None:
            from rl_lightning.strategies.cluster import disconnect

            self.fleet.stop()
            self.fleet = None
            if self._connected:
                disconnect()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches stay on the CPU, where they are packed: micro-batches go to the device when their turn comes."""
        return batch

    def on_exception(self, exception: BaseException) -> None:
        """A failed run leaves no engine behind."""
        self.teardown("exception")

    # -- Companion

    def check_on_driver(self, trainer: Trainer) -> None:
        """Reads all prompts, which the ranks get with their copy, and refuses what is wrong."""
        self.trainer = trainer
        self.check_run("fit" if trainer.state.fn == TrainerFn.FITTING else "")

    def start_on_driver(self, check: Check, places: PlacementGroup | None = None) -> RolloutFleet:
        """Starts controller and workers, or has those of an earlier attempt begin anew."""
        if self.fleet is not None:
            try:
                self.fleet.begin(check)
                logger.info("the engines of the attempt before are kept")
            except RolloutError as error:
                logger.warning("the engines are started again: %s", error)
                self.fleet.stop()
                self.fleet = None
        self.fleet = self.fleet or self._connect_and_launch(check, places)
        return self.fleet

    def end_on_driver(self, error: BaseException | None) -> bool:
        """Ends the engines, unless the trainer alone failed and another attempt is to come."""
        if self.fleet is None:
            return False
        if error is not None and self.keeps_fleet and _may_keep_fleet(error):
            return True
        self.fleet.stop(STOP_S if error is None else STOP_AFTER_FAILURE_S)
        self.fleet = None
        return False

    def join(self, shared: RolloutFleet) -> None:
        """This rank's way to the engines."""
        self.fleet = shared

    def adopt(self, before: FleetOwner) -> None:
        """Takes the engines that the data module of a failed attempt has kept."""
        self.fleet, before.fleet = before.fleet, None

    # -- inside

    def _connect_and_launch(self, check: Check, places: PlacementGroup | None = None) -> RolloutFleet:
        import ray

        from rl_lightning.strategies.cluster import connect

        self._connected = not ray.is_initialized()
        connect(self.ray_init)
        return self.launch(check, places)


def _may_keep_fleet(error: BaseException) -> bool:
    """Whether nothing of the fleet's own is wrong."""
    return isinstance(error, Exception) and may_be_mended_by_restart(error) and find_cause(error, (RolloutError,)) is None
