"""What `auto` stands for: the engine, and the way that weights take to it."""

from __future__ import annotations

import importlib.util

from rl_lightning.engines.engine import Engine


def make_engine() -> Engine:
    """SGLang where it is installed, else the embedded engine."""
    if importlib.util.find_spec("sglang") is not None:
        from rl_lightning.engines.sglang import SGLangEngine

        return SGLangEngine()
    from rl_lightning.engines.torch import TorchEngine

    return TorchEngine()


def choose_transport(engine: Engine, wanted: str) -> str:
    """`wanted`, or the engine's preferred transport for `auto`.

    Raises:
        ValueError: the engine cannot receive by it.
    """
    if wanted == "auto":
        return engine.transports[0]
    if wanted not in engine.transports:
        raise ValueError(
            f"weight_transport={wanted} does not work with {type(engine).__name__}; it receives by {', '.join(engine.transports)}"
        )
    return wanted
