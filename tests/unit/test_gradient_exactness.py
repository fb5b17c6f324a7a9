"""One minibatch has one gradient: for 1, 2 and 7 micro-batches, packed and padded, whatever the objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from training_samples import Alone, make_batch, padded_logprobs, write_model

from rl_lightning.batching.micro_batch import MicroBatch, pack_micro_batches
from rl_lightning.modules.policy_batch import PolicyBatch
from rl_lightning.modules.ppo_config import PPOConfig
from rl_lightning.modules.statistics import StepStatistics
from rl_lightning.objectives.aggregation import Aggregation
from rl_lightning.objectives.corrections import Correction
from rl_lightning.objectives.policy import Surrogate
from rl_lightning.types import Batch

CORRECTIONS: dict[str, dict[str, Any]] = {
    "plain": {"use_decoupled_loss": False},
    "decoupled": {"behav_imp_weight_cap": 1.2},
    "tis": {"correction": "tis", "behav_imp_weight_cap": 1.2},
    "icepop": {"correction": "icepop", "behav_imp_weight_cap": 1.2, "behav_imp_weight_floor": 0.85},
    "sequence-mask": {"correction": "sequence-mask", "behav_imp_weight_cap": 1.2, "behav_imp_weight_floor": 0.9},
    "m2po": {"correction": "m2po", "m2_threshold": 0.1},
}
COMBINATIONS = list(product(get_args(Surrogate), CORRECTIONS, get_args(Aggregation)))


class Bare(Alone):
    """Trains on one minibatch without a Trainer: what `update` would do before the optimiser's step."""

    def update(self, micro_batches: Iterator[MicroBatch], loss: Any, admit: Any = None, *, of: int = 0) -> None:
        self.zero_grad()
        self.n_micro_batches = 0
        for micro in micro_batches:
            loss(micro).backward()
            self.n_micro_batches += 1

    def gradient(self, policy: PolicyBatch) -> Tensor:
        """All parameters' gradients end to end."""
        statistics = StepStatistics()
        self._train_minibatch(policy, range(policy.batch.n_seqs), statistics, is_first=False)
        self.dropped = float(statistics.sums.get("behave_cap_ratio", torch.tensor(0.0)))
        self.clipped = float(statistics.sums["actor_clip_ratio"])
        return flat([p.grad for p in self.model.parameters()])


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients])


