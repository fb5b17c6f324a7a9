"""Sharding: how one model lies on many ranks, FSDP2 over the data-parallel ones and tensor parallelism inside each layer.

Source: PyTorch FSDP (arXiv 2304.11277), Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import translate
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""transformers' word for a weight that every tensor-parallel rank holds, but applies to its own heads only."""

Fill = Callable[[nn.Module, str], None]
"""Gives a part of the model, called by its name, its weights; nothing where it has them."""


def keep_weights(part: nn.Module, name: str) -> None:
    """The `Fill` of a model that is loaded already."""


@dataclass(frozen=True)
class Sharding:
    """A layout of ranks, and what they compute in.

    Attributes:
        mesh: with the dimensions `data_parallel` and `tensor_parallel`.
        compute_dtype: weights are gathered in it and gradients added up in float32; None: in their own.
        cpu_offload: weights and optimiser stay on the CPU.
    """

    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None
    cpu_offload: bool = False

    @property
    def data_group(self) -> ProcessGroup:
        """The ranks that train on different sequences."""
        return self.mesh["data_parallel"].get_group()

    def apply(self, model: Any, fill: Fill = keep_weights) -> None:
        """Cuts `model` into pieces, in place: block by block, so that no more than one block is whole at any time.

        Args:
            model: of transformers.
            fill: see `Fill`.

        Raises:
            ValueError: the heads cannot be split, or transformers has no plan for it, or one that asks for what is not here.
        """
        from torch.distributed.fsdp import register_fsdp_forward_method

        base = model.base_model
        prefix = f"{model.base_model_prefix}." if base is not model else ""
        plan = self._tensor_plan(model)
        for number, block in enumerate(base.layers):
            name = f"layers.{number}"
            fill(block, f"{prefix}{name}")
            self._split_matrices(block, name, plan)
            self._shard(block)
        fill(model, "")
        self._shard(model)
        model.run_packed = MethodType(_run, model)
        register_fsdp_forward_method(model, "run_packed")

    def sum_gradients(self, model: nn.Module) -> None:
        """Completes gradients after the last backward pass, which has summed them over data-parallel ranks. A collective."""
        tensor_mesh = self.mesh["tensor_parallel"]
        if tensor_mesh.size() == 1:
            return
        partial = [p for m in model.modules() if hasattr(m, "has_partial_gradient") for p in m.parameters(recurse=False)]
        for parameter in partial:
            gradient: Any = parameter.grad
            if gradient is not None:
                torch.distributed.all_reduce(gradient.to_local(), group=tensor_mesh.get_group())

    # -- inside

    def _tensor_plan(self, model: Any) -> dict[str, str]:
        size = self.mesh["tensor_parallel"].size()
        if size == 1:
            return {}
        heads = model.config.num_attention_heads
        kv_heads = getattr(model.config, "num_key_value_heads", None) or heads
        if heads % size or kv_heads % size:
            raise ValueError(
                f"tensor_parallel_size={size} does not divide the model's {heads} attention heads and {kv_heads} key-value "
                f"head{'s' * (kv_heads != 1)}"
            )
        whole_plan: dict[str, str] = model.config.base_model_tp_plan or {}
        plan = {pattern: style for pattern, style in whole_plan.items() if pattern.startswith("layers.")}
        unknown = set(plan.values()) - {"colwise", "rowwise", PARTIAL_GRADIENT}
        if not plan or unknown:
            lacks = f"asks for {', '.join(sorted(unknown))}" if unknown else "has no plan for it"
            raise ValueError(
                f"{type(model).__name__} cannot be trained tensor parallel: transformers {lacks}; use tensor_parallel_size=1 (m1)"
            )
        return plan

    def _split_matrices(self, block: nn.Module, name: str, plan: dict[str, str]) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        chosen: dict[str, Any] = {}
        for inner, module in block.named_modules():
            for pattern, style in plan.items():
                if not re.match(translate(pattern), f"{name}.{inner}"):
                    continue
                if style == PARTIAL_GRADIENT:
                    module.has_partial_gradient = True
                else:
                    chosen[inner] = ColwiseParallel() if style == "colwise" else RowwiseParallel()
        if chosen:
            parallelize_module(block, self.mesh["tensor_parallel"], chosen)

    def _shard(self, part: nn.Module) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        precision = MixedPrecisionPolicy()
        if self.compute_dtype is not None:
            precision = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy()
        sharded: Any = fully_shard(
            part,
            mesh=self.mesh["data_parallel"],
            reshard_after_forward=True,  # of the whole as well: between two passes every weight is a piece
            mp_policy=precision,
            offload_policy=offload,
        )
        # The loss of a micro-batch is its share in a sum, not in a mean, over ranks.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def _run(model: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(model, *args, **kwargs)


def run_packed(model: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(model, ...)` with those weights of `model` whole that belong to no block, where it is sharded."""
    if hasattr(model, "run_packed"):
        return model.run_packed(function, *args, **kwargs)
    return function(model, *args, **kwargs)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a piece of `tensor`."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank: a collective; any other as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def piece_size(tensor: Tensor) -> int:
    """How many of a tensor's numbers this rank holds."""
    sharded: Any = tensor
    return int(sharded.to_local().numel()) if is_sharded(tensor) else tensor.numel()


def piece_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of `tensor`, cut as `like` is; all of it where `like` is whole."""
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(like):
        return tensor
    sharded: Any = like
    return distribute_tensor(tensor.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """`tensors` apart by the mesh that they lie on: torch's operations on lists take those of one only."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())
