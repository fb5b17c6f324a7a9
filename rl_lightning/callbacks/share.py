"""Which share of a step's batch a trainer rank has, for files that hold what each trained on."""

from __future__ import annotations

from typing import Any


def share_number(trainer: Any) -> int | None:
    """This rank's share among those of the data-parallel ranks; None where another rank has it too and keeps it.

    Tensor-parallel ranks train on the same answers.
    """
    mesh = getattr(trainer.lightning_module, "device_mesh", None)
    if mesh is None:
        return int(trainer.global_rank)
    return int(mesh["data_parallel"].get_local_rank()) if mesh["tensor_parallel"].get_local_rank() == 0 else None


def tensor_size(pl_module: Any) -> int:
    """How many ranks share each of the module's layers."""
    mesh = getattr(pl_module, "device_mesh", None)
    return 1 if mesh is None else int(mesh["tensor_parallel"].size())
