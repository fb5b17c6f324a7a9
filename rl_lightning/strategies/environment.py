"""Which rank a process is, and how Lightning learns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities import rank_zero as fabric_rank_zero
from lightning.pytorch.utilities import rank_zero

Placement = Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]
"""Of ranks: on as few nodes as can be or on one, over as many as can be or each on another."""


@dataclass(frozen=True, slots=True)
class Rank:
    """A worker's number among all, and on its node.

    Attributes:
        index: global rank.
        world_size: number of ranks.
        local: rank on its node.
        node: number of its node.
        address: address of rank 0.
        port: where rank 0 holds the store of the process group.
    """

    index: int
    world_size: int
    local: int = 0
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0


class RayEnvironment(ClusterEnvironment):
    """Tells Lightning which rank this process is.

    Args:
        rank: None on the driver, which counts as rank 0.
    """

    def __init__(self, rank: Rank | None = None) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        """RayLauncher does."""
        return True

    @property
    def main_address(self) -> str:
        """Address of rank 0."""
        return self._rank.address if self._rank else "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Where rank 0 holds the store."""
        return self._rank.port if self._rank else 0

    @staticmethod
    def detect() -> bool:
        """Never by itself."""
        return False

    def world_size(self) -> int:
        """Number of ranks."""
        return self._rank.world_size if self._rank else 1

    def set_world_size(self, size: int) -> None:
        """Fixed."""

    def global_rank(self) -> int:
        """Rank among all."""
        return self._rank.index if self._rank else 0

    def set_global_rank(self, rank: int) -> None:
        """Fixed."""

    def local_rank(self) -> int:
        """Rank on its node."""
        return self._rank.local if self._rank else 0

    def node_rank(self) -> int:
        """Number of its node."""
        return self._rank.node if self._rank else 0


def become_rank(index: int) -> None:
    """Has Lightning's rank-zero functions (logging, warnings) act for this rank."""
    for module in (rank_zero, fabric_rank_zero):
        module.rank_zero_only.rank = index
