"""MasterWeights: AdamW in float32 for a model whose weights are half precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


class MasterWeights(AdamW):
    """Updates a float32 copy of each weight, and rounds it into the model after each step.

    Updates are smaller than what bfloat16 tells apart: added to bfloat16 weights most of them are lost.  The copies are the
    optimiser's parameters, their gradients the float32 sum of the micro-batches' gradients, which leave the model's `grad` as
    soon as they are there.

    Args:
        groups: of the model's parameters, as of AdamW.
        **options: of AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        self._weights: list[Tensor] = []
        own = [{**group, "params": [self._copy(weight) for weight in group["params"]]} for group in groups]
        super().__init__(own, **options)
        for weight, master in zip(self._weights, self.masters, strict=True):
            weight.register_post_accumulate_grad_hook(_Collect(master))

    @property
    def masters(self) -> list[Tensor]:
        """The float32 copies."""
        return [master for group in self.param_groups for master in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW update of the copies, and of the weights from them."""
        result = super().step(closure)
        torch._foreach_copy_(self._weights, self.masters)
        return result

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the copies: rounded weights do not tell where they were."""
        return {**super().state_dict(), "masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there; a state without copies (of plain AdamW) leaves those of the present weights."""
        saved = state_dict.get("masters")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        if saved is not None:
            torch._foreach_copy_(self.masters, saved)

    def _copy(self, weight: Tensor) -> Tensor:
        self._weights.append(weight)
        return weight.detach().float().clone().requires_grad_()


class _Collect:
    """Adds a weight's gradient to its copy's."""

    def __init__(self, master: Tensor) -> None:
        self._master = master

    def __call__(self, weight: Tensor) -> None:
        assert weight.grad is not None
        if self._master.grad is None:
            self._master.grad = weight.grad.float()
        else:
            self._master.grad.add_(weight.grad)
        weight.grad = None
