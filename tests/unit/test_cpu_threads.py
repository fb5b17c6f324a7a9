"""How many threads a trainer beside a GPU leaves to the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rl_lightning.modules.cpu_threads import MOST_THREADS, limit_cpu_threads


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("before", "after"), [(64, MOST_THREADS), (2, 2)])
def test_many_threads_become_few(monkeypatch: pytest.MonkeyPatch, before: int, after: int) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(before)
    limit_cpu_threads()
    assert torch.get_num_threads() == after


def test_a_number_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    torch.set_num_threads(12)
    limit_cpu_threads()
    assert torch.get_num_threads() == 12
