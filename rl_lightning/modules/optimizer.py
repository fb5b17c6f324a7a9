"""OptimizerConfig: AdamW, its schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rl_lightning.models.sharding import by_mesh, is_sharded, whole
from rl_lightning.modules.master_weights import MasterWeights


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated.

    Attributes:
        lr: learning rate after the warm-up.
        schedule: what follows the warm-up.
        warmup_steps_proportion: share of all training steps in which the rate rises linearly.
        min_lr_ratio: the rate at the end, as a share of `lr`; for linear and cosine.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: on matrices; vectors (norms, biases) are not decayed.
        gradient_clipping: largest norm of the gradient over all parameters; 0 for none.
        master_weights: keep float32 copies of half-precision weights, and update those; of no effect on float32 weights, nor on
            sharded ones, whose own way to the same is `trainer.precision=bf16-mixed`.
    """

    lr: float = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps_proportion: float = 0.001
    min_lr_ratio: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.05
    gradient_clipping: float = 1.0
    master_weights: bool = True

    def __post_init__(self) -> None:
        if self.lr < 0 or self.gradient_clipping < 0:
            raise ValueError(f"need lr >= 0 and gradient_clipping >= 0, got {self.lr} and {self.gradient_clipping}")
        if not 0 <= self.warmup_steps_proportion <= 1 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                f"warmup_steps_proportion={self.warmup_steps_proportion}, min_lr_ratio={self.min_lr_ratio} must lie in [0, 1]"
            )
        if self.min_lr_ratio and self.schedule == "constant":
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} needs schedule linear or cosine, but schedule is constant")

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over the parameters of `model` that are trained, fused where the device can."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in trained)
        are_half = any(p.dtype in (torch.float16, torch.bfloat16) and not is_sharded(p) for p in trained)
        kind = MasterWeights if self.master_weights and are_half else AdamW
        return kind([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)

    def make_scheduler(self, optimizer: Optimizer, total_steps: float) -> LambdaLR:
        """The schedule over `total_steps` training steps (infinite if unknown); stepped once after each."""
        return LambdaLR(optimizer, lambda step: self.lr_factor(step, total_steps))

    def lr_factor(self, step: int, total_steps: float) -> float:
        """The rate of the step after `step` finished ones, as a share of `lr`."""
        warmup = int(self.warmup_steps_proportion * total_steps) if math.isfinite(total_steps) else 0
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "constant" or not math.isfinite(total_steps):
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        shape = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * shape


def trained_by(optimizer: Optimizer) -> list[Tensor]:
    """What `optimizer` updates, where its gradients are: the model's parameters, or their float32 copies."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scales the gradients in place so that their joint norm is at most `max_norm` (0: no limit); returns the norm before."""
    grads = by_mesh(p.grad for p in parameters if p.grad is not None)
    norms = [whole(nn.utils.get_total_norm(group)) for group in grads]
    norm = float(nn.utils.get_total_norm(norms))
    if 0 < max_norm < norm < math.inf:
        for group in grads:
            torch._foreach_mul_(group, max_norm / (norm + 1e-6))
    return norm
