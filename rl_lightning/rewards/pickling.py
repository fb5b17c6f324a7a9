"""From a reward object to bytes that another interpreter can load."""

from __future__ import annotations

import importlib
import pickle
from typing import Any

NOT_PICKLABLE = (pickle.PicklingError, AttributeError, TypeError)


def pickled_reward(name: str, reward: object) -> bytes:
    """`reward` by reference where it can be imported, and by value where it was defined in a script or notebook.

    Raises:
        ValueError: neither works.
    """
    try:
        if getattr(reward, "__module__", None) == "__main__":
            return _by_value(reward)
        return pickle.dumps(reward)
    except NOT_PICKLABLE as error:
        raise ValueError(
            f"reward {name} cannot be sent to a process of its own ({error}); "
            "define it at the top level of a module that can be imported, and give it arguments that pickle"
        ) from error


def _by_value(reward: object) -> bytes:
    return bytes(_cloudpickle().dumps(reward))


def _cloudpickle() -> Any:
    for module in ("cloudpickle", "ray.cloudpickle"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    raise pickle.PicklingError("it was defined in __main__, and the package cloudpickle is not installed")
