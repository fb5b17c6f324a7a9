"""read_lines: a file of one JSON object a line, every bad line of which is named."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

Row = TypeVar("Row")

SHOWN_PROBLEMS = 5

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class BadLine(ValueError):
    """Why a line cannot be used; `read_lines` adds file and line number."""


def read_lines(path: Path, parse: Callable[[bytes], Row], *, fields: str, allow_bad_lines: bool = False) -> tuple[list[Row], int]:
    """What `parse` makes of the good lines, and how many were bad.

    Args:
        path: the file; empty lines are passed over.
        parse: raises BadLine where it can make nothing of a line.
        fields: that a line must have, for messages.
        allow_bad_lines: report bad lines instead of stopping at them.

    Raises:
        ValueError: there is no file, lines are bad, or none is good; names file, line and remedy.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            rows.append(parse(line))
        except BadLine as problem:
            problems.append(f"{path}:{number}: {problem}")
    if problems:
        _report(path, problems, len(rows), allow_bad_lines)
    if not rows:
        held = "no good line" if problems else "no line"
        raise ValueError(f"data file {path} holds {held}; it must hold one JSON object with {fields} a line")
    return rows, len(problems)


def decode_object(line: bytes) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        BadLine: it is none.
    """
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    fields = decode_json(text)
    if not isinstance(fields, dict):
        raise BadLine(f"a {type(fields).__name__} where a JSON object was expected")
    return fields


def decode_json(text: str) -> Any:
    """What `text` says in JSON.

    Raises:
        BadLine: it is none, or holds something that neither tokenizers nor files can take.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise BadLine(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except UnicodeEncodeError as error:
        raise BadLine("not usable JSON (half of a surrogate pair, which is no character)") from error
    except ValueError as error:  # of int()
        raise BadLine("not usable JSON (a number of thousands of digits; write it as a string)") from error
    except RecursionError as error:
        raise BadLine("not usable JSON (nested too deeply)") from error
    return value


def text_field(fields: dict[str, Any], name: str) -> str:
    """A field that must hold a text.

    Raises:
        BadLine: it is missing, empty or of another kind.
    """
    if name not in fields:
        raise BadLine(f"missing field {name!r}")
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise BadLine(f"field {name!r} must be a non-empty string, not {shortened(value)}")
    return value


def shortened(value: object) -> str:
    """`value` as Python writes it, its end cut off where that is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist (working folder {Path.cwd()}); correct the data path")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _report(path: Path, problems: Sequence[str], n_good: int, allow_bad_lines: bool) -> None:
    shown = "\n  ".join(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        shown += f"\n  and {len(problems) - SHOWN_PROBLEMS} more"
    if not allow_bad_lines:
        raise ValueError(
            f"{len(problems)} bad line(s) in {path}; correct them, or set allow_bad_lines=true to drop them:\n  {shown}"
        )
    logger.warning("%s: dropped %d bad line(s) of %d:\n  %s", path, len(problems), len(problems) + n_good, shown)
