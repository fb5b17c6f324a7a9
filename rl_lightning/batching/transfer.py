"""to_device: tensors to where the model is, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; to a GPU through pinned memory, so that the copy takes its place in the queue of the GPU's work.

    A copy from ordinary memory would first wait until the GPU has done everything asked of it so far.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
