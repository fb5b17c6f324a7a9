"""TorchEngine: a Hugging Face model that generates inside the worker's own process, for machines without SGLang."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl_lightning.engines.engine import EngineError
from rl_lightning.types import Completion, GenerationRequest
from rl_lightning.weights.transport import WeightTarget, WeightUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from rl_lightning.engines.slot_batch import SlotBatch
    from rl_lightning.engines.slot_decoder import SlotDecoder
    from rl_lightning.engines.slot_thread import SlotThread

log = logging.getLogger(__name__)


class TorchEngine:
    """Continuous batching with a key-value cache over any causal language model of transformers' attention interface.

    Equal prompts that wait together are computed once.  A weight update interrupts between two tokens; what was generated
    stays, its keys and values are computed again under the new weights.  Only where the running answers have at most 64 tokens
    to go, and fewer than they have, they end under the old weights before: that is less work.  An answer is a function of
    weights, prompt and seed, up to float rounding, whatever else is in the batch.

    Log-probabilities are of the temperature-scaled distribution over the whole vocabulary, also where `top_p`, `top_k` or
    `min_new_tokens` narrow the choice.  An answer also ends (`length`) where the model's context or the cache does.

    Args:
        max_running_requests: most answers generated at the same time; further ones wait.
        dtype: of weights and cache; `auto` is float32 on CPU and the checkpoint's own on CUDA.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` is CUDA where there is one.
        num_threads: CPU cores that it computes with.
        kv_cache_gib: most memory of the key-value cache.
        start_timeout_s: for loading the model.
        request_timeout_s: for one answer, waiting included.
        sync_timeout_s: for one weight update.
        stall_timeout_s: `health` fails when requests wait and the model has finished no pass for so long.
        new_tokens_per_chunk: for engines that cannot be interrupted; without effect here.
    """

    transports: tuple[str, ...] = ("object_store", "disk")

    def __init__(
        self,
        max_running_requests: int = 128,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: str = "auto",
        num_threads: int = 1,
        kv_cache_gib: float = 4.0,
        start_timeout_s: float = 600.0,
        request_timeout_s: float = 3600.0,
        sync_timeout_s: float = 600.0,
        stall_timeout_s: float = 600.0,
        new_tokens_per_chunk: int | None = None,
    ) -> None:
        if max_running_requests < 1 or num_threads < 1 or kv_cache_gib <= 0:
            raise ValueError(
                f"TorchEngine needs max_running_requests and num_threads of at least 1 and kv_cache_gib above 0, got "
                f"{max_running_requests}, {num_threads} and {kv_cache_gib}"
            )
        self.max_running_requests, self.dtype, self.device = max_running_requests, dtype, device
        self.num_threads, self.kv_cache_gib = num_threads, kv_cache_gib
        self.start_timeout_s, self.request_timeout_s = start_timeout_s, request_timeout_s
        self.sync_timeout_s, self.stall_timeout_s = sync_timeout_s, stall_timeout_s
        self._thread: SlotThread | None = None
        self._decoder: SlotDecoder | None = None
        self._tokenizer: Any = None
        self._answers: set[asyncio.Future[Completion]] = set()

    @property
    def target(self) -> WeightTarget:
        """See `Engine.target`."""
        return WeightTarget(dtype=str(self._decoder.model.dtype).removeprefix("torch.") if self._decoder is not None else None)

    async def start(self, model_path: str) -> None:
        """See `Engine.start`.

        Raises:
            EngineError: the model could not be loaded, or not in time.
            ValueError: the model is of a kind that this engine cannot run.
        """
        from rl_lightning.engines.slot_thread import SlotThread

        await self.stop()
        thread = SlotThread(lambda: self._load(model_path), self.num_threads)
        thread.start()
        self._thread, loop = thread, asyncio.get_running_loop()
        try:
            self._decoder = await _within(thread.ready, self.start_timeout_s, f"loading {model_path}")
        except OSError as error:
            raise EngineError(f"TorchEngine could not load {model_path}: {error}") from error
        thread.ended.add_done_callback(lambda _: _on_loop(loop, self._fail_answers, thread))

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `Engine.generate`.

        Raises:
            EngineError: the engine ended, holds no valid weights, or did not answer in time.
            ValueError: the prompt is empty or does not fit into the context, or stop texts have no tokenizer.
        """
        from rl_lightning.engines.slot_batch import OpenRequest

        thread, loop = self._alive(), asyncio.get_running_loop()
        answer: asyncio.Future[Completion] = loop.create_future()
        opened = OpenRequest(request, self._limit(request), lambda result: _on_loop(loop, _settle, answer, result))
        self._answers.add(answer)
        thread.submit(opened)
        try:
            async with asyncio.timeout(self.request_timeout_s):
                return await answer
        except TimeoutError:
            raise EngineError(f"TorchEngine did not answer {request.request_id} within {self.request_timeout_s:.0f} s") from None
        finally:
            opened.cancelled = True
            self._answers.discard(answer)

    async def update_weights(self, update: WeightUpdate) -> float:
        """See `Engine.update_weights`. The weights are fetched while generation goes on."""
        thread = self._alive()
        try:
            weights = await asyncio.to_thread(_read, update, self.sync_timeout_s)
        except (OSError, TimeoutError) as error:
            raise EngineError(f"TorchEngine could not read version {update.version}: {error}") from error
        what = f"the update to version {update.version}"
        return await _within(thread.call(lambda: thread.update(update, weights)), self.sync_timeout_s, what)

    async def health(self) -> None:
        """See `Engine.health`."""
        thread = self._alive()
        if thread.fault is not None:
            raise thread.fault
        stalled_s = thread.seconds_without_progress()
        if stalled_s > self.stall_timeout_s:
            raise EngineError(f"TorchEngine has finished no pass for {stalled_s:.0f} s while requests wait")

    async def stop(self) -> None:
        """See `Engine.stop`."""
        thread, self._thread, self._decoder = self._thread, None, None
        if thread is None:
            return
        ended = await asyncio.to_thread(thread.close, self.stall_timeout_s)
        self._fail_answers(thread)
        if not ended:
            raise EngineError(f"TorchEngine's thread did not end within {self.stall_timeout_s:.0f} s")

    # -- inside

    def _load(self, model_path: str) -> tuple[SlotDecoder, SlotBatch]:
        import torch

        from rl_lightning.engines.slot_batch import SlotBatch
        from rl_lightning.engines.slot_decoder import SlotDecoder

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        decoder = SlotDecoder(
            model_path,
            dtype=self.dtype,
            device=torch.device(device),
            max_slots=self.max_running_requests,
            kv_cache_gib=self.kv_cache_gib,
        )
        self._tokenizer = _tokenizer(model_path)
        return decoder, SlotBatch(decoder, _stop_ids(decoder.model, self._tokenizer), self._detokenise)

    def _detokenise(self, ids: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _alive(self) -> SlotThread:
        if self._thread is None or self._decoder is None:
            raise EngineError("TorchEngine is not started")
        if self._thread.ended.done():
            raise EngineError(f"TorchEngine ended: {self._thread.ended.exception()!r}")
        return self._thread

    def _limit(self, request: GenerationRequest) -> int:
        assert self._decoder is not None
        room = self._decoder.context_length - len(request.prompt_ids)
        if not request.prompt_ids or room < 1:
            raise ValueError(
                f"{request.request_id}: a prompt of {len(request.prompt_ids)} tokens cannot be answered in a context of "
                f"{self._decoder.context_length}; shorten the prompt or raise kv_cache_gib"
            )
        if request.params.stop and self._tokenizer is None:
            raise ValueError(
                f"{request.request_id}: stop texts need a tokenizer, which the model's folder lacks; use stop_token_ids"
            )
        return min(request.params.max_new_tokens, room)

    def _fail_answers(self, thread: SlotThread) -> None:
        cause = thread.ended.exception() if thread.ended.done() else None
        error = EngineError(f"TorchEngine failed: {cause!r}" if cause else "TorchEngine was stopped")
        for answer in self._answers:
            _settle(answer, error)


def _settle(answer: asyncio.Future[Completion], result: Completion | EngineError) -> None:
    if answer.done():
        return
    if isinstance(result, Completion):
        answer.set_result(result)
    else:
        answer.set_exception(result)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Calls `function` on `loop` from another thread, unless the loop has been closed meanwhile."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)


async def _within(future: Future[Any], timeout_s: float, what: str) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        raise EngineError(f"TorchEngine did not finish {what} within {timeout_s:.0f} s") from None
    finally:
        del future  # an error's traceback holds this frame, which must not hold the error


def _read(update: WeightUpdate, timeout_s: float) -> list[tuple[str, Tensor]]:
    """The named weights of an update, wherever they are. Blocks."""
    if update.transport == "object_store":
        from rl_lightning.weights.object_store import read_weights

        return read_weights(update.payload, timeout_s)
    if update.transport == "disk":
        from safetensors.torch import load_file

        files = sorted(Path(update.payload["path"]).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no safetensors files in {update.payload['path']}")
        return [item for file in files for item in load_file(file).items()]
    raise EngineError(f"TorchEngine cannot take weights by {update.transport}, only by {' or '.join(TorchEngine.transports)}")


def _tokenizer(model_path: str) -> Any:
    """The model's tokenizer, or None where its folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        log.info("no tokenizer in %s, stop texts cannot be used: %s", model_path, error)
        return None


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every end-of-sequence token that config, generation config and tokenizer name."""
    found: set[int] = set()
    for source in (model.config, model.generation_config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))
