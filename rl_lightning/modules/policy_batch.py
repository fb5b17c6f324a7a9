"""PolicyBatch: a rollout batch with what the policy loss needs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.modules.scored_batch import loss_cu_seqlens
from rl_lightning.types import Batch


@dataclass(frozen=True, slots=True)
class LossTokens:
    """The M tokens of a micro-batch that the loss is about, on the model's device.

    Attributes:
        behav_logprobs: (M,) as the engine reported them.
        prox_logprobs: (M,) under the weights before this batch's updates; None where they are not recomputed.
        advantages: (M,) of `compute_advantages`.
        loss_mask: (M,) bool, all true: tokens off the mask are not even scored. There for losses that want a mask.
        entropy: (M,) in nats, without gradient.
        versions: (M,) int32, of the weights that sampled each token.
        cu_seqlens: (S + 1,) int64, where the tokens of each answer start.
        normalizer: of the whole minibatch, all ranks and micro-batches: its loss tokens, or what the aggregation counts instead;
            divide sums by it.
        version: of the weights before this batch's updates.
        keep: (M,) bool, tokens that the correction m2po lets into the loss; None with any other.
    """

    behav_logprobs: Tensor
    prox_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    entropy: Tensor
    versions: Tensor
    cu_seqlens: Tensor
    normalizer: float
    version: int = 0
    keep: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """One rank's batch of a step.

    Attributes:
        batch: T tokens of S sequences, on the CPU.
        advantages: (T,) float32.
        prox_logprobs: (T,) float64 under the weights before this batch's updates, NaN where they are not known (yet).
        recomputed: whether the loss may use `prox_logprobs`.
        keep: (T,) bool, tokens that m2po lets into the loss, filled in minibatch by minibatch; None with other corrections.
    """

    batch: Batch
    advantages: Tensor
    prox_logprobs: Tensor
    recomputed: bool
    keep: Tensor | None = None

    def loss_tokens(self, sequences: Sequence[int]) -> Tensor:
        """(T,) bool: tokens of `sequences` that are in the loss."""
        chosen = torch.zeros(self.batch.n_seqs, dtype=torch.bool)
        chosen[list(sequences)] = True
        return self.batch.loss_mask & torch.repeat_interleave(chosen, self.batch.cu_seqlens.diff().long())

    def counts(self, sequences: Sequence[int]) -> Tensor:
        """(2,) float64: the loss tokens of `sequences`, and how many of them have any."""
        lengths = loss_cu_seqlens(self.batch).diff()[list(sequences)]
        return torch.stack([lengths.sum(), (lengths > 0).sum()]).double()

    def learn_prox(self, micro: MicroBatch, logprobs: Tensor) -> None:
        """Keeps what the first minibatch's forward pass tells: it runs under the weights before the updates."""
        self.prox_logprobs[micro.sources] = logprobs.detach().double().cpu()

    def tokens(self, micro: MicroBatch, entropy: Tensor, normalizer: float) -> LossTokens:
        """What the loss needs about the tokens of `micro`."""
        like = entropy
        return LossTokens(
            behav_logprobs=self.batch.behav_logprobs[micro.sources].to(like),
            prox_logprobs=self.prox_logprobs[micro.sources].to(like) if self.recomputed else None,
            advantages=self.advantages[micro.sources].to(like),
            loss_mask=torch.ones_like(like, dtype=torch.bool),
            entropy=entropy,
            versions=self.batch.versions[micro.sources].to(like.device),
            cu_seqlens=micro.cu_seqlens.to(like.device),
            normalizer=normalizer,
            version=self.batch.version,
            keep=None if self.keep is None else self.keep[micro.sources].to(like.device),
        )
