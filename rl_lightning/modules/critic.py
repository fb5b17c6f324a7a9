"""Critic: estimates what an answer will still earn, and learns it from what it earned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.value_model import ValueModel
from rl_lightning.modules.data_parallel import DataParallel
from rl_lightning.modules.statistics import StepStatistics
from rl_lightning.objectives.normalization import RunningNorm
from rl_lightning.objectives.value import value_loss


@dataclass(frozen=True, slots=True)
class ValueTargets:
    """What the critic learns in one step, on the scale of its output.

    Attributes:
        old_values: (T,) float64, what it said before this batch's updates.
        returns: (T,) float64, what it should have said.
    """

    old_values: Tensor
    returns: Tensor


class Critic(nn.Module):
    """A value model whose output is normalised, so that it learns numbers of about unit size whatever the rewards.

    Args:
        model: gives one number a token.
        value_norm: normalise by the running mean and spread of returns; false: its output are the values.
        value_eps_clip: how far its output may move in one step.
    """

    def __init__(self, model: ValueModel, *, value_norm: bool, value_eps_clip: float) -> None:
        super().__init__()
        self.model, self.value_eps_clip = model, value_eps_clip
        self.norm = RunningNorm() if value_norm else None

    def forward(self, micro: MicroBatch) -> Tensor:
        """(M,) output for the states in which the targets of `micro` were chosen."""
        return self.model(micro)

    def values(self, output: Tensor) -> Tensor:
        """`output` on the scale of rewards."""
        return output if self.norm is None else self.norm.denormalize(output)

    def targets(self, values: Tensor, returns: Tensor, loss_mask: Tensor, ranks: DataParallel) -> ValueTargets:
        """Takes this step's returns into the norm. A collective, once a step.

        Args:
            values: (T,) float64 of `values`, before this batch's updates.
            returns: (T,) float64.
            loss_mask: (T,) bool.
            ranks: those that train on this batch.
        """
        if self.norm is None:
            return ValueTargets(values, returns)
        old_values, chosen = self.norm.normalize(values), returns[loss_mask]
        sums = torch.stack([chosen.sum(), chosen.square().sum(), loss_mask.sum().double()])
        total, square_total, count = ranks.sum(sums, self.norm.debias.device).tolist()
        if math.isfinite(square_total):  # a broken number would stay in the norm for ever
            self.norm.update(total, square_total, count)
        return ValueTargets(old_values, self.norm.normalize(returns))

    def loss(
        self, output: Tensor, micro: MicroBatch, targets: ValueTargets, normalizer: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of one micro-batch in the loss of its minibatch, and (M,) statistics; see `value_loss`."""
        return value_loss(
            output,
            targets.old_values[micro.sources].to(output),
            targets.returns[micro.sources].to(output),
            torch.ones_like(output, dtype=torch.bool),
            value_eps_clip=self.value_eps_clip,
            normalizer=normalizer,
        )


def add_value_statistics(statistics: StepStatistics, values: Tensor, returns: Tensor) -> None:
    """What `explained_variance` needs about the (N,) values and returns of a step's loss tokens, and their means."""
    statistics.add_values("values", values)
    statistics.add_values("returns", returns)
    statistics.add_values("return_square", returns.square())
    statistics.add_values("surprise_square", (returns - values).square())


def add_explained_variance(reduced: dict[str, float]) -> None:
    """Adds 1 - Var(returns - values) / Var(returns) over all ranks to a step's statistics, unless returns do not vary.

    Args:
        reduced: what it is computed from, and of no further use, is taken out.
    """
    if "returns" not in reduced:
        return
    mean_surprise = reduced["returns"] - reduced["values"]
    variance = reduced.pop("return_square") - reduced["returns"] ** 2
    unexplained = reduced.pop("surprise_square") - mean_surprise**2
    if variance > 1e-12:
        reduced["explained_variance"] = 1 - unexplained / variance
