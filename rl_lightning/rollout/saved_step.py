"""SavedStep: what one rank's training step starts from, beside the checkpoint, in a file that holds data and no code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from rl_lightning.types import Batch, Completion, Prompt, Rollout, RolloutGroup, SamplingParams


@dataclass(frozen=True, slots=True)
class SavedStep:
    """A batch and its place in the run.

    Attributes:
        batch: on the CPU.
        batch_idx: steps of the epoch before this one.
        n_batches: steps of the epoch; infinite if unknown.
        generation: how the answers were sampled; None where nothing was.
    """

    batch: Batch
    batch_idx: int
    n_batches: float
    generation: SamplingParams | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes tensors and plain Python values; whatever else a prompt refers to is written as text."""
        batch = {f.name: getattr(self.batch, f.name) for f in fields(Batch)}
        plain = {
            "batch": {**batch, "groups": [_plain_group(group) for group in self.batch.groups]},
            "batch_idx": self.batch_idx,
            "n_batches": float(self.n_batches),
            "generation": None if self.generation is None else asdict(self.generation),
        }
        torch.save(plain, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SavedStep:
        """What `save` wrote."""
        plain = torch.load(path, map_location="cpu", weights_only=True)
        groups = tuple(_group(group) for group in plain["batch"]["groups"])
        generation = plain["generation"]
        return cls(
            Batch(**{**plain["batch"], "groups": groups}),
            plain["batch_idx"],
            plain["n_batches"],
            None if generation is None else SamplingParams(**generation),
        )


def merge(batches: Sequence[Batch]) -> Batch:
    """The sequences of all ranks' batches as one batch, in the order of ranks."""
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])
    tensors = [f.name for f in fields(Batch) if isinstance(getattr(batches[0], f.name), torch.Tensor) and f.name != "cu_seqlens"]
    joined: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in tensors}
    groups = tuple(group for batch in batches for group in batch.groups)
    return replace(batches[0], **joined, cu_seqlens=cu_seqlens, groups=groups, wait_s=max(b.wait_s for b in batches))


def _plain_group(group: RolloutGroup) -> dict[str, Any]:
    prompt = {**_fields(group.prompt), "reference": json.loads(json.dumps(dict(group.prompt.reference), default=str))}
    return {**_fields(group), "prompt": prompt, "rollouts": [_plain_rollout(rollout) for rollout in group.rollouts]}


def _plain_rollout(rollout: Rollout) -> dict[str, Any]:
    return {
        **_fields(rollout),
        "completion": {name: _tensor(value) for name, value in _fields(rollout.completion).items()},
        "reward": float(rollout.reward),
        "reward_parts": {name: float(score) for name, score in rollout.reward_parts.items()},
        "loss_mask": _tensor(rollout.loss_mask),
    }


def _group(plain: Mapping[str, Any]) -> RolloutGroup:
    rollouts = tuple(_rollout(rollout) for rollout in plain["rollouts"])
    return RolloutGroup(**{**plain, "prompt": Prompt(**plain["prompt"]), "rollouts": rollouts})


def _rollout(plain: Mapping[str, Any]) -> Rollout:
    completion = Completion(**{name: _array(value) for name, value in plain["completion"].items()})
    return Rollout(**{**plain, "completion": completion, "loss_mask": _array(plain["loss_mask"])})


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in fields(value)}


def _tensor(value: Any) -> Any:
    """A copy: arrays from the object store are read-only."""
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value
