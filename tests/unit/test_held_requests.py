"""Requests that a weight update meets in the server, or on their way to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl_lightning.engines.answer import Segment
from rl_lightning.engines.engine import EngineError
from rl_lightning.engines.gate import GenerationGate
from rl_lightning.engines.in_flight import InFlight
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.engines.sglang_client import SGLangClient
from rl_lightning.engines.sglang_hold import count_tokens, leave_cache
from rl_lightning.engines.sglang_pause import Pause
from rl_lightning.types import GenerationRequest, SamplingParams


def held_request(rid: str, tokens: int, *, finished: bool = False, chunks: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        rid=rid, output_ids=[7] * tokens, finished=lambda: finished, is_retracted=False, inflight_middle_chunks=chunks
    )


def test_tokens_that_are_sampled_but_not_handed_out_are_counted() -> None:
    waiting, chunked = held_request("waiting", 0), held_request("chunked", 0, chunks=1)
    running, ended, prompt = held_request("running", 4), held_request("ended", 9, finished=True), held_request("prompt", 0)
    batch = SimpleNamespace(reqs=[running, ended, prompt, chunked])
    scheduler = SimpleNamespace(
        waiting_queue=[waiting],
        chunked_req=chunked,
        running_batch=SimpleNamespace(reqs=[running, ended]),
        last_batch=batch,
        result_queue=[(batch, None)],
    )
    assert count_tokens(scheduler) == {"waiting": 0, "chunked": 0, "running": 5, "ended": 9, "prompt": 1}
    scheduler.result_queue.clear()
    assert count_tokens(scheduler) == {"waiting": 0, "chunked": 0, "running": 4, "ended": 9, "prompt": 0}
    assert leave_cache(scheduler, "next") and waiting.extra_key == "next" and not hasattr(running, "extra_key")


class SlowPrefill(SGLangClient):
    """Answers a prompt after new weights have come, and everything else with as many tokens as asked for."""

    def __init__(self, gate: GenerationGate) -> None:
        self.gate, self.caches = gate, list[str | None]()

    async def generate(
        self,
        rid: str,
        input_ids: Sequence[int] | np.ndarray,
        params: SamplingParams,
        most: int,
        fewest: int,
        cache: str | None = None,
    ) -> Segment:
        self.caches.append(cache)
        if most == 0 and self.gate.version == 0:
            self.gate.open(1)
        return Segment(np.zeros(most, np.int32), np.zeros(most, np.float32), "length")


def test_an_answer_that_waits_for_its_prompt_while_weights_come_begins_under_them() -> None:
    async def scenario() -> None:
        engine = SGLangEngine(device="cpu", keep_cache=True)
        engine._gate, engine._cache = GenerationGate(), "start"
        client = engine._client = SlowPrefill(engine._gate)
        engine._gate.open(0)
        request = GenerationRequest("r", tuple(range(9)), SamplingParams(max_new_tokens=3))
        for completion in await asyncio.gather(engine.generate(request), engine.generate(request)):
            assert completion.versions.tolist() == [1, 1, 1]
        assert client.caches == ["start.0", *3 * ["start.1"]]

    asyncio.run(scenario())


class PlainServer(SGLangClient):
    """A server that was started without our hooks."""

    def __init__(self) -> None:
        self.url = "http://plain"

    async def reachable(self) -> bool:
        return True

    async def server_info(self) -> dict[str, Any]:
        return {"dtype": "float32"}

    async def hold(self, rids: Sequence[str], cache: str | None = None) -> dict[str, int] | None:
        return None

    async def go_on(self) -> None:
        pass


def test_a_server_that_cannot_be_held_cannot_keep_its_cache() -> None:
    async def scenario() -> None:
        engine = SGLangEngine(url="http://plain", keep_cache=True)
        client = engine._client = PlainServer()
        engine._pause = Pause(client, GenerationGate(), InFlight())
        await engine._until_ready()

    with pytest.raises(EngineError, match="http://plain cannot be held: set keep_cache to false"):
        asyncio.run(scenario())
