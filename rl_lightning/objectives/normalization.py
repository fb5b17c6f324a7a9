"""RunningNorm: the running mean and spread of the critic's returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RunningNorm(torch.nn.Module):
    """Exponential running mean and spread, so that a critic learns numbers of about unit size (arXiv 1602.07714).

        m_k = beta m_{k-1} + (1 - beta) mean(x)      mean   = m_k / (1 - beta^k)
        s_k = beta s_{k-1} + (1 - beta) mean(x^2)    spread = sqrt(max(s_k / (1 - beta^k) - mean^2, variance_floor))

    The numbers are float64 buffers: they are saved with the module, move between devices with it, and keep their type
    when the rest of a model is cast. All ranks hold the same ones if all give `update` the same sums.

    Args:
        beta: how much of the past an update keeps.
        variance_floor: least variance.

    Raises:
        ValueError: beta outside [0, 1), or a floor that is not positive.
    """

    first_moment: Tensor
    second_moment: Tensor
    debias: Tensor

    def __init__(self, beta: float = 0.99995, variance_floor: float = 1e-2) -> None:
        if not 0 <= beta < 1 or variance_floor <= 0:
            raise ValueError(f"need 0 <= beta < 1 and variance_floor > 0, got beta={beta} and variance_floor={variance_floor}")
        super().__init__()
        self.beta, self.variance_floor = beta, variance_floor
        for name in ("first_moment", "second_moment", "debias"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, total: Tensor | float, square_total: Tensor | float, count: Tensor | float) -> None:
        """Takes in `count` values, over all ranks, by their sum and the sum of their squares; no values change nothing."""
        if count <= 0:
            return
        news = ((self.first_moment, total / count), (self.second_moment, square_total / count), (self.debias, 1.0))
        for buffer, value in news:
            buffer.mul_(self.beta).add_((1 - self.beta) * value)

    def normalize(self, x: Tensor) -> Tensor:
        """(x - mean) / spread in the type of `x`; `x` itself before the first update."""
        mean, spread = self._mean_and_spread(x)
        return ((x.double() - mean) / spread).to(x.dtype)

    def denormalize(self, x: Tensor) -> Tensor:
        """x * spread + mean in the type of `x`; `x` itself before the first update."""
        mean, spread = self._mean_and_spread(x)
        return (x.double() * spread + mean).to(x.dtype)

    def _mean_and_spread(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """On the device of `x`: 0 and 1 as long as nothing is known. `debias` is 1 - beta^k."""
        known = self.debias > 0
        share = torch.where(known, self.debias, 1.0)
        mean = self.first_moment / share
        variance = (self.second_moment / share - mean.square()).clamp(min=self.variance_floor)
        spread = torch.where(known, variance.sqrt(), 1.0)
        return mean.to(x.device), spread.to(x.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `cuda`, `bfloat16` and their like do, less the change of type: beta would round to 1 in bfloat16."""
        return super()._apply(lambda buffer: buffer.to(fn(buffer).device), recurse)
