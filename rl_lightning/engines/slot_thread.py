"""SlotThread: the thread that owns a decoder and its batch, and the only one that touches them.

Between two decode steps it takes what came into its inbox: new requests, and calls such as a weight update.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import torch

from rl_lightning.engines.engine import EngineError, WeightMismatchError
from rl_lightning.engines.slot_batch import OpenRequest, SlotBatch
from rl_lightning.engines.slot_decoder import SlotDecoder
from rl_lightning.weights.fingerprint import find_mismatch, pick

if TYPE_CHECKING:
    from rl_lightning.weights.transport import WeightUpdate

log = logging.getLogger(__name__)

T = TypeVar("T")


class SlotThread:
    """Generates until `close` is called or something fails.

    Args:
        load: makes decoder and batch; called in the thread.
        num_threads: cores that PyTorch uses in the thread.

    Attributes:
        ready: resolves when the model is loaded.
        ended: resolves when the thread ends; holds the error that ended it, if any.
        fault: why no request may be answered until the next weight update succeeds, or None.
    """

    def __init__(self, load: Callable[[], tuple[SlotDecoder, SlotBatch]], num_threads: int) -> None:
        self.ready: Future[SlotDecoder] = Future()
        self.ended: Future[None] = Future()
        self.fault: EngineError | None = None
        self._load, self._num_threads = load, num_threads
        self._inbox: queue.SimpleQueue[OpenRequest | tuple[Callable[[], object], Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; see `ready`."""
        self._thread.start()

    def submit(self, request: OpenRequest) -> None:
        """Hands over a request, which is replied to once unless the thread ends before."""
        self._inbox.put(request)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs `function` in the thread between two steps; EngineError if the thread ends before."""
        future: Future[T] = Future()
        self._inbox.put((function, future))
        if self.ended.done():
            self._refuse_calls()
        return future

    def close(self, timeout_s: float) -> bool:
        """Ends the thread after its current step; returns whether it ended in time."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def seconds_without_progress(self) -> float:
        """Since the model last finished a pass while requests waited for it; 0 where none do."""
        if not self.ready.done() or not self._batch.busy:
            return 0.0
        return time.monotonic() - max(self._decoder.last_pass_s, self._busy_since_s)

    def update(self, update: WeightUpdate, weights: Iterable[tuple[str, torch.Tensor]]) -> float:
        """Interrupts, loads, proves. To be run by `call`; returns the seconds that this took.

        Answers that are short and about to end are let finish before.
        The next step computes the caches of what was interrupted again: whoever waits for the proof need not wait for that.

        Raises:
            WeightMismatchError: the fingerprint differs.
            EngineError: the weights do not fit the model.
        """
        self._batch.finish_short()
        started = time.perf_counter()
        self._batch.interrupt()
        try:
            self._decoder.load_weights(weights)
            assert update.fingerprint is not None, "it comes with the weights that this engine can read"
            mismatch = find_mismatch(update.fingerprint, self._sample)
            if mismatch is not None:
                raise WeightMismatchError(f"TorchEngine does not hold the weights of version {update.version}: {mismatch}")
        except (EngineError, WeightMismatchError) as error:
            self.fault = EngineError(f"weights of version {update.version} were not accepted: {error}")
            self._batch.fail(self.fault)
            raise
        self.fault = None
        self._batch.version = update.version
        return time.perf_counter() - started

    def _sample(self, name: str) -> torch.Tensor | None:
        weight = self._decoder.weight(name)
        return None if weight is None else pick(weight)

    # -- in the thread

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._num_threads)
            self._decoder, self._batch = self._load()
            self._busy_since_s = time.monotonic()
            self.ready.set_result(self._decoder)
            with torch.inference_mode():
                while self._take():
                    if self._batch.busy:
                        self._batch.step()
            self.ended.set_result(None)
        except Exception as error:  # whatever ends the thread is handed to those who wait for it
            if not self.ready.done():
                self.ready.set_exception(error)
            self.ended.set_exception(error)
        self._refuse_calls()

    def _refuse_calls(self) -> None:
        """Answers those that nobody takes out of the inbox any more; whoever asked for requests hears of the end himself."""
        cause = self.ended.exception()
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, tuple) and item[1].set_running_or_notify_cancel():
                item[1].set_exception(EngineError(f"TorchEngine failed: {cause!r}" if cause else "TorchEngine was stopped"))

    def _take(self) -> bool:
        """Works off the inbox, waiting for something only when the batch has nothing to do; False on `close`."""
        while True:
            idle = not self._batch.busy
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            if idle:
                self._busy_since_s = time.monotonic()
            self._handle(item)
            del item  # it may hold a whole set of weights, and the next one may be long in coming

    def _handle(self, item: OpenRequest | tuple[Callable[[], object], Future]) -> None:
        if not isinstance(item, OpenRequest):
            _call(*item)
        elif self.fault is None:
            self._batch.add(item)
        else:
            item.reply(self.fault)


def _call(function: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except (EngineError, WeightMismatchError) as error:
        future.set_exception(error)
    except Exception as error:  # ends the thread
        future.set_exception(EngineError(f"TorchEngine failed: {error!r}"))
        raise
    finally:
        del function, future  # the error's traceback holds this frame, which must not hold the error
