"""RewardProcess: the parent's hold on one reward process, from start to kill."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from pathlib import Path

from rl_lightning.rewards.child import HEADER, CellResult, Init, Job, LoadFailed, frame

logger = logging.getLogger(__name__)

GONE_WITHIN_S = 10.0
LAST_WORDS_S = 1.0
POLL_S = 0.005
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


class RewardLoadError(ValueError):
    """Reward number `reward` cannot be loaded in a process of its own."""

    def __init__(self, reward: int, message: str) -> None:
        super().__init__(message)
        self.reward = reward


class RewardProcessDied(RuntimeError):
    """The process ended without an answer."""


class RewardProcess:
    """One spawned interpreter that scores. Every method belongs to the event loop that started it.

    The child leads a process group of its own, which is killed as a whole; it also dies with the thread that started it.
    """

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._killed = False

    @classmethod
    async def start(cls, init: Init, timeout_s: float) -> RewardProcess:
        """Spawns an interpreter and waits until the rewards are loaded in it.

        Raises:
            RewardLoadError: a reward cannot be imported or set up there.
            RewardProcessDied: the process ended while loading.
            TimeoutError: loading took longer than `timeout_s`.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = _spawn(theirs.fileno())
        ours.setblocking(False)
        self = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(init)
                answer = await self._receive()
        except TimeoutError:
            self.kill()
            raise TimeoutError(f"a reward process did not load its rewards within {timeout_s:g} s") from None
        except BaseException:
            self.kill()
            raise
        if isinstance(answer, LoadFailed):
            await self.end()
            raise RewardLoadError(answer.reward, answer.message)
        return self

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs, and was not killed by us."""
        return not self._killed and self._process.poll() is None

    async def submit(self, job: Job, timeout_s: float) -> None:
        """Hands over a job; its results follow one by one.

        Raises:
            TimeoutError: the process did not take it within `timeout_s`.
            RewardProcessDied: the process is gone.
        """
        async with asyncio.timeout(timeout_s):
            await self._send(job)

    async def result(self, timeout_s: float) -> CellResult:
        """The next cell of the job.

        Raises:
            TimeoutError: it took longer than `timeout_s`.
            RewardProcessDied: the process ended instead.
        """
        async with asyncio.timeout(timeout_s):
            answer = await self._receive()
        assert isinstance(answer, CellResult)
        return answer

    def kill(self) -> None:
        """Ends the process and all that it started, without waiting until it is gone. Idempotent."""
        if self._killed:
            return
        self._killed = True
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):  # the group outlives a leader that died by itself
            os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Ends the process and all that it started, and waits until it is gone. Idempotent."""
        self.kill()
        if not await self._gone_within(GONE_WITHIN_S):
            logger.warning("reward process %d is still there %g s after SIGKILL", self.pid, GONE_WITHIN_S)

    async def last_words(self) -> str:
        """How a process that closed its socket ended: a signal's name or an exit status. It is gone afterwards."""
        await self._gone_within(LAST_WORDS_S)
        await self.end()
        code = self._process.returncode
        if code is None:
            return "hung"
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    async def _gone_within(self, seconds: float) -> bool:
        deadline = asyncio.get_running_loop().time() + seconds
        while self._process.poll() is None:
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _send(self, message: object) -> None:
        try:
            self._writer.write(frame(message))
            await self._writer.drain()
        except ConnectionError as error:
            raise RewardProcessDied(f"a reward process died: {error}") from error

    async def _receive(self) -> object:
        try:
            (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            return pickle.loads(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise RewardProcessDied("a reward process died") from error


def _spawn(fd: int) -> subprocess.Popen[bytes]:
    boot = f"import sys; sys.path.insert(0, {PACKAGE_ROOT!r}); from rl_lightning.rewards.child import main"
    return subprocess.Popen(
        [sys.executable, "-c", f"{boot}; main({fd}, {os.getpid()})"],
        pass_fds=(fd,),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
