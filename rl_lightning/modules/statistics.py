"""StepStatistics: numbers of one training step, reduced over ranks by their counts and never as a mean of means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl_lightning.modules.data_parallel import DataParallel


@dataclass(slots=True)
class StepStatistics:
    """Collects sums, counts, maxima and distributions while a step runs; numbers stay on their device until `reduce`.

    Attributes:
        sums: by name, the sum of values.
        counts: by name, how many values; a name without a count is a plain sum.
        maxima: by name.
        distributions: by name, the values themselves, for histograms.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    distributions: dict[str, Tensor] = field(default_factory=dict)

    def add_sum(self, name: str, value: float | Tensor) -> None:
        """Adds to a total over everything."""
        self.sums[name] = self.sums.get(name, torch.tensor(0.0, dtype=torch.float64)) + _double(value)

    def add_mean(self, name: str, total: float | Tensor, count: float | Tensor) -> None:
        """Adds `count` values whose sum is `total` to the mean called `name`."""
        self.add_sum(name, total)
        self.counts[name] = self.counts.get(name, torch.tensor(0.0, dtype=torch.float64)) + _double(count)

    def add_values(self, name: str, values: Tensor) -> None:
        """Adds each of `values` to the mean called `name`."""
        self.add_mean(name, values.double().sum(), values.numel())

    def add_max(self, name: str, value: float) -> None:
        """Keeps the largest."""
        self.maxima[name] = max(self.maxima.get(name, value), value)

    def add_distribution(self, name: str, values: Tensor) -> None:
        """The mean as `name`, the largest as `name_max`, and the values for a histogram."""
        self.add_values(name, values)
        if values.numel():
            self.add_max(f"{name}_max", float(values.max()))
        self.distributions[name] = values

    def reduce(self, ranks: DataParallel) -> tuple[dict[str, float], dict[str, Tensor]]:
        """All ranks' numbers and distributions; a mean over nothing is left out. A collective."""
        mine = (_floats(self.sums), _floats(self.counts), dict(self.maxima), self.distributions)
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        maxima: dict[str, float] = {}
        parts: dict[str, list[Tensor]] = {}
        for their_sums, their_counts, their_maxima, their_values in ranks.gather(mine):
            for total, theirs in ((sums, their_sums), (counts, their_counts)):
                for name, value in theirs.items():
                    total[name] = total.get(name, 0.0) + value
            for name, value in their_maxima.items():
                maxima[name] = max(maxima.get(name, value), value)
            for name, values in their_values.items():
                parts.setdefault(name, []).append(values)
        means = {name: total / counts.get(name, 1.0) for name, total in sums.items() if counts.get(name, 1.0)}
        return means | maxima, {name: torch.cat(values) for name, values in parts.items()}


def _double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value).detach().double()


def _floats(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Waits for each device once, not once a number."""
    found: dict[str, float] = {}
    for device in {value.device for value in values.values()}:
        names = [name for name, value in values.items() if value.device == device]
        found |= dict(zip(names, torch.stack([values[name] for name in names]).tolist(), strict=True))
    return found
