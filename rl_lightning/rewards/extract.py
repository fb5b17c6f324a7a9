r"""Where in a text the answer is: its first line, its last `\boxed{}`, its last `<answer>`."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\f?boxed\s*")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def first_line(text: str) -> str:
    """The first line that is not blank, stripped; empty where there is none."""
    return text.strip().split("\n", 1)[0].strip()


def tagged(text: str) -> str | None:
    """What the last `<answer>...</answer>` holds, stripped; None where there is none."""
    found = _TAGGED.findall(text)
    return found[-1].strip() if found else None


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` (or `\boxed x`) holds; None where there is none."""
    for match in reversed(list(_BOXED.finditer(text))):
        inside = _braced(text, match.end())
        if inside is not None:
            return inside.strip()
    return None


def _braced(text: str, start: int) -> str | None:
    """The group at `start`: between its braces, nested ones included, or else up to the next space or dollar."""
    if start >= len(text):
        return None
    if text[start] != "{":
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0] or None
    depth = 0
    for end in range(start, len(text)):
        if text[end] in "{}" and text[end - 1] != "\\":
            depth += 1 if text[end] == "{" else -1
            if depth == 0:
                return text[start + 1 : end]
    return None
