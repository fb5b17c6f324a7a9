"""`allocation_mode`: how a run's GPUs are shared between generation and training, written as one string.

Grammar (`d`, `m` or `t`, and `p` are data, tensor and pipeline parallel sizes, in any order, each exactly once, positive):

    mode       = training | generation ("+" | "|") training | training ("+" | "|") generation
    generation = ("sglang" | "vllm" | "torch") "." layout
    training   = layout | role ":" layout { "," role ":" layout }
    layout     = "d" size "m" size "p" size

`+` gives generation and training their own GPUs, `|` has them share the same ones (colocation).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ENGINES = ("sglang", "vllm", "torch")
EXAMPLE = "sglang.d4p1m1+d4p1m1 (4 GPUs generate, 4 train)"
DEFAULT_ROLE = "*"
TRAINED_ROLE = "actor_train"
GENERATION = "generation"

_AXES = {"d": "data", "t": "tensor", "m": "tensor", "p": "pipeline"}
_TERM = re.compile(r"([A-Za-z])([0-9]*)")
_ROLE = re.compile(r"(\*|[A-Za-z_]\w*):", re.ASCII)
_ENGINE = re.compile(r"([A-Za-z_]\w*)\.", re.ASCII)


@dataclass(frozen=True, slots=True)
class Layout:
    """Parallel sizes of one part.

    Attributes:
        data: replicas; for generation the number of engines.
        tensor: devices over which one layer is split.
        pipeline: stages of consecutive layers.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def size(self) -> int:
        """GPUs of this part."""
        return self.data * self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"d{self.data}p{self.pipeline}m{self.tensor}"


@dataclass(frozen=True, slots=True)
class Allocation:
    """A parsed `allocation_mode`.

    Attributes:
        generation: layout of the engines, None where nothing is generated (supervised fine-tuning).
        roles: training layouts by role; `*` stands for every role without its own. All have the same size.
        engine: name before the dot, None without generation.
        colocated: generation and training take turns on the same GPUs.
    """

    generation: Layout | None
    roles: Mapping[str, Layout] = field(hash=False)
    engine: str | None = None
    colocated: bool = False

    @property
    def training(self) -> Layout:
        """Layout of the model that is trained."""
        for role in (TRAINED_ROLE, DEFAULT_ROLE):
            if role in self.roles:
                return self.roles[role]
        return next(iter(self.roles.values()))

    @property
    def size(self) -> int:
        """GPUs of the whole run."""
        if self.generation is None:
            return self.training.size
        if self.colocated:
            return max(self.generation.size, self.training.size)
        return self.generation.size + self.training.size

    def __str__(self) -> str:
        training = ",".join(f"{role}:{layout}" for role, layout in self.roles.items())
        if tuple(self.roles) == (DEFAULT_ROLE,):
            training = str(self.training)
        if self.generation is None:
            return training
        return f"{self.engine}.{self.generation}{'|' if self.colocated else '+'}{training}"


def parse_allocation(text: str) -> Allocation:
    """The allocation that `text` describes; see the module for the grammar.

    Raises:
        ValueError: quotes the string, points at the place and gives an example.
    """
    return _Parser(text).parse()


def check_size(allocation: Allocation, n_nodes: int, n_gpus_per_node: int) -> None:
    """Compares the allocation with the GPUs asked for.

    Raises:
        ValueError: they differ; shows both sums.
    """
    asked = n_nodes * n_gpus_per_node
    if allocation.size == asked:
        return
    parts = [f"{GENERATION} {allocation.generation.size}"] if allocation.generation else []
    parts.append(f"training {allocation.training.size}")
    shown = (" and, on the same GPUs, " if allocation.colocated else " + ").join(parts)
    raise ValueError(
        f"allocation_mode={str(allocation)!r} needs {shown} = {allocation.size} GPUs, but n_nodes={n_nodes} x "
        f"n_gpus_per_node={n_gpus_per_node} = {asked}; change one of the three so that they agree"
    )


def check_supported(allocation: Allocation) -> None:
    """Refuses what parses but cannot run in this version.

    Raises:
        ValueError: names the part and what to write instead.
    """
    where = f"allocation_mode={str(allocation)!r}"
    generation = allocation.generation
    if allocation.colocated and (generation is None or generation.size != generation.data or generation.size != allocation.size):
        raise ValueError(
            f"{where}: engines that share GPUs with training have one GPU each, all of them; write d{allocation.size}p1m1 for "
            f"generation, or give each side its own GPUs with '+'"
        )
    if allocation.engine == "vllm":
        raise ValueError(f"{where}: there is no vLLM engine; write 'sglang.' instead of 'vllm.'")
    for name, layout in _parts(allocation).items():
        if name != GENERATION and layout.pipeline > 1:
            raise ValueError(
                f"{where}: pipeline parallel training is not supported yet, and {name} has p{layout.pipeline}; write "
                f"d{layout.data * layout.pipeline}p1m{layout.tensor}"
            )


