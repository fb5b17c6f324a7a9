"""shares_prompts: whether a prompt is run once for its answers, where the user leaves that open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rl_lightning.batching.micro_batch import saved_by_sharing
from rl_lightning.models.attention import HALVES
from rl_lightning.types import Batch

LEAST_SAVED = 0.15
"""Share of the tokens that it has to save on CUDA, where answers see their prompt by a second call of the kernel.

That call costs the narrow layers of a 0.6B as much as a fifth of the tokens (docs/speed.md); wider ones, which
compute more for a token, should lose less by it, which is not measured.
"""


def shares_prompts(batch: Batch, sequences: Sequence[int], *, device: torch.device, dtype: torch.dtype, config: Any) -> bool:
    """Always on the CPU; on CUDA where it saves enough and flash attention can do it.

    Args:
        batch: on the CPU.
        sequences: those of it that are run.
        device: of the model.
        dtype: that attention computes in.
        config: of the model; its `sliding_window` has no kernel for shared prompts.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    has_kernel = dtype in HALVES and getattr(config, "sliding_window", None) is None
    return has_kernel and saved_by_sharing(batch, sequences) > LEAST_SAVED
