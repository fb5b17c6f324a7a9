"""PolicyBatch: a rollout batch with what the policy loss needs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.batching.transfer import to_device
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
        learnt: (sources, log-probabilities on the device) that `settle` has yet to put into `prox_logprobs`.
    """

    batch: Batch
    advantages: Tensor
    prox_logprobs: Tensor
    recomputed: bool
    keep: Tensor | None = None
    learnt: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def loss_tokens(self, sequences: Sequence[int]) -> Tensor:
        """(T,) bool: tokens of `sequences` that are in the loss."""
        chosen = torch.zeros(self.batch.n_seqs, dtype=torch.bool)
        chosen[list(sequences)] = True
        return self.batch.loss_mask & torch.repeat_interleave(chosen, self.batch.cu_seqlens.diff().long())

    def counts(self, sequences: Sequence[int]) -> Tensor:
        """(2,) float64: the loss tokens of `sequences`, and how many of them have any."""
        lengths = loss_cu_seqlens(self.batch).diff()[list(sequences)]
        return torch.stack([lengths.sum(), (lengths > 0).sum()]).double()

    def learn_prox(self, micro: MicroBatch, logprobs: Tensor) -> Tensor:
        """Keeps what the first minibatch's forward pass tells, which runs under the weights before the updates; returns it."""
        known = logprobs.detach()
        self.learnt.append((micro.sources, known))
        return known

    def settle(self) -> None:
        """Puts what was learnt into `prox_logprobs`; waits for the device, once for all of it."""
        for sources, known in self.learnt:
            self.prox_logprobs[sources] = known.double().cpu()
        self.learnt.clear()

    def tokens(self, micro: MicroBatch, entropy: Tensor, normalizer: float, prox_logprobs: Tensor | None = None) -> LossTokens:
        """What the loss needs about the tokens of `micro`; `prox_logprobs` (M,) where they are known on the device already."""
        device, sources = entropy.device, micro.sources

        def beside(values: Tensor) -> Tensor:
            return to_device(values[sources].to(entropy.dtype), device)

        if prox_logprobs is None and self.recomputed:
            prox_logprobs = beside(self.prox_logprobs)
        return LossTokens(
            behav_logprobs=beside(self.batch.behav_logprobs),
            prox_logprobs=prox_logprobs if self.recomputed else None,
            advantages=beside(self.advantages),
            loss_mask=torch.ones_like(entropy, dtype=torch.bool),
            entropy=entropy,
            versions=to_device(self.batch.versions[sources], device),
            cu_seqlens=to_device(micro.cu_seqlens, device),
            normalizer=normalizer,
            version=self.batch.version,
            keep=None if self.keep is None else to_device(self.keep[sources], device),
        )