def check_heads(allocation: Allocation, config: Any) -> None:
    """Compares the tensor parallel sizes with the model's heads: every device holds whole attention heads.

    In training it holds whole key-value heads too; an engine copies those that are fewer than its devices.

    Args:
        allocation: see `parse_allocation`.
        config: the language model's, as `transformers.AutoConfig` reads it; only `num_attention_heads` and
            `num_key_value_heads` (if there is one) are looked at.

    Raises:
        ValueError: names the part, the heads and the sizes that fit.
    """
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    for name, layout in _parts(allocation).items():
        copies = name == GENERATION
        if _divides_heads(layout.tensor, heads, kv_heads, copies):
            continue
        fitting = [f"m{size}" for size in range(1, heads + 1) if _divides_heads(size, heads, kv_heads, copies)]
        raise ValueError(
            f"allocation_mode={str(allocation)!r}: {name} splits every layer over m{layout.tensor} devices, which does not fit "
            f"the model's {heads} attention heads and {kv_heads} key-value heads; write {' or '.join(fitting)}"
        )


def _divides_heads(tensor: int, heads: int, kv_heads: int, copies: bool) -> bool:
    return heads % tensor == 0 and (kv_heads % tensor == 0 or (copies and tensor % kv_heads == 0))


def _parts(allocation: Allocation) -> dict[str, Layout]:
    """Every layout by the name that errors call it."""
    generation = {GENERATION: allocation.generation} if allocation.generation is not None else {}
    return generation | {f"training ({role})": layout for role, layout in allocation.roles.items()}


class _Parser:
    """Reads one string from left to right; `_at` is the place that an error points at."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def parse(self) -> Allocation:
        first = self._part()
        if self._at == len(self._text):
            return self._join(first, None, colocated=False)
        colocated = self._peek() == "|"
        if not colocated and self._peek() != "+":
            raise self._error("expected '+', '|' or the end")
        self._at += 1
        second = self._part()
        if self._at < len(self._text):
            raise self._error("nothing may follow here")
        return self._join(first, second, colocated)

    def _join(self, first: _Part, second: _Part | None, colocated: bool) -> Allocation:
        engines = [part for part in (first, second) if part is not None and part.engine is not None]
        trainings = [part for part in (first, second) if part is not None and part.engine is None]
        if len(trainings) != 1:
            self._at = 0
            raise self._error("no part says how to train" if not trainings else "two parts train: one must start with 'sglang.'")
        generation = engines[0] if engines else None
        return Allocation(
            generation.layouts[DEFAULT_ROLE] if generation else None,
            trainings[0].layouts,
            generation.engine if generation else None,
            colocated,
        )

    def _part(self) -> _Part:
        if match := _ENGINE.match(self._text, self._at):
            if match[1] not in ENGINES:
                raise self._error(f"unknown engine {match[1]!r}, known are {', '.join(ENGINES)}")
            self._at = match.end()
            return _Part(match[1], {DEFAULT_ROLE: self._layout()})
        if _ROLE.match(self._text, self._at):
            return _Part(None, self._roles())
        return _Part(None, {DEFAULT_ROLE: self._layout()})

    def _roles(self) -> dict[str, Layout]:
        roles: dict[str, Layout] = {}
        while True:
            match = _ROLE.match(self._text, self._at)
            if match is None:
                raise self._error("expected a role and ':', as in actor_train:d2p1m1")
            if match[1] in ENGINES:
                raise self._error(f"{match[1]!r} is an engine, not a role: write '.' after it")
            if match[1] in roles:
                raise self._error(f"role {match[1]!r} is given twice")
            start, self._at = self._at, match.end()
            roles[match[1]] = layout = self._layout()
            first = next(iter(roles.values()))
            if layout.size != first.size:
                self._at = start
                raise self._error(f"all roles use the same GPUs, but {layout} has {layout.size} and {first} has {first.size}")
            if self._peek() != ",":
                return roles
            self._at += 1

    def _layout(self) -> Layout:
        sizes: dict[str, int] = {}
        while match := _TERM.match(self._text, self._at):
            letter, digits = match[1], match[2]
            axis = _AXES.get(letter)
            if axis is None:
                raise self._error(f"{letter!r} is none of d (data), p (pipeline), m or t (tensor)")
            if axis in sizes:
                raise self._error(f"the {axis} parallel size is given twice")
            if not digits:
                raise self._error(f"{letter!r} needs a number after it")
            if int(digits) == 0:
                raise self._error("sizes must be positive")
            sizes[axis] = int(digits)
            self._at = match.end()
        missing = [f"{letter} ({axis})" for letter, axis in _AXES.items() if axis not in sizes and letter != "t"]
        if missing:
            raise self._error(f"the layout lacks {' and '.join(missing)}")
        return Layout(**sizes)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _error(self, problem: str) -> ValueError:
        return ValueError(
            f"allocation_mode={self._text!r} does not parse at position {self._at + 1}: {problem}\n"
            f"    {self._text}\n    {' ' * self._at}^\nAn example: {EXAMPLE}"
        )


@dataclass(frozen=True, slots=True)
class _Part:
    engine: str | None
    layouts: dict[str, Layout]