class Setting:
    """A model, and a batch whose log-probabilities lie around those of the model, some of them out of every bound."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.module = Bare(folder, ppo=PPOConfig(n_minibatches=1), dtype=dtype, share_prompts=False)  # type: ignore[arg-type]
        self.module.configure_model()
        batch = make_batch(seed=21, prompt_lens=(2, 5), answer_lens=(1, 8))
        self.n = padded_logprobs(self.module.model, batch)
        generator = torch.Generator().manual_seed(1)
        now = self.n.detach().double().nan_to_num()
        prox, behav = (now + sigma * torch.randn(len(now), generator=generator).double() for sigma in (0.4, 0.5))
        self.batch: Batch = replace(batch, behav_logprobs=behav.float())
        self.prox = prox
        self.advantages = torch.randn(len(now), generator=generator)
        self.limits = {count: self._limit(count) for count in (1, 2, 7)}

    def _limit(self, count: int) -> int:
        """The tokens of a micro-batch with which there are `count` of them."""
        everything, lengths = range(self.batch.n_seqs), self.batch.cu_seqlens.diff()
        limits = range(int(lengths.max()), int(lengths.sum()) + 1)
        return next(limit for limit in limits if len(pack_micro_batches(self.batch, everything, limit)) == count)

    def gradients(self, ppo: PPOConfig) -> dict[int, Tensor]:
        self.module.ppo, self.module.max_new_tokens = ppo, 9
        gradients = {}
        for count, limit in self.limits.items():
            self.module.max_tokens_per_mb = limit
            keep = torch.zeros_like(self.batch.loss_mask) if ppo.correction == "m2po" else None
            gradients[count] = self.module.gradient(PolicyBatch(self.batch, self.advantages, self.prox, True, keep))
            assert self.module.n_micro_batches == count
        return gradients


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setting]:
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    folder = write_model(tmp_path_factory.mktemp("model"), **shape)
    return {dtype: Setting(folder, dtype) for dtype in ("float32", "float64")}


def slow_loss(setting: Setting, n: Tensor, ppo: PPOConfig) -> Tensor:
    """The objective answer by answer and token by token, from the formulas."""
    batch, starts = setting.batch, setting.batch.cu_seqlens.tolist()
    answers = [[t for t in range(a, b) if batch.loss_mask[t]] for a, b in zip(starts, starts[1:], strict=False)]
    o, p, a = (x.double().tolist() for x in (batch.behav_logprobs, setting.prox, setting.advantages))
    now = n.unbind()
    kept = slow_m2_keep(answers, o, p, ppo.m2_threshold)
    total, n_tokens = n.new_zeros(()), sum(len(answer) for answer in answers)
    for answer in answers:
        base = p if ppo.use_decoupled_loss else o
        mean_log_ratio = sum(now[t] - base[t] for t in answer) / len(answer)
        mean_advantage = sum(a[t] for t in answer) / len(answer)
        mean_weight = math.exp(sum(p[t] - o[t] for t in answer) / len(answer))
        terms = []
        for t in answer:
            ratio, advantage = (now[t] - base[t]).exp(), a[t]
            if ppo.surrogate == "gspo":
                ratio, advantage = mean_log_ratio.exp(), mean_advantage
            clipped = ratio.clamp(0.8, 1.2)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped)
            if ppo.surrogate == "cispo":
                loss = -clipped.detach() * advantage * now[t]
            terms.append(loss * slow_weight(math.exp(p[t] - o[t]), mean_weight, t in kept, ppo))
        total = total + sum(terms) / (len(answer) if ppo.aggregation == "sequence-mean-token-mean" else 1)
    divisors = {"token-mean": n_tokens, "token-sum-norm": 9 * len(answers)}
    return total / divisors.get(ppo.aggregation, len(answers))


def slow_weight(w: float, mean: float, is_kept: bool, ppo: PPOConfig) -> float:
    if not ppo.use_decoupled_loss:
        return 1.0
    cap, floor = ppo.behav_imp_weight_cap or math.inf, ppo.behav_imp_weight_floor or 0.0
    return {
        "decoupled": w if w <= cap else 0.0,
        "tis": min(w, cap),
        "icepop": w if floor <= w <= cap else 0.0,
        "sequence-mask": w if floor <= mean <= cap else 0.0,
        "m2po": w if is_kept else 0.0,
    }[ppo.correction]


def slow_m2_keep(answers: list[list[int]], o: list[float], p: list[float], threshold: float) -> set[int]:
    tokens = sorted((t for answer in answers for t in answer), key=lambda t: (o[t] - p[t]) ** 2)
    while tokens and sum((o[t] - p[t]) ** 2 for t in tokens) / len(tokens) > threshold:
        tokens.pop()
    return set(tokens)


@pytest.mark.parametrize(("surrogate", "correction", "aggregation"), COMBINATIONS)
def test_one_gradient_however_it_is_computed(
    settings: dict[str, Setting], surrogate: Any, correction: str, aggregation: Any
) -> None:
    ppo = PPOConfig(n_minibatches=1, surrogate=surrogate, aggregation=aggregation, **CORRECTIONS[correction])
    setting = settings["float64"]
    exact = setting.gradients(ppo)
    n = setting.n.detach().requires_grad_()
    (weights,) = torch.autograd.grad(slow_loss(setting, n, ppo), n)
    mask, parameters = setting.batch.loss_mask, list(setting.module.model.parameters())
    slow = flat(torch.autograd.grad(setting.n[mask], parameters, weights[mask], retain_graph=True))
    scale = float(slow.abs().max())
    for gradient in exact.values():
        torch.testing.assert_close(gradient, slow, rtol=1e-9, atol=1e-9 * scale)
    for gradient in settings["float32"].gradients(ppo).values():
        torch.testing.assert_close(gradient.double(), exact[1], rtol=1e-5, atol=1e-5 * scale)
    n_tokens = int(mask.sum())
    assert 0 < setting.module.clipped < n_tokens
    assert (0 < setting.module.dropped < n_tokens) == (correction not in ("plain", "tis"))


def test_every_correction_is_here() -> None:
    assert set(CORRECTIONS) == {"plain", *get_args(Correction)}
