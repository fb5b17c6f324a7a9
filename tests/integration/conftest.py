"""One small Ray cluster for all integration tests of a session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # other processes' memory must not end our actors


def small_cluster(folder: str, num_cpus: int = 8) -> dict[str, Any]:
    """`ray_init` of a cluster that takes little memory. `folder` must be short: sockets live in it."""
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "object_store_memory": 100 * 2**20,
        "_temp_dir": folder,
    }


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Connects the test process; RayStrategy and RolloutDataModule then use this cluster. Gives its address."""
    import ray

    from rl_lightning.strategies import cluster

    folder = tempfile.mkdtemp(prefix="rl", dir="/tmp")
    cluster.connect(small_cluster(folder))
    yield ray.get_runtime_context().gcs_address
    cluster.disconnect()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with a character tokenizer, as a Hugging Face folder."""
    from rl_lightning.models.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, layers=2, hidden=64)
    return folder
