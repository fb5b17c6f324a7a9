"""SharedServer: one SGLang server that serves every turn of a benchmark, as its start takes longer than a turn."""

from __future__ import annotations

import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rl_lightning.engines.process import ServerProcess
from rl_lightning.engines.sglang_args import server_command, server_env

ON_GPU: dict[str, Any] = {
    "attention_backend": "fa3",
    "cuda_graph_max_bs": 256,
    "cuda_graph_backend_prefill": "disabled",
    "mm_feature_transport": "cpu",
    "context_length": 4096,
}
"""Server arguments for Hopper: FA3, graphs for decoding alone, nothing that needs a further package."""

POLL_S = 1.0


class SharedServer(AbstractContextManager["SharedServer"]):
    """Starts at construction, is attached to by `SGLangEngine(url=..., api_key=...)`, and ends with the block.

    Args:
        model: folder of the model.
        log: takes what the server prints.
        gpu: index of its GPU; None: the CPU.
        server_args: SGLang's arguments by name.
    """

    def __init__(self, model: Path, log: Path, gpu: int | None, server_args: Mapping[str, Any]) -> None:
        self._port = socket.socket()  # held, so that nobody else takes it until the server listens
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._port.bind(("127.0.0.1", 0))
        number = self._port.getsockname()[1]
        self.url, self.api_key = f"http://127.0.0.1:{number}", secrets.token_urlsafe(16)
        self._folder = tempfile.TemporaryDirectory(prefix="sglang-", dir="/tmp", ignore_cleanup_errors=True)
        device, dtype = ("cpu", "float32") if gpu is None else ("cuda", "bfloat16")
        env = server_env(device, self.api_key, Path(self._folder.name))
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        self._process = ServerProcess(server_command(str(model), number, device, dtype, server_args), log, env)
        self._ended = threading.Event()

    def watch(self, died: Callable[[str], None]) -> None:
        """Calls `died` with the reason, from a thread, should the server end before the block does."""

        def look() -> None:
            while not self._ended.wait(POLL_S):
                if cause := self._process.cause_of_death():
                    died(cause)
                    return

        threading.Thread(target=look, name="server-watch", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        """Ends the server and all that it started."""
        self._ended.set()
        self._process.stop()
        self._port.close()
        self._folder.cleanup()
