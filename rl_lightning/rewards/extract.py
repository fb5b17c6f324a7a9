r"""Where in a text the answer is: its first line, its last `\boxed{}`, its last `<answer>`."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\f?boxed\s*")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_END = "</answer>"


def first_line(text: str) -> str:
    """The first line that is not blank, stripped; empty where there is none."""
    return text.strip().split("\n", 1)[0].strip()


def tagged(text: str) -> str | None:
    """What the last `<answer>...</answer>` holds, stripped; None where there is none."""
    found = _TAGGED.findall(text[: text.rfind(_END) + len(_END)])  # whatever opens later is not searched for its end
    return found[-1].strip() if found else None


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` (or `\boxed x`) holds; None where there is none."""
    end = len(text)
    for match in reversed(list(_BOXED.finditer(text))):
        inside = _braced(text, match.end(), end)
        if inside is not None:
            return inside.strip()
        if text.startswith("{", match.end()):
            end = match.end()  # what stays open keeps open whatever holds it
    return None


def _braced(text: str, start: int, end: int) -> str | None:
    """The group at `start`: between its braces, nested ones included, closed before `end`; or up to the next space or dollar."""
    if start >= len(text):
        return None
    if text[start] != "{":
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0] or None
    depth = 0
    for i in range(start, end):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i]
    return None
