"""SGLangClient: the HTTP interface of an SGLang server, as far as reinforcement learning needs it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson

from rl_lightning.engines.answer import Segment
from rl_lightning.engines.engine import EngineError
from rl_lightning.engines.sglang_hold import HOLD
from rl_lightning.engines.sglang_probe import SAMPLES
from rl_lightning.types import SamplingParams
from rl_lightning.weights.fingerprint import sampled_positions

logger = logging.getLogger(__name__)

JSON = {"Content-Type": "application/json"}
OK, BAD_REQUEST, NOT_FOUND = 200, 400, 404
KEEP_ALIVE_S = 2.0  # below the server's own 5 s, so that no request is written to a connection that is being closed
RETRY_S = (0.05, 0.2)
PROBE_RETRY_S = 0.005
REPEATABLE = frozenset(
    {
        "/server_info",
        "/abort_request",
        "/get_weights_by_name",
        "/pause_generation",
        "/continue_generation",
        "/flush_cache",
        "/update_weights_from_disk",
        "/destroy_weights_update_group",
    }
)
"""What a server may be told twice. Of the rest a scheduler may die (memory), wait for ever (groups, broadcasts), or refuse the
second call for the first one (sessions, `/generate` under the same name); a bucket in memory is opened once."""


class BrokenConnectionError(EngineError):
    """The connection broke in a call that the server may have got, and must not get twice."""


class Shown(NamedTuple):
    """What a server shows of its parameters.

    Attributes:
        values: by name, index in the sample -> value; empty where it has no such parameter.
        whole: whether everything that it holds of the samples is there.
    """

    values: Mapping[str, Mapping[int, float]]
    whole: bool


class SGLangClient:
    """Belongs to one event loop. No call has a deadline of its own: callers put one around.

    Args:
        url: of the server.
        api_key: None if it wants none.
        cause: asked when a connection breaks: why the server is dead, or empty if nothing is known to be wrong with it.
    """

    def __init__(self, url: str, api_key: str | None, cause: Any = lambda: "") -> None:
        self.url = url.rstrip("/")
        self._cause = cause
        self._aborts: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        """Ends all connections."""
        for task in self._aborts:
            task.cancel()
        await self._session.close()

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None, accept: Sequence[int] = (OK,)) -> Any:
        """(status, JSON or text) of one call.

        Where the connection breaks although the server lives, the call is made again if the server did not get it, or may.

        Raises:
            BrokenConnectionError: it may have got a call that is not `REPEATABLE`.
            EngineError: no connection, a closed client, or a status that is not in `accept`.
        """
        data = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        for pause_s in (*RETRY_S, None):
            if self._session.closed:
                raise EngineError(f"SGLang at {self.url} was stopped before it answered {path}")
            try:
                async with self._session.request(method, self.url + path, data=data, headers=JSON) as answer:
                    is_json = answer.content_type == JSON["Content-Type"]
                    content = orjson.loads(await answer.read()) if is_json else await answer.text()
                break
            except (aiohttp.ClientError, ConnectionError) as error:
                may_repeat = path in REPEATABLE or isinstance(error, aiohttp.ClientConnectorError)
                await asyncio.sleep((pause_s or 0.0) if may_repeat else sum(RETRY_S))  # a death takes that long to be seen
                if (cause := self._cause()) or (may_repeat and pause_s is None):
                    raise EngineError(f"SGLang at {self.url} died: {cause or error!r}") from error
                if not may_repeat:
                    said = f"SGLang at {self.url} may have done {path}, whose connection broke: {error!r}"
                    raise BrokenConnectionError(said) from error
        if answer.status not in accept:
            raise EngineError(f"SGLang at {self.url} answered {path} with {answer.status}: {message_of(content)}")
        return answer.status, content

    async def reachable(self) -> bool:
        """Whether anything answers at all."""
        try:
            async with self._session.get(self.url + "/model_info") as answer:
                return answer.status == OK
        except (aiohttp.ClientError, ConnectionError):
            return False

    # -- generation

    async def generate(
        self,
        rid: str,
        input_ids: Sequence[int] | np.ndarray,
        params: SamplingParams,
        most: int,
        fewest: int,
        cache: str | None = None,
    ) -> Segment:
        """One segment of at most `most` and at least `fewest` tokens, with prefixes from requests to the same `cache` only.

        Raises:
            ValueError: the server refuses the request itself, as too long for instance.
        """
        body = {
            "rid": rid,
            "input_ids": input_ids,
            "sampling_params": sampling_params(params, most, fewest),
            "return_logprob": True,
            **({} if cache is None else {"extra_key": cache}),
        }
        status, content = await self.call("POST", "/generate", body, accept=(OK, BAD_REQUEST))
        if status == BAD_REQUEST:
            raise ValueError(f"SGLang refuses a request of {len(input_ids)} tokens: {message_of(content)}")
        return read_segment(content["meta_info"])

    async def sample_one(self) -> None:
        """Returns when a token was sampled, whichever."""
        await self.generate(uuid.uuid4().hex, [0], SamplingParams(max_new_tokens=1), 1, 0)

    async def abort(self, rid: str | None = None) -> None:
        """Ends one request, or all of them."""
        await self.call("POST", "/abort_request", {"abort_all": True} if rid is None else {"rid": rid})

    def abort_soon(self, rid: str) -> None:
        """Ends one request without being waited for."""
        task = asyncio.create_task(self._abort_quietly(rid))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort_quietly(self, rid: str) -> None:
        try:
            await self.abort(rid)
        except EngineError as error:  # a server that is dead by then has freed the request anyway
            logger.debug("a request was not freed: %s", error)

    async def hold(self, rids: Sequence[str], cache: str | None = None) -> dict[str, int] | None:
        """Stops computing, with all requests kept; may be called again.

        Empties the cache, or, with the name of another `cache`, leaves requests that run what they have of it.

        Returns:
            How many tokens each of `rids` has, without those that the server has answered or not got yet; None if this
            server cannot be held and goes on.

        Raises:
            EngineError: it cannot empty its cache.
        """
        body = {"name": f"{HOLD} {json.dumps({'rids': list(rids), 'cache': cache})}"}
        status, content = await self.call("POST", "/get_weights_by_name", body, accept=(OK, BAD_REQUEST))
        if status == BAD_REQUEST:
            return None
        emptied, *counts = content
        if not emptied:
            raise EngineError(f"SGLang at {self.url} stopped, but something still uses its cache")
        return {rid: int(count) for rid, count in zip(rids, counts, strict=True) if count >= 0}

    async def refuse_requests(self, *, keep: bool = False) -> None:
        """Keeps new requests at the door of a server that is held, without which it takes no weights.

        Args:
            keep: what runs stays as it is, else it goes back to the queue and is computed again.
        """
        await self.call("POST", "/pause_generation", {"mode": "in_place" if keep else "retract"})

    async def go_on(self) -> None:
        """Ends what `hold` and `refuse_requests` began; nothing happens where they did not."""
        await self.call("POST", "/continue_generation", {"torch_empty_cache": False}, accept=(OK, NOT_FOUND))

    async def server_info(self) -> dict[str, Any]:
        """Its arguments and state; goes through the scheduler, so an answer shows that it turns."""
        _, content = await self.call("GET", "/server_info")
        return content

    # -- memory

    async def release_memory(self) -> None:
        """Lets go of weights, KV cache and CUDA graphs; nothing may be running."""
        await self.call("POST", "/release_memory_occupation", {"tags": ["kv_cache", "weights", "cuda_graph"]})

    async def resume_memory(self, *tags: str) -> None:
        """Takes memory for `tags` again; what it held is lost."""
        await self.call("POST", "/resume_memory_occupation", {"tags": tags})

    # -- weights

    async def flush(self, pause_s: float = 0.005) -> None:
        """Empties the prefix cache. The server refuses while aborted requests are being cleared away: tried until it does."""
        while (await self.call("POST", "/flush_cache", accept=(OK, BAD_REQUEST)))[0] != OK:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)

    async def load_from_disk(self, path: str) -> None:
        """Replaces the weights by those in a folder, also in a server that began with random ones (`load_format: dummy`)."""
        body = {"model_path": path, "load_format": "auto", "flush_cache": False}
        await self.call("POST", "/update_weights_from_disk", body)

    async def join_group(self, **where: Any) -> None:
        """Joins a process group; returns when all its members have."""
        await self.call("POST", "/init_weights_update_group", where)

    async def leave_group(self, group: str) -> None:
        """Leaves a group, if it is in it."""
        if group:
            await self.call("POST", "/destroy_weights_update_group", {"group_name": group}, accept=(OK, BAD_REQUEST))

    async def receive(self, group: str, bucket: Mapping[str, Any]) -> None:
        """Takes part in one broadcast and loads what it brought."""
        body = {**bucket, "group_name": group, "load_format": "flattened_bucket", "flush_cache": False}
        await self.call("POST", "/update_weights_from_distributed", body)

    async def load_from_memory(self, handles: Sequence[str]) -> None:
        """Replaces weights by those that the server's ranks find by one handle each."""
        body = {"serialized_named_tensors": list(handles), "flush_cache": False}
        await self.call("POST", "/update_weights_from_tensor", body)

    async def begin_update(self) -> bool:
        """Opens an update session where the server has such a thing (from 0.5.21 on); whether it has."""
        status, _ = await self.call("POST", "/begin_weight_update", {}, accept=(OK, NOT_FOUND))
        return bool(status == OK)

    async def end_update(self) -> None:
        """Closes the session."""
        await self.call("POST", "/end_weight_update", {})

    async def samples(self, shapes: Mapping[str, Sequence[int]]) -> Shown:
        """Sampled values of parameters, by their full shapes.

        A server that we did not start shows a first row, for parameters of few model families.

        Raises:
            EngineError: it cannot show any.
        """
        body = {"name": f"{SAMPLES} {json.dumps({'nonce': uuid.uuid4().hex, 'shapes': shapes})}"}
        while True:
            status, content = await self.call("POST", "/get_weights_by_name", body, accept=(OK, BAD_REQUEST))
            if status == BAD_REQUEST:
                rows = {name: await self._first_row(name, shape) for name, shape in shapes.items()}
                return Shown(rows, whole=False)
            if content or not shapes:
                values = [dict(zip(map(int, turns[::2]), turns[1::2], strict=True)) for turns in content]
                return Shown(dict(zip(shapes, values, strict=True)), whole=True)
            await asyncio.sleep(PROBE_RETRY_S)  # later pipeline stages have not answered yet

    async def _first_row(self, name: str, shape: Sequence[int]) -> dict[int, float]:
        _, rows = await self.call("POST", "/get_weights_by_name", {"name": name, "truncate_size": 1})
        row = rows[0] if isinstance(rows[0], list) else rows
        return {i: row[at] for i, at in enumerate(sampled_positions(math.prod(shape))) if at < len(row)}


def sampling_params(params: SamplingParams, most: int, fewest: int) -> dict[str, Any]:
    """What SGLang calls them."""
    return {
        "max_new_tokens": most,
        "min_new_tokens": fewest,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_p": 1.0 if params.greedy else params.top_p,
        "top_k": -1 if params.greedy else params.top_k,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
    }


def read_segment(meta: Mapping[str, Any]) -> Segment:
    """Tokens and log-probabilities of a `/generate` answer."""
    entries = meta.get("output_token_logprobs")
    logprobs, token_ids, *_ = zip(*entries, strict=True) if entries else ((), ())
    reason = meta["finish_reason"]["type"]
    return Segment(
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.array(logprobs, np.float32),
        reason="interrupt" if reason == "abort" else reason,
    )


def message_of(content: Any) -> str:
    """The sentence in an error answer."""
    if isinstance(content, Mapping):
        error = content.get("error") or content.get("message") or content
        content = error.get("message", error) if isinstance(error, Mapping) else error
    return str(content)[:500]
