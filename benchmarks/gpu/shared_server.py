"""SharedServer: one SGLang server that serves every turn of a benchmark, as its start takes longer than a turn."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from rl_lightning.engines.sglang_process import SGLangProcess

ON_GPU: dict[str, Any] = {
    "attention_backend": "fa3",
    "cuda_graph_max_bs": 256,
    "cuda_graph_backend_prefill": "disabled",
    "mm_feature_transport": "cpu",
    "context_length": 4096,
}
"""Server arguments for Hopper: FA3, graphs for decoding alone, nothing that needs a further package."""

POLL_S = 1.0


class SharedServer(SGLangProcess):
    """Starts at construction, is attached to by `SGLangEngine(url=..., api_key=...)`, and ends with the block.

    Args:
        model: folder of the model.
        log: takes what the server prints.
        gpu: index of its GPU among those that this process may use; None: the CPU.
        server_args: SGLang's arguments by name.
    """

    def __init__(self, model: Path, log: Path, gpu: int | None, server_args: Mapping[str, Any]) -> None:
        device, dtype = ("cpu", "float32") if gpu is None else ("cuda", "bfloat16")
        env = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": device_name(gpu)}
        super().__init__(str(model), device, dtype, server_args, log_path=str(log), env=env)
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        return self

    def watch(self, died: Callable[[str], None]) -> None:
        """Calls `died` with the reason, from a thread, should the server end before the block does."""

        def look() -> None:
            while not self._ended.wait(POLL_S):
                if cause := self.cause_of_death():
                    died(cause)
                    return

        threading.Thread(target=look, name="server-watch", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        """Ends the server and all that it started."""
        self._ended.set()
        self.stop()


def device_name(gpu: int) -> str:
    """What CUDA_VISIBLE_DEVICES of a child process calls the GPU that is number `gpu` in this one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[gpu].strip() if visible else str(gpu)
