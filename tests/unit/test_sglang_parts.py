"""The parts of SGLangEngine that need no server."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import resource
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rl_lightning.engines.answer import Answer, Segment
from rl_lightning.engines.engine import EngineError, UpdateGivenUpError
from rl_lightning.engines.gate import GenerationGate
from rl_lightning.engines.in_flight import InFlight, versions_of
from rl_lightning.engines.prefix import PrefixSharing
from rl_lightning.engines.sglang import SGLangEngine
from rl_lightning.engines.sglang_args import parallel_sizes, server_command, server_env, sharing_args, transports_for
from rl_lightning.engines.sglang_client import SGLangClient, Shown, read_segment, sampling_params
from rl_lightning.engines.sglang_cpu_speed import attend
from rl_lightning.engines.sglang_hold import _go_on_from_here, can_hold
from rl_lightning.engines.sglang_memory import ServerMemory
from rl_lightning.engines.sglang_pause import Pause
from rl_lightning.engines.sglang_probe import SAMPLES, _parts, exchange_parts, find_parameter, held_values, shard_starts
from rl_lightning.engines.sglang_process import SGLangProcess
from rl_lightning.engines.sglang_receiver import Receiver, as_held
from rl_lightning.engines.sglang_server import wants_cpu
from rl_lightning.types import GenerationRequest, SamplingParams
from rl_lightning.weights.channel import SyncChannel, serve_store
from rl_lightning.weights.fingerprint import find_mismatch
from rl_lightning.weights.transport import Sample, WeightUpdate


def make_answer(stop: tuple[str, ...] = (), least: int = 0, most: int = 10) -> Answer:
    params = SamplingParams(max_new_tokens=most, min_new_tokens=least, stop=stop)
    return Answer(GenerationRequest("a", (1, 2), params), lambda ids: "".join(map(chr, ids)))


def add(answer: Answer, text: str, reason: str, version: int, asked: int) -> None:
    tokens, logprobs = np.array([ord(c) for c in text], np.int32), np.full(len(text), -1, np.float32)
    answer.add(Segment(tokens, logprobs, reason), np.full(len(text), version, np.int32), asked)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(1, 15), st.integers(0, 15))
def test_limits_hold_over_all_segments_together(interrupts: list[int], most: int, least: int) -> None:
    answer = make_answer(least=min(least, most), most=most)
    for version, n in enumerate([*interrupts, most]):
        asked, fewest = answer.next_limits()
        assert 0 <= fewest <= asked
        n = min(n, asked)
        add(answer, "x" * n, "length" if n == asked else "interrupt", version, asked)
        if answer.finish_reason:
            break
    completion = answer.completion()
    assert (len(completion), completion.finish_reason) == (most, "length")
    assert sorted(completion.versions.tolist()) == completion.versions.tolist()


def test_a_stop_before_the_minimum_does_not_end_the_answer() -> None:
    answer = make_answer(least=4)
    add(answer, "ab", "stop", 0, 10)
    assert answer.finish_reason is None and answer.next_limits() == (8, 2)
    add(answer, "cd", "stop", 0, 8)
    assert answer.finish_reason == "stop" and answer.context.tolist() == [1, 2, *map(ord, "abcd")]


def test_a_stop_text_before_the_minimum_does_not_end_the_answer_later() -> None:
    answer = make_answer(stop=("END", "\n"), least=4)
    add(answer, "END", "stop", 0, 10)
    add(answer, "x", "interrupt", 0, 7)
    assert answer.finish_reason is None
    add(answer, "\n", "interrupt", 0, 6)
    assert answer.finish_reason == "stop" and len(answer.completion()) == 5


def test_a_stop_text_across_segments_is_found_token_by_token() -> None:
    answer = make_answer(stop=("END",))
    add(answer, "xE", "interrupt", 0, 10)
    assert answer.next_limits() == (1, 0)
    add(answer, "N", "length", 1, 1)
    assert answer.next_limits() == (1, 0) and answer.finish_reason is None
    add(answer, "D", "length", 1, 1)
    assert answer.finish_reason == "stop"
    assert answer.completion().versions.tolist() == [0, 0, 1, 1]


def test_a_stop_text_that_was_none_goes_on_at_full_length() -> None:
    answer = make_answer(stop=("END",))
    add(answer, "xE", "interrupt", 0, 10)
    add(answer, "a", "length", 1, 1)
    assert answer.next_limits() == (7, 0) and answer.finish_reason is None


def test_a_full_context_ends_an_answer_and_a_chunk_does_not() -> None:
    answer = make_answer()
    asked, _ = answer.next_limits(chunk=3)
    add(answer, "abc", "length", 0, asked)
    assert answer.finish_reason is None
    add(answer, "d", "length", 0, 7)
    assert answer.finish_reason == "length" and len(answer.completion()) == 4


def test_nobody_enters_a_closed_gate_and_the_version_holds_inside() -> None:
    async def scenario() -> list[int]:
        gate, seen = GenerationGate(), []

        async def one() -> None:
            async with gate.inside() as version:
                seen.append(version)
                await asyncio.sleep(0)

        gate.open(3)
        async with gate.inside():
            gate.close()
            late = asyncio.create_task(one())
            assert not await gate.empty(0.01)
        assert await gate.empty(0.01) and not seen
        gate.open(4)
        await late
        gate.fail("broken")
        with pytest.raises(EngineError, match="broken"):
            await one()
        return seen

    assert asyncio.run(scenario()) == [4]


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 20))
def test_every_token_has_the_version_that_was_live_when_it_came(sampled: list[int], rest: int) -> None:
    flight, expected, done = InFlight(), [], 0
    with flight.request("a", 7) as spans:
        assert flight.rids == ["a"]
        for i, n in enumerate(sampled):
            expected, done = expected + n * [7 + i], done + n
            flight.change(8 + i, {"a": done, "gone": 3})
        expected += rest * [7 + len(sampled)]
    assert versions_of(spans, len(expected)).tolist() == expected and not flight.rids
    assert versions_of(spans, done // 2).tolist() == expected[: done // 2]  # what came back of one that was given up


def test_a_server_whose_requests_are_in_one_queue_can_be_held() -> None:
    assert can_hold({"pp_size": 1, "speculative_algorithm": None, "tp_size": 4})
    assert not can_hold({"pp_size": 2}) and not can_hold({"speculative_algorithm": "EAGLE"})


class HeldClient(SGLangClient):
    """A server that can be held: notes what it is asked, and answers `hold` by what it was given, one after the other."""

    def __init__(self, *counts: dict[str, int] | None) -> None:
        self.url, self.asked, self._counts = "http://held", list[str](), iter(counts)

    async def hold(self, rids: Sequence[str], cache: str | None = None) -> dict[str, int] | None:
        self.asked.append("hold" if cache is None else f"hold {cache}")
        return next(self._counts)

    async def call(self, method: str, path: str, body: object = None, accept: Sequence[int] = ()) -> tuple[int, None]:
        self.asked.append(f"{path} in_place" if body == {"mode": "in_place"} else path)
        return 200, None


def test_a_held_server_goes_on_with_its_requests_once_all_of_them_are_counted() -> None:
    async def scenario() -> list[tuple[int, int]]:
        client, gate, flight = HeldClient({}, {}, {"a": 5}), GenerationGate(), InFlight()
        pause = Pause(client, gate, flight)
        await pause.prepare({})
        gate.open(3)
        with flight.request("a", 3) as spans:
            async with pause.interrupted(4, asleep=False):
                assert not gate.is_open and client.asked[2:] == ["hold", "hold", "/pause_generation"]
        assert client.asked[:2] == ["hold", "/continue_generation"] and client.asked[5:] == ["/continue_generation"]
        return spans

    assert asyncio.run(scenario()) == [(0, 3), (5, 4)]


def test_a_server_that_keeps_its_cache_is_held_in_place() -> None:
    async def scenario() -> list[str]:
        client = HeldClient({}, {"a": 5})
        pause = Pause(client, GenerationGate(), flight := InFlight())
        await pause.prepare({})
        with flight.request("a", 3) as spans:
            async with pause.interrupted(4, asleep=False, cache="four"):
                pass
        assert spans == [(0, 3), (5, 4)]
        return client.asked[2:]

    assert asyncio.run(scenario()) == ["hold four", "/pause_generation in_place", "/continue_generation"]


@pytest.mark.parametrize(("holds", "asleep"), [(False, False), (True, True)])
def test_a_server_that_is_not_held_is_rid_of_its_requests(holds: bool, asleep: bool) -> None:
    async def scenario() -> None:
        client, gate = HeldClient({}), GenerationGate()
        pause = Pause(client, gate, InFlight())
        pause.holds = holds
        gate.open(3)
        async with pause.interrupted(4, asleep=asleep):
            assert not gate.is_open
        assert client.asked == ["/abort_request", "/flush_cache"]

    asyncio.run(scenario())


def test_memory_that_several_trainer_ranks_ask_for_at_once_is_let_go_once() -> None:
    class Server(HeldClient):
        async def call(self, method: str, path: str, body: object = None, accept: Sequence[int] = ()) -> tuple[int, None]:
            await asyncio.sleep(0.001)
            return await super().call(method, path, body, accept)

    async def scenario() -> list[str]:
        client = Server()
        memory = ServerMemory(client, Pause(client, GenerationGate(), InFlight()))
        await asyncio.gather(*(memory.release() for _ in range(4)))
        assert memory.asleep
        return client.asked

    assert asyncio.run(scenario()).count("/release_memory_occupation") == 1


@pytest.mark.parametrize("during_update", [True, False])
def test_silence_is_a_death_unless_an_update_explains_it(during_update: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(HeldClient):
        async def sample_one(self) -> None:
            if during_update:
                gate.close()
            await asyncio.Event().wait()

    async def scenario() -> None:
        engine._client, engine._gate = Silent(), gate
        gate.open(3)
        await engine.health()

    monkeypatch.setattr("rl_lightning.engines.sglang.HEALTH_TIMEOUT_S", 0.02)
    engine, gate = SGLangEngine(device="cpu"), GenerationGate()
    if during_update:
        asyncio.run(scenario())
    else:
        with pytest.raises(EngineError, match="no sign of life"):
            asyncio.run(scenario())


def test_an_update_that_fails_late_leaves_a_server_alone_that_was_started_meanwhile() -> None:
    class Trainer:
        """Goes away when a new server is up."""

        @asynccontextmanager
        async def prepared(self, update: WeightUpdate) -> AsyncIterator[None]:
            start(new)
            raise EngineError("the trainer went away")
            yield

    def start(client: HeldClient) -> None:
        engine._client, engine._gate = client, GenerationGate()
        engine._pause = Pause(client, engine._gate, InFlight())
        engine._pause.holds = True
        engine._memory, engine._receiver = ServerMemory(client, engine._pause), Trainer()  # type: ignore[assignment]
        engine._gate.open(0)

    engine, old, new = SGLangEngine(device="cpu"), HeldClient(), HeldClient()
    start(old)
    with pytest.raises(EngineError, match="went away"):
        asyncio.run(engine.update_weights(WeightUpdate(1, "tensor", {}, None)))
    assert (old.asked, new.asked) == (["/pause_generation", "/abort_request"], [])


def test_an_update_that_others_give_up_leaves_the_server_as_it_was() -> None:
    class Trainer:
        @asynccontextmanager
        async def prepared(self, update: WeightUpdate) -> AsyncIterator[None]:
            raise UpdateGivenUpError("engine 1 died")
            yield

    engine, client, gate = SGLangEngine(device="cpu"), HeldClient(), GenerationGate()
    engine._client, engine._gate, engine._pause = client, gate, Pause(client, gate, InFlight())  # type: ignore[assignment]
    engine._memory, engine._receiver = ServerMemory(client, engine._pause), Trainer()  # type: ignore[arg-type, assignment]
    gate.open(3)
    with pytest.raises(UpdateGivenUpError, match="engine 1 died"):
        asyncio.run(engine.update_weights(WeightUpdate(4, "tensor", {}, None)))
    assert gate.is_open and gate.version == 3 and client.asked == []


def test_a_trainer_that_dies_before_it_agreed_leaves_the_server_as_it_was() -> None:
    async def scenario() -> None:
        store = serve_store("127.0.0.1")
        payload = {"host": "127.0.0.1", "port": store.port, "sync": "s", "engine": 0}
        prepared = Receiver(client, "float32").prepared(WeightUpdate(1, "distributed", payload, None))
        entered = asyncio.create_task(prepared.__aenter__())  # type: ignore[arg-type]
        while not store.check(["s/group/0"]):
            await asyncio.sleep(0.01)
        del store
        with pytest.raises(UpdateGivenUpError, match="the trainer died"):
            await asyncio.wait_for(entered, 60)

    client = HeldClient()
    asyncio.run(scenario())
    assert client.asked == []


def test_a_server_that_waits_for_the_others_is_told_when_one_gives_up() -> None:
    class Waiting(HeldClient):
        async def join_group(self, **where: object) -> None:
            pass

        async def receive(self, group: str, bucket: Mapping[str, object]) -> None:
            trainer.fail("engine 1 refused")
            await asyncio.Event().wait()

    async def scenario() -> None:
        receiver = Receiver(Waiting(), "float32")
        async with receiver.prepared(WeightUpdate(1, "distributed", payload, None)) as load:
            await load()

    store = serve_store("127.0.0.1")
    trainer = SyncChannel(store, "s")
    trainer.go("group")
    payload = {"host": "127.0.0.1", "port": store.port, "sync": "s", "engine": 0, "buckets": [{}]}
    payload |= {"rank": 1, "world_size": 3, "backend": "nccl"}
    with pytest.raises(EngineError, match="given up: engine 1 refused"):
        asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_server_that_was_started_anew_cannot_be_held_any_more() -> None:
    async def scenario() -> None:
        pause = Pause(HeldClient({}, None), GenerationGate(), InFlight())
        await pause.prepare({})
        async with pause.interrupted(1, asleep=False):
            pass

    with pytest.raises(EngineError, match="http://held cannot be held any more"):
        asyncio.run(scenario())


def test_an_engine_may_have_more_connections_than_the_shell_that_ray_was_started_in() -> None:
    async def scenario() -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
        with pytest.raises(EngineError, match="not ready"):
            await SGLangEngine(url, start_timeout_s=0.2).start("m")
        opened = await asyncio.gather(*(asyncio.open_connection(*server.sockets[0].getsockname()) for _ in range(50)))
        for _, writer in opened:
            writer.close()
        server.close()
        return len(opened)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert asyncio.run(scenario()) == 50
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_server_that_cannot_be_started_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        SGLangProcess("m", "cpu", "float32", {}, log_path=str(tmp_path / "missing" / "log"))
    assert not list(tmp_path.iterdir())


def test_a_retracted_request_goes_on_as_if_its_tokens_were_its_prompt() -> None:
    params = SimpleNamespace(min_new_tokens=5)
    request = SimpleNamespace(
        sampling_params=params, origin_input_ids=[1, 2, 3], output_ids=[4, 5], return_logprob=True, logprob_start_len=3
    )
    _go_on_from_here(None, request)
    assert (params.min_new_tokens, request.logprob_start_len) == (3, 5)
    request.output_ids = [4, 5, 6, 7]
    _go_on_from_here(None, request)
    assert (params.min_new_tokens, request.logprob_start_len) == (1, 7)


def test_a_shared_prompt_is_prefilled_once_for_each_version() -> None:
    filled: list[int] = []

    async def scenario() -> None:
        sharing = PrefixSharing(prefill)
        await asyncio.gather(*(one(sharing, tuple(range(9)), version) for version in (0, 0, 0)))
        await asyncio.gather(*(one(sharing, tuple(range(9)), version) for version in (1, 1)))
        await one(sharing, tuple(range(9)), 2)
        await asyncio.gather(*(one(sharing, (1, 2), 3) for _ in range(3)))
        assert not sharing._sharers and not sharing._filled

    async def one(sharing: PrefixSharing, prompt: tuple[int, ...], version: int) -> None:
        async with sharing.sharing(prompt):
            await sharing.cached(prompt, version)

    async def prefill(prompt: object) -> None:
        filled.append(1)
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert len(filled) == 2


def test_server_arguments_pass_through_and_win() -> None:
    command = server_command("m", 5, "cpu", "float32", {"max_total_tokens": 7, "sleep_on_idle": False, "cuda_graph_bs": [1, 2]})
    assert command[command.index("--max-total-tokens") + 1] == "7"
    assert "--sleep-on-idle" not in command and "--disable-overlap-schedule" in command
    assert command[command.index("--cuda-graph-bs") + 1 :][:2] == ["1", "2"]
    assert wants_cpu(command) and not wants_cpu(server_command("m", 5, "cuda", "bfloat16", {}))
    assert "secret" not in " ".join(command) and "secret" in server_env("cpu", "secret", Path("/tmp/x")).values()


@pytest.mark.parametrize(
    "arguments",
    [
        {"server_args": {"port": 1}},
        {"server_args": {"dp_size": 2}},
        {"server_args": {"data-parallel-size": "4"}},
        {"url": "http://x", "server_args": {"a": 1}},
        {"new_tokens_per_chunk": 0},
        {"url": "http://x", "colocated": True},
        {"keep_cache": True, "server_args": {"pp-size": 2}},
    ],
)
def test_contradictory_settings_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="SGLangEngine|new_tokens_per_chunk"):
        SGLangEngine(**arguments)  # type: ignore[arg-type]


def test_a_server_beside_a_trainer_takes_less_memory_and_says_why_where_it_keeps_it(caplog: pytest.LogCaptureFixture) -> None:
    assert sharing_args("cuda", saver=True) == {"enable_memory_saver": True, "mem_fraction_static": 0.4}
    assert not caplog.records
    assert sharing_args("cuda", saver=False) == {"mem_fraction_static": 0.2} and "torch_memory_saver" in caplog.text
    assert SGLangEngine(device="cuda", colocated=True).transports == ("tensor", "disk")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_a_server_that_can_let_go_of_its_memory_gets_no_expandable_segments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128,expandable_segments:True")
    assert name not in server_env("cuda", "key", Path("/tmp/x"))
    env = server_env("cuda", "key", Path("/tmp/x"), saver=True)
    assert env[name] == "max_split_size_mb:128,expandable_segments:False"


def test_an_engine_travels_to_its_worker() -> None:
    engine = pickle.loads(pickle.dumps(SGLangEngine(device="cpu", server_args={"context_length": 64})))
    assert engine.server_args == {"context_length": 64}


def test_every_sampling_parameter_is_sent() -> None:
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, stop=("x",), stop_token_ids=(3,))
    sent = sampling_params(params, 9, 2)
    assert sent == {
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7,
        "stop": ["x"], "stop_token_ids": [3],
    }  # fmt: skip
    assert sampling_params(SamplingParams(greedy=True), 9, 0)["temperature"] == 0.0


def test_an_aborted_request_that_never_ran_is_an_empty_segment() -> None:
    for entries in ({}, {"output_token_logprobs": []}):
        segment = read_segment({"finish_reason": {"type": "abort"}, **entries})
        assert (segment.token_ids.tolist(), segment.logprobs.tolist(), segment.reason) == ([], [], "interrupt")


def test_tokens_and_their_logprobs_become_arrays() -> None:
    segment = read_segment({"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-0.5, 7, None], [-1.5, 9, None]]})
    assert segment.token_ids.dtype == np.int32 and segment.token_ids.tolist() == [7, 9]
    assert segment.logprobs.dtype == np.float32 and segment.logprobs.tolist() == [-0.5, -1.5]


def test_held_values_take_the_type_of_the_server() -> None:
    sent = {"a": Sample((2,), (0.5, 1.0))}
    fits = Shown({"a": {0: 0.5, 1: 1.0}, "b": {}}, whole=True)
    assert as_held(fits, sent, "auto")("a").dtype == torch.bfloat16  # type: ignore[union-attr]
    assert as_held(Shown({"a": {0: 1 + 2**-10}}, whole=True), sent, "auto")("a").dtype == torch.float16  # type: ignore[union-attr]
    assert as_held(fits, sent, "float32")("b") is None


def test_what_a_server_does_not_show_counts_only_where_it_shows_everything() -> None:
    sent = {"a": Sample((2,), (0.5, 1.0))}
    assert find_mismatch(sent, as_held(Shown({"a": {0: 0.5}}, whole=False), sent, "float32")) is None
    assert find_mismatch(sent, as_held(Shown({"a": {0: 0.5}}, whole=True), sent, "float32")) is not None


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))
def test_shards_of_all_ranks_cover_the_parameter(size: int, shards: int) -> None:
    """Fewer shards than ranks (key-value heads) are copied; as many or none (norms) are the usual cases."""
    shards = min(shards, size)
    starts = [shard_starts([16 // shards, 3], [16, 3], rank, size) for rank in range(size)]
    assert [start[0] for start in starts] == sorted(i * 16 // shards for i in range(shards) for _ in range(size // shards))
    assert all(start[1] == 0 for start in starts)


def test_each_rank_shows_what_it_holds_of_a_sample() -> None:
    full = torch.arange(24.0).view(4, 6)
    for rank in range(2):
        model = torch.nn.Module()
        model.rows = torch.nn.Linear(6, 2, bias=False)
        model.columns = torch.nn.Linear(3, 4, bias=False)
        model.rows.weight.data = full[2 * rank : 2 * rank + 2]
        model.columns.weight.data = full[:, 3 * rank : 3 * rank + 3].contiguous()
        rows, columns = (held_values(model, f"{name}.weight", (4, 6), rank, 2) for name in ("rows", "columns"))
        assert rows == {i: float(i) for i in range(12 * rank, 12 * rank + 12)}
        assert columns == {i: float(i) for i in range(24) if 3 * rank <= i % 6 < 3 * rank + 3}
    assert held_values(model, "other.weight", (4, 6), 0, 2) == {}


def test_parts_of_an_earlier_question_do_not_count() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        store = dist.distributed_c10d._get_default_store()
        for rank, nonce in enumerate(("now", "before")):
            store.set(f"{SAMPLES}/{rank}", json.dumps({"nonce": nonce, "part": [[[0, 0.5]]]}))
        assert _parts(store, [f"{SAMPLES}/{rank}" for rank in range(3)], "now") == [[{0: 0.5}]]
        assert exchange_parts("now", [{1: 2.0}], stage_size=1) == [[{1: 2.0}]]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("args", "sizes"),
    [({}, (1, 1)), ({"tp_size": 2, "pipeline-parallel-size": "4"}, (2, 4)), ({"tp": 8, "pp_size": None}, (8, 1))],
)
def test_parallel_sizes_by_any_of_their_names(args: dict[str, object], sizes: tuple[int, int]) -> None:
    assert parallel_sizes(args) == sizes


@pytest.mark.parametrize(
    ("url", "device", "args", "colocated", "transports"),
    [
        (None, "cuda", {}, False, ("distributed", "disk", "tensor")),
        ("http://x", "cpu", {}, False, ("distributed", "disk", "tensor")),
        (None, "cpu", {"tp": 2}, False, ("disk", "tensor", "distributed")),
        (None, "cpu", {}, True, ("tensor", "disk")),
        (None, "cuda", {"pp_size": 2}, True, ("disk",)),
    ],
)
def test_transports_of_every_kind_of_server(
    url: str | None, device: str, args: dict[str, object], colocated: bool, transports: tuple[str, ...]
) -> None:
    assert transports_for(url, device, args, colocated=colocated) == transports


@pytest.mark.parametrize("args", [{"tp": 2, "tp_size": 2}, {"pp_size": 0}, {"tp_size": "two"}])
def test_parallel_sizes_that_make_no_sense(args: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="as a whole number above 0"):
        parallel_sizes(args)


def test_ranks_of_a_server_share_the_cores() -> None:
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in server_env("cpu", "key", Path("/tmp/x"))
    assert server_env("cpu", "key", Path("/tmp/x"), 3)["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 2


def test_packed_projections_are_found_by_their_own_names() -> None:
    class Packed(torch.nn.Module):
        def __init__(self, rows: int, **sizes: object) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.arange(rows * 2.0).view(rows, 2))
            self.__dict__.update(sizes)

    layer = torch.nn.Module()
    layer.qkv_proj = Packed(8, q_proj_shard_size=4, kv_proj_shard_size=2)
    layer.gate_up_proj = Packed(6, output_partition_sizes=[3, 3])
    model = torch.nn.Module()
    model.layer = layer
    first = {n: find_parameter(model, f"layer.{n}_proj.weight").reshape(-1)[0].item() for n in ("q", "k", "v", "gate", "up")}  # type: ignore[union-attr]
    assert first == {"q": 0, "k": 8, "v": 12, "gate": 0, "up": 6}
    assert find_parameter(model, "layer.other_proj.weight") is None


def test_padded_attention_equals_torch() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    visible = torch.arange(5) <= torch.tensor([[[2], [3], [4]], [[0], [1], [2]]])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=visible[:, None], enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(attend(query, key, value, visible, None), expected)


def test_a_stopped_client_says_so() -> None:
    async def call_after_close() -> None:
        client = SGLangClient("http://127.0.0.1:9", None)
        await client.close()
        await client.server_info()

    with pytest.raises(EngineError, match="was stopped before it answered /server_info"):
        asyncio.run(call_after_close())
