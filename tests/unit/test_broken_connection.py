"""Connections to an SGLang server that break when it has got the call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web

from rl_lightning.engines.answer import Segment
from rl_lightning.engines.engine import EngineError
from rl_lightning.engines.gate import GenerationGate
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.engines.sglang_client import SGLangClient
from rl_lightning.types import GenerationRequest, SamplingParams

Call = Callable[[SGLangClient], Awaitable[object]]


@asynccontextmanager
async def breaking_server() -> AsyncIterator[tuple[str, list[str]]]:
    """(url, paths it was asked for) of a server that breaks its first connection, and answers the others with `[true]`."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        asked.append(request.path)
        if len(asked) == 1 and request.transport is not None:
            request.transport.abort()
        return web.json_response([True])

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    finally:
        await runner.cleanup()


async def call_and_break(call: Call, cause: str = "") -> tuple[int, str]:
    """(how often the server got the call, what the caller was told went wrong)."""
    async with breaking_server() as (url, asked):
        client, said = SGLangClient(url, None, lambda: cause), ""
        try:
            await call(client)
        except EngineError as error:
            said = str(error)
        finally:
            await client.close()
        return len(asked), said


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.server_info(),
        lambda client: client.abort(),
        lambda client: client.hold([]),
        lambda client: client.refuse_requests(),
        lambda client: client.go_on(),
        lambda client: client.flush(),
        lambda client: client.load_from_disk("/weights"),
        lambda client: client.leave_group("group"),
    ],
)
def test_what_a_server_may_be_told_twice_is_told_again(call: Call) -> None:
    assert asyncio.run(call_and_break(call)) == (2, "")


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.sample_one(),
        lambda client: client.release_memory(),
        lambda client: client.resume_memory("weights"),
        lambda client: client.join_group(group_name="group"),
        lambda client: client.begin_update(),
        lambda client: client.receive("group", {}),
        lambda client: client.load_from_memory(["handle"]),
        lambda client: client.end_update(),
    ],
)
def test_what_a_server_may_be_told_once_is_not_told_again(call: Call) -> None:
    times, said = asyncio.run(call_and_break(call))
    assert times == 1 and "may have done" in said
    assert "died: 'out of memory'" in asyncio.run(call_and_break(call, cause="out of memory"))[1]


def test_a_call_that_never_left_is_made_again() -> None:
    tries = 0

    def cause() -> str:
        nonlocal tries
        tries += 1
        return ""

    async def scenario() -> None:
        client = SGLangClient("http://127.0.0.1:9", None, cause)
        try:
            await client.begin_update()
        finally:
            await client.close()

    with pytest.raises(EngineError, match="died"):
        asyncio.run(scenario())
    assert tries == 3


@pytest.mark.parametrize("alive", [True, False])
def test_an_answer_whose_connection_broke_is_asked_for_again_under_another_name(alive: bool) -> None:
    class Client(SGLangClient):
        """Its first connection breaks with the server having got the request."""

        sent, aborted = list[str](), list[str]()

        async def generate(
            self,
            rid: str,
            input_ids: Sequence[int] | np.ndarray,
            params: SamplingParams,
            most: int,
            fewest: int,
            cache: str | None = None,
        ) -> Segment:
            self.sent.append(rid)
            if len(self.sent) == 1:
                await super().generate(rid, input_ids, params, most, fewest, cache)
            return Segment(np.zeros(most, np.int32), np.zeros(most, np.float32), "length")

        async def reachable(self) -> bool:
            return alive

        def abort_soon(self, rid: str) -> None:
            self.aborted.append(rid)

    async def scenario() -> None:
        engine, gate = SGLangEngine(device="cpu"), GenerationGate()
        gate.open(0)
        async with breaking_server() as (url, asked):
            client = engine._client = Client(url, None)
            engine._gate, engine._context_limit = gate, 100
            try:
                answer = await engine.generate(GenerationRequest("r", (1, 2), SamplingParams(max_new_tokens=3)))
            finally:
                await client.close()
        first, second = client.sent
        assert len(answer.token_ids) == 3 and first != second and client.aborted == [first] and asked == ["/generate"]

    if alive:
        asyncio.run(scenario())
    else:
        with pytest.raises(EngineError, match="may have done /generate"):
            asyncio.run(scenario())
