"""Reference: the frozen model that the actor should stay near."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rl_lightning.batching.micro_batch import MicroBatch
from rl_lightning.models.lora import without_lora
from rl_lightning.models.packed_model import load_packed, score_targets
from rl_lightning.models.sharding import piece_of, whole


class Reference:
    """Scores tokens with weights that no gradient reaches. Not a submodule: an optimiser, DDP or a checkpoint has no use for it.

    Args:
        model: a packed language model of its own, or the actor where `without_adapters`.
        without_adapters: `model` is trained by adapters; without them it is the reference, and no second copy is needed.
    """

    def __init__(self, model: Any, *, without_adapters: bool = False) -> None:
        self.model, self.without_adapters = model, without_adapters
        if not without_adapters:
            model.requires_grad_(False)
        self._average: dict[str, Tensor] | None = None

    @torch.no_grad()
    def score(self, micro: MicroBatch, temperature: float) -> Tensor:
        """(M,) log-probabilities of the targets of `micro`."""
        with without_lora(self.model) if self.without_adapters else nullcontext():
            return score_targets(self.model, micro, temperature=temperature)[0]

    @torch.no_grad()
    def follow(self, weights: Iterable[tuple[str, Tensor]], eta: float) -> None:
        """Moves towards `weights`: w += eta (theirs - w).

        Raises:
            ValueError: they are of another model.
        """
        average = self._moving()
        for name, weight in weights:
            if name not in average or average[name].shape != weight.shape:
                raise ValueError(
                    f"ppo.ref_ema_eta={eta} moves ref_path towards path, but {name} differs in shape: leave ref_path at null"
                )
            average[name].lerp_(weight.to(average[name]), eta)
        self._show(average)

    def state_dict(self) -> dict[str, Tensor]:
        """The moving weights, whole. A collective."""
        return {name: whole(weight) for name, weight in self._moving().items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Goes on from there."""
        average = self._moving()
        for name, weight in state_dict.items():
            average[name].copy_(piece_of(weight, average[name]))
        self._show(average)

    def _moving(self) -> dict[str, Tensor]:
        """The weights in float32 at least, where small moves add up; those of float32 models are the model's own."""
        if self._average is None:
            named = ((name, p.detach()) for name, p in self.model.named_parameters())
            self._average = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in named}
        return self._average

    def _show(self, average: Mapping[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != average[name].dtype:
                parameter.copy_(average[name])


def load_reference(module: Any) -> Reference:
    """The reference of an `AsyncPPOModule`, on its device: its actor without adapters where that is the same, else a model."""
    if module.lora is not None and module.ref_path == module.path and module.ppo.ref_ema_eta is None:
        return Reference(module.model, without_adapters=True)
    model, _ = load_packed(module.ref_path, module.dtype_of_weights, sharding=module.sharding)
    return Reference(model if module.sharding is not None else model.to(module.device))
