"""The decoder layers of a model of transformers: the unit of compilation and of activation checkpointing."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

MOST_GRAPHS = 64
"""Of one piece of code: actor, critic and reference, each with and without gradient, times levels of checkpointing."""


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers of `model`, first to last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module) -> None:
    """Compiles each decoder layer for token counts of any size; equal layers share their code. Idempotent.

    Attention is one operator of it, so nothing in the code depends on how many sequences there are or how long they are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for layer in decoder_layers(model):
        if layer._compiled_call_impl is not None:
            continue
        for module in layer.modules():
            if type(module) is nn.Linear:  # a forward of its own per layer would be code of its own per layer
                module.__dict__.pop("forward", None)
        layer.compile(dynamic=True)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process. The difference over a warm step is 0."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not loaded: nothing is compiled
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
