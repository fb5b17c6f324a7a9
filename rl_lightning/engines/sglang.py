"""SGLangEngine: a real SGLang server, started and owned, or attached to, and what reinforcement learning asks of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from rl_lightning.engines.answer import Answer, Decode
from rl_lightning.engines.engine import EngineError, UpdateGivenUpError
from rl_lightning.engines.gate import GenerationGate
from rl_lightning.engines.in_flight import InFlight, versions_of
from rl_lightning.engines.open_files import raise_open_files
from rl_lightning.engines.prefix import PrefixSharing
from rl_lightning.engines.sglang_args import (
    check_server_args,
    pick_device,
    pick_dtype,
    saver_installed,
    sharing_args,
    transports_for,
)
from rl_lightning.engines.sglang_client import BrokenConnectionError, SGLangClient
from rl_lightning.engines.sglang_hold import can_hold
from rl_lightning.engines.sglang_memory import ServerMemory
from rl_lightning.engines.sglang_pause import Pause
from rl_lightning.engines.sglang_process import SGLangProcess
from rl_lightning.engines.sglang_receiver import Receiver, target_of
from rl_lightning.types import Completion, GenerationRequest, SamplingParams
from rl_lightning.weights.transport import WeightTarget, WeightUpdate

QUIET_S = 5.0
"""An engine that answered anything within this time is healthy without being asked."""

HEALTH_TIMEOUT_S = 120.0
POLL_S = 0.1


class SGLangEngine:
    """SGLang on CUDA, or on a CPU where there is none.

    A weight update interrupts generation: the server stands still with the requests inside, the prefix cache is emptied,
    the weights are replaced and proven, and the same requests go on from prompt and tokens so far.  Every token's
    log-probability is therefore that of the weights its version names, unless `keep_cache` spares that computation.
    Servers that cannot be held end the requests instead and are sent what is left of them: those that `sglang_server` did
    not start, and those with several pipeline stages (`pp_size`) or tokenizer processes (`tokenizer_worker_num`), prefill
    and decoding apart (`disaggregation_mode`), speculative decoding (`speculative_algorithm`) or a bound on their queue
    (`max_queued_requests`). Data-parallel schedulers (`dp_size`) are refused: several engines are the same.

    Log-probabilities are of the temperature-scaled distribution and not renormalised for top_p and top_k.

    Args:
        url: of a server that runs already; it is used but never ended. It must have been started by
            `python -m rl_lightning.engines.sglang_server`, or serve a Llama.
        api_key: what the server wants; None for an owned server takes a random one.
        dtype: of the weights; `auto` is bfloat16 on CUDA and float32 on CPU.
        device: `cuda` or `cpu`; `auto` takes CUDA where there is one.
        server_args: any argument of SGLang's server by its name (`mem_fraction_static`, `context_length`,
            `attention_backend`, `max_running_requests`, ...), passed on untouched. With `tp_size` and `pp_size` it spans
            as many GPUs as their product; several pipeline stages get weights by disk only.
        start_timeout_s: until a server is ready.
        request_timeout_s: for one whole answer.
        sync_timeout_s: for one weight update.
        new_tokens_per_chunk: cut answers into requests of so many tokens, for servers that cannot be interrupted.
        log_path: where an owned server's output goes; None keeps it in a temporary file until the server ends.
        colocated: share the GPU with a trainer: weights come through its memory, the server takes a smaller part of it
            (`mem_fraction_static`) and, where the package torch_memory_saver is installed, lets go of it while a
            synchronous trainer works.
        keep_cache: answers under way go on with the keys and values they have, as in PipelineRL
            ([2509.19128](https://arxiv.org/abs/2509.19128)), instead of having them computed again as in AReaL: updates
            cost no more than their pause. An answer's later tokens then come from a mixture of weights, new ones over keys
            and values of older ones; versions name the weights that computed the token itself, log-probabilities are those
            that sampled, and `engine_logprob_diff` grows by the difference. Answers that have not begun meet nothing of
            older weights. For servers that can be held; one that lets go of its memory keeps nothing.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        device: Literal["auto", "cuda", "cpu"] = "auto",
        server_args: dict[str, Any] | None = None,
        start_timeout_s: float = 300.0,
        request_timeout_s: float = 3600.0,
        sync_timeout_s: float = 300.0,
        new_tokens_per_chunk: int | None = None,
        log_path: str | None = None,
        colocated: bool = False,
        keep_cache: bool = False,
    ) -> None:
        if url is not None and colocated:
            raise ValueError("SGLangEngine got both url and colocated: only a server of its own can make room for a trainer")
        if url is not None and server_args:
            raise ValueError("SGLangEngine got both url and server_args: a server that runs already takes no arguments")
        if new_tokens_per_chunk is not None and new_tokens_per_chunk < 1:
            raise ValueError(f"new_tokens_per_chunk={new_tokens_per_chunk} must be at least 1, or null for no chunks")
        check_server_args(server_args or {})
        if keep_cache and (clash := [name for name, value in (server_args or {}).items() if not can_hold({name: value})]):
            raise ValueError(
                f"SGLangEngine got both keep_cache and server_args.{clash[0]}: such a server cannot be held; drop one"
            )
        self.url, self.api_key, self.dtype, self.device = url, api_key, dtype, device
        self.server_args = dict(server_args or {})
        self.start_timeout_s, self.request_timeout_s, self.sync_timeout_s = start_timeout_s, request_timeout_s, sync_timeout_s
        self.new_tokens_per_chunk, self.log_path, self.colocated = new_tokens_per_chunk, log_path, colocated
        self.keep_cache = keep_cache
        self._process: SGLangProcess | None = None
        self._client: SGLangClient | None = None
        self._gate: GenerationGate | None = None
        self._pause: Pause | None = None
        self._memory: ServerMemory | None = None
        self._receiver: Receiver | None = None
        self._target = WeightTarget()
        self._yields = False
        self._flight = InFlight()
        self._prefixes = PrefixSharing(self._prefill)
        self._model_path = self._cache = ""
        self._decoder: Decode | None = None
        self._context_limit = 0
        self._answered_s = 0.0

    # -- Engine

    @property
    def transports(self) -> tuple[str, ...]:
        """See `Engine.transports`; device `auto` is taken for that of the process that asks."""
        return transports_for(self.url, self.device, self.server_args, colocated=self.colocated)

    @property
    def target(self) -> WeightTarget:
        """See `Engine.target`."""
        return self._target

    async def start(self, model_path: str) -> None:
        """See `Engine.start`. An attached server must have loaded the model itself."""
        raise_open_files()
        self._model_path, self._decoder = model_path, None
        self._cache = uuid.uuid4().hex  # a server may outlive its engine, and versions begin again
        self._gate, self._prefixes, self._flight = GenerationGate(), PrefixSharing(self._prefill), InFlight()
        try:
            self._client = self._connect(model_path)
            self._pause = Pause(self._client, self._gate, self._flight)
            self._memory = ServerMemory(self._client, self._pause)
            async with asyncio.timeout(self.start_timeout_s):
                await self._until_ready()
        except TimeoutError:
            said = f"; its log ends: {self._process.tail()}" if self._process is not None else ""
            await self.stop()
            raise EngineError(f"SGLang was not ready within {self.start_timeout_s:.0f} s (start_timeout_s){said}") from None
        except BaseException:
            await self.stop()
            raise
        self._gate.open(0)

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `Engine.generate`.

        Raises:
            EngineError: the server died or did not finish within `request_timeout_s`.
            ValueError: the server refuses this request, as too long for instance.
        """
        client, _ = self._parts()
        answer = Answer(request, await self._decode_for(request.params))
        try:
            async with asyncio.timeout(self.request_timeout_s), self._prefixes.sharing(request.prompt_ids):
                while answer.finish_reason is None:
                    try:
                        await self._extend(answer)
                    except BrokenConnectionError:
                        if self._client is not client or not await client.reachable():
                            raise
        except TimeoutError:
            raise EngineError(
                f"SGLang did not finish an answer within {self.request_timeout_s:.0f} s (request_timeout_s)"
            ) from None
        return answer.completion()

    async def update_weights(self, update: WeightUpdate) -> float:
        """See `Engine.update_weights`."""
        _, gate = self._parts()
        pause, memory, receiver = self._pause, self._memory, self._receiver  # of this start: an update may end after the next
        assert pause is not None and memory is not None and receiver is not None
        try:
            async with asyncio.timeout(self.sync_timeout_s), receiver.prepared(update) as load:
                started = time.monotonic()
                cache = self._cache_of(update.version)
                async with pause.interrupted(update.version, asleep=memory.asleep, cache=cache):
                    async with memory.resumed():
                        sent = await load()
                    await receiver.prove(update.version, sent)
        except UpdateGivenUpError:
            raise
        except BaseException as error:  # whatever it was, the weights may be half replaced
            gate.fail(f"SGLang has no weights to generate with: the update to version {update.version} failed: {error!r}")
            await pause.give_up()
            if isinstance(error, TimeoutError):
                waited = f"SGLang did not take version {update.version} within {self.sync_timeout_s:.0f} s (sync_timeout_s)"
                raise EngineError(f"{waited}: {error}" if str(error) else waited) from None
            raise
        gate.open(update.version)
        return time.monotonic() - started

    async def yield_memory(self) -> None:
        """See `YieldsMemory`."""
        self._parts()
        assert self._memory is not None
        if not self._yields:
            return
        try:
            async with asyncio.timeout(self.sync_timeout_s):
                await self._memory.release()
        except TimeoutError:
            waited = f"SGLang did not let go of its memory within {self.sync_timeout_s:.0f} s (sync_timeout_s)"
            raise EngineError(waited) from None

    async def health(self) -> None:
        """See `Engine.health`: an idle engine samples a token, a busy one is asked through its scheduler."""
        client, gate = self._parts()
        if cause := self._cause_of_death():
            raise EngineError(f"SGLang died: {cause}")
        if time.monotonic() - self._answered_s < QUIET_S or not gate.is_open:
            return
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                if gate.running:
                    await client.server_info()
                else:
                    async with gate.inside():
                        await client.sample_one()
        except TimeoutError:
            if not gate.is_open:
                return  # an update came in between, which has a deadline of its own
            raise EngineError(f"SGLang at {client.url} gave no sign of life for {HEALTH_TIMEOUT_S:.0f} s") from None
        self._answered_s = time.monotonic()

    async def stop(self) -> None:
        """See `Engine.stop`. A server that was attached to goes on."""
        if self._gate is not None:
            self._gate.fail("SGLang was stopped")
        if self._client is not None:
            await self._client.close()
            self._client = None
        if self._process is not None:
            process, self._process = self._process, None
            await asyncio.to_thread(process.stop)

    # -- starting

    def _connect(self, model_path: str) -> SGLangClient:
        """A client of the server, which is started here unless it runs already."""
        if self.url is not None:
            return SGLangClient(self.url, self.api_key)
        device = pick_device(self.device)
        server_args = self.server_args
        if self.colocated:
            self._yields = saver_installed()
            server_args = {**sharing_args(device, saver=self._yields), **server_args}
        dtype = pick_dtype(self.dtype, device)
        self._process = SGLangProcess(model_path, device, dtype, server_args, self.api_key, self.log_path)
        return SGLangClient(self._process.url, self._process.api_key, self._cause_of_death)

    async def _until_ready(self) -> None:
        """Returns when a token was sampled."""
        assert self._client is not None and self._pause is not None
        while not await self._client.reachable():
            if cause := self._cause_of_death():
                raise EngineError(f"SGLang did not start: {cause}")
            await asyncio.sleep(POLL_S)
        info = await self._client.server_info()
        if int(info.get("dp_size") or 1) > 1:
            raise EngineError(f"SGLang at {self._client.url} has dp_size={info['dp_size']}, of which one part would get weights")
        self._context_limit = int(info.get("max_req_input_len") or 2**31)
        self._receiver = Receiver(self._client, info["dtype"])
        self._target = target_of(info)
        await self._pause.prepare(info)
        if self.keep_cache and not self._pause.holds:
            raise EngineError(f"SGLang at {self._client.url} cannot be held: set keep_cache to false")
        await self._client.sample_one()
        if self.url is not None:
            await self._client.samples({"model.norm.weight": (1,)})

    def _cause_of_death(self) -> str:
        return self._process.cause_of_death() if self._process is not None else ""

    def _parts(self) -> tuple[SGLangClient, GenerationGate]:
        if self._client is None or self._gate is None:
            raise EngineError("SGLang is not running: call start first")
        return self._client, self._gate

    # -- generating

    async def _extend(self, answer: Answer) -> None:
        """One segment, from entering the gate to leaving it."""
        client, gate = self._parts()
        async with gate.inside() as version:
            context = answer.context
            if len(context) >= self._context_limit and len(context) > len(answer.request.prompt_ids):
                answer.cut_short()
                return
            await self._prefixes.cached(answer.request.prompt_ids, version)
            if not gate.is_open or gate.version != version:
                return  # nothing may be sent now, or under another version
            most, fewest = answer.next_limits(self.new_tokens_per_chunk)
            rid = f"{answer.request.request_id}-{uuid.uuid4().hex}"
            with self._flight.request(rid, version) as spans:
                try:
                    segment = await client.generate(rid, context, answer.request.params, most, fewest, self._cache_of(version))
                except (asyncio.CancelledError, BrokenConnectionError):  # the server may go on with it
                    client.abort_soon(rid)
                    raise
            self._answered_s = time.monotonic()
        answer.add(segment, versions_of(spans, len(segment.token_ids)), most)

    async def _prefill(self, prompt_ids: Sequence[int]) -> None:
        client, gate = self._parts()
        await client.generate(uuid.uuid4().hex, prompt_ids, SamplingParams(), 0, 0, self._cache_of(gate.version))

    def _cache_of(self, version: int) -> str | None:
        """Name of what answers that begin under `version` share; None: all share one cache, which updates empty."""
        return f"{self._cache}.{version}" if self.keep_cache else None

    async def _decode_for(self, params: SamplingParams) -> Decode | None:
        if params.stop and self._decoder is None:
            from rl_lightning.prompts.tokenizer import load_tokenizer

            tokenizer: Any = await asyncio.to_thread(load_tokenizer, self._model_path)
            self._decoder = lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))
        return self._decoder
