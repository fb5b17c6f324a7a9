"""SGLangProcess: an SGLang server that this process owns, with its port, its key and its folder."""

from __future__ import annotations

import logging
import math
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_lightning.engines.process import ServerProcess
from rl_lightning.engines.sglang_args import parallel_sizes, server_command, server_env
from rl_lightning.owned_folder import OwnedFolder

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
FOLDERS = "rl-lightning-sglang-"
"""How names of temporary folders begin; those of owners that were killed are removed by the next server to start."""


class SGLangProcess(ServerProcess):
    """Starts at construction; it is ready once it answers at `url`.

    Args:
        model_path: what it serves.
        device: `cuda` or `cpu`.
        dtype: of the weights, by SGLang's name.
        server_args: further arguments of SGLang's server by their names.
        api_key: what it wants of its clients; None takes a random one.
        log_path: takes what it prints; None keeps that in a temporary file until it is stopped.
        env: further changes to its environment.

    Attributes:
        url: where it listens, on this machine only.
        api_key: see above.
    """

    def __init__(
        self,
        model_path: str,
        device: str,
        dtype: str,
        server_args: Mapping[str, Any],
        api_key: str | None = None,
        log_path: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._port = socket.socket()  # held, so that nobody else takes it until the server listens
        self._folder = OwnedFolder(FOLDERS)
        try:
            self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._port.bind((HOST, 0))
            number = self._port.getsockname()[1]
            self.url, self.api_key = f"http://{HOST}:{number}", api_key or secrets.token_urlsafe(32)
            command = server_command(model_path, number, device, dtype, server_args)
            saver = any(value for name, value in server_args.items() if name.replace("-", "_") == "enable_memory_saver")
            needed = server_env(device, self.api_key, self._folder.path, math.prod(parallel_sizes(server_args)), saver=saver)
            log = self._folder.path / "server.log" if log_path is None else Path(log_path)
            super().__init__(command, log, {**needed, **(env or {})})
        except BaseException:
            self._leave_nothing()
            raise
        logger.info("starting SGLang on %s, process %d, port %d, log %s", device, self.pid, number, self.log_path)

    def stop(self, gone_within_s: float = 10.0) -> None:
        """See `ServerProcess.stop`. Its temporary files go with it."""
        try:
            super().stop(gone_within_s)
        finally:
            self._leave_nothing()

    def tail(self, n_bytes: int = 2000) -> str:
        """See `ServerProcess.tail`; without the key, for errors are written to logs that others read."""
        return super().tail(n_bytes).replace(self.api_key, "***")

    def _leave_nothing(self) -> None:
        self._port.close()
        self._folder.remove()
