"""WeightFiles: a model's safetensors files, read block by block, so that no rank ever holds a whole copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class WeightFiles:
    """The weights in a Hugging Face folder or hub repository, by name.

    Args:
        path: folder or hub name.
        dtype: what they are converted to.
        new: names of weights that the files may lack; they start at zero.
    """

    def __init__(self, path: str, dtype: torch.dtype, new: Sequence[str] = ()) -> None:
        self._dtype, self._new = dtype, tuple(new)
        self._files = _find_files(path)
        self.missing: list[str] = []

    def cover(self, model: nn.Module) -> bool:
        """Whether every weight of `model` is here under its own name, or may be new."""
        names = [name for name, _ in model.named_parameters()]
        return bool(self._files) and all(name in self._files or name in self._new for name in names)

    def fill(self, part: nn.Module, name: str) -> None:
        """Replaces the weights of `part`, called `name` in the whole model, that are on the meta device."""
        prefix = f"{name}." if name else ""
        loaded: dict[int, nn.Parameter] = {}  # tied weights stay one
        for module_name, module in part.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                own = f"{prefix}{module_name}.{leaf}" if module_name else f"{prefix}{leaf}"
                if id(parameter) not in loaded:
                    loaded[id(parameter)] = nn.Parameter(self._read(own, parameter), parameter.requires_grad)
                module.register_parameter(leaf, loaded[id(parameter)])

    def _read(self, name: str, parameter: Tensor) -> Tensor:
        from safetensors import safe_open

        if name not in self._files:
            self.missing.append(name)
            return torch.zeros(parameter.shape, dtype=self._dtype)
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name).to(self._dtype)


def empty_model(kind: Any, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A model without weights, but with those tables that no file holds."""
    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype, attn_implementation=attention)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=model.config))
    return model


def _find_files(path: str) -> dict[str, str]:
    """The file that holds each weight; none where there are no safetensors."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **quiet)
    if index is not None:
        names: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        files = {file: str(cached_file(path, file)) for file in set(names.values())}
        return {name: files[file] for name, file in names.items()}
    single = cached_file(path, SAFE_WEIGHTS_NAME, **quiet)
    if single is None:
        return {}
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), str(single))
