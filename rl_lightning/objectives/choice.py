"""check_choice: an option that names one of several things."""

from __future__ import annotations

from collections.abc import Sequence


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a name that is not among the choices.

    Raises:
        ValueError: names the option and the choices.
    """
    if value not in choices:
        raise ValueError(f"{option}={value} is unknown: choose one of {', '.join(choices)}")
