"""The nouns of the loop. Every module speaks in these, and in no synonym of them.

Data flows `Prompt -> Lease -> Completion -> Rollout -> RolloutGroup -> Batch`; a `version` is always the number of
finished training steps whose weights made a token.  Nothing here imports torch, Ray or an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NewType

import numpy as np

if TYPE_CHECKING:
    import torch

WeightVersion = NewType("WeightVersion", int)
"""Number of finished training steps. Version 0 is the model that training started from."""

FinishReason = Literal["stop", "length"]
"""Why an answer ended: by itself, or because it reached `max_new_tokens`. An interruption is never one."""


@dataclass(frozen=True)  # without slots: the command line reads a default instance's __dict__
class SamplingParams:
    """How one answer is sampled. Every field is sent to the engine.

    Attributes:
        max_new_tokens: most tokens of one answer, over all its segments together.
        min_new_tokens: fewest tokens of one answer; no stop ends it earlier.
        temperature: softmax temperature, above 0. Log-probabilities are those of the scaled distribution.
        top_p: nucleus mass in (0, 1]. Below 1 the reported log-probabilities are not renormalised.
        top_k: number of candidate tokens, -1 for all.
        greedy: take the most likely token; temperature, top_p and top_k then have no effect.
        stop: texts that end an answer.
        stop_token_ids: tokens that end an answer, beside the model's own end-of-sequence token.
    """

    max_new_tokens: int = 27648
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    greedy: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.min_new_tokens <= self.max_new_tokens or self.max_new_tokens < 1:
            raise ValueError(
                f"need 0 <= min_new_tokens <= max_new_tokens and max_new_tokens >= 1, got min_new_tokens={self.min_new_tokens} "
                f"and max_new_tokens={self.max_new_tokens}"
            )
        if not self.greedy and self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; for the most likely token set greedy=true")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.top_k != -1 and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be positive, or -1 for all tokens")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, tokenised once.

    Attributes:
        query_id: the data's own name for it.
        text: the final text that `token_ids` encode.
        token_ids: what the engine is given.
        task: kind of question (`math`, `code`, `stem`, or a gym task's name); statistics are split by it.
        reference: what rewards compare with (`solutions`, `input_output`, `answer`, ...).
    """

    query_id: str
    text: str
    token_ids: tuple[int, ...]
    task: str = "math"
    reference: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer asked of an engine. `seed` makes it reproducible where the engine can seed single requests."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer's tokens.

    Attributes:
        token_ids: (n,) int32, including the token that ended it.
        logprobs: (n,) float32, log-probability of each token under the weights that sampled it, temperature applied.
        versions: (n,) int32, the weights' version for each token; never decreasing.
        finish_reason: `stop` or `length`.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: FinishReason

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One scored answer.

    Attributes:
        completion: tokens, log-probabilities, versions.
        text: the answer decoded, for people and rewards; never encoded again.
        reward: weighted sum of the rewards, before scaling.
        reward_parts: score by reward name.
        loss_mask: (n,) bool, true where the policy produced the token (false for tool or environment output).
        reward_failure: why a reward could not be computed (`timeout`, `error`, `memory`), else None.
    """

    completion: Completion
    text: str
    reward: float
    reward_parts: Mapping[str, float]
    loss_mask: np.ndarray
    reward_failure: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """Right and duty to answer one prompt `group_size` times.

    Attributes:
        index: position of the prompt in the run's endless stream; the group's name everywhere.
        prompt: the question.
        group_size: number of answers.
        params: how they are sampled.
        seed: the run's seed; an answer's own seed follows from (seed, index, sample).
        submission: counts all leases of the run: tells a late answer to an earlier lease from the one asked for.
        evaluation: the answers are for validation, not for training.
    """

    index: int
    prompt: Prompt
    group_size: int
    params: SamplingParams
    seed: int = 0
    submission: int = 0
    evaluation: bool = False


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All answers to one prompt, the unit of admission, buffering and checkpointing."""

    index: int
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    worker: str = ""
    seconds: float = 0.0

    @property
    def n_tokens(self) -> int:
        """Prompt and answer tokens of all sequences."""
        return sum(len(self.prompt.token_ids) + len(r.completion) for r in self.rollouts)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank trains on in one step: sequences end to end, no padding.

    S sequences (prompt + answer) of T tokens together; groups are never split over ranks.

    Attributes:
        token_ids: (T,) int64.
        cu_seqlens: (S + 1,) int32, where each sequence starts.
        prompt_lens: (S,) int32.
        group_ids: (S,) int64, equal for answers to one prompt (the group's index).
        loss_mask: (T,) bool, true on the answer tokens that the policy produced.
        behav_logprobs: (T,) float32 as the engine reported them, 0 off the answer.
        versions: (T,) int32, -1 off the answer.
        rewards: (S,) float32, raw.
        truncated: (S,) bool, the engine's finish reason was `length`.
        groups: the rollouts that the tensors came from, for logs; empty in supervised batches.
        version: the trainer's version when the batch was taken.
        wait_s: seconds that this rank waited for it.
    """

    token_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    prompt_lens: torch.Tensor
    group_ids: torch.Tensor
    loss_mask: torch.Tensor
    behav_logprobs: torch.Tensor
    versions: torch.Tensor
    rewards: torch.Tensor
    truncated: torch.Tensor
    groups: tuple[RolloutGroup, ...] = ()
    version: int = 0
    wait_s: float = 0.0

    @property
    def n_seqs(self) -> int:
        """Number of sequences S."""
        return len(self.prompt_lens)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device) if hasattr(v, "to") else v for k, v in values.items()})
