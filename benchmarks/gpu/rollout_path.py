"""What the way through RolloutWorker costs: the same requests by a bare HTTP client, by SGLangEngine and by RolloutWorker.

    python benchmarks/gpu/rollout_path.py --shape 1.7b

Groups of answers of one length go to one server, as many at a time as asked for, and the three ways take turns.  The bare
client sends each request and reads the JSON of its answer.  The engine adds the sharing of prompts, the gate and the arrays
of a Completion; the worker adds leases from the real controller, decoding, scoring and finished groups.  What a run does once,
opening connections and starting a worker, is done before a turn's time begins.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_machine import benchmark_parser  # noqa: E402
from random_qwen3 import SHAPES  # noqa: E402
from served_engine import request, server_args, write_rows, write_shape  # noqa: E402

if TYPE_CHECKING:
    from rl_lightning.engines.sglang import SGLangEngine
    from rl_lightning.types import Prompt

logger = logging.getLogger("rollout_path")

BARE, ENGINE, WORKER = "bare client", "SGLangEngine", "RolloutWorker"
COLUMNS = {
    "way": "way",
    "tokens_per_s": "tokens/s, median",
    "least": "least",
    "most": "most",
    "share": "of the bare client",
    "turns": "turns",
}
Way = Callable[[argparse.Namespace, str, "SGLangEngine"], AbstractAsyncContextManager[Callable[[], Awaitable[None]]]]
"""Makes ready, and gives what answers all groups once."""


def main() -> None:
    """Measures the three ways by turns and writes table and JSON."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("rl_lightning.rollout.controller").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as folder:
        asyncio.run(measure(args, str(write_shape(Path(folder), args.shape))))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__, "gpu_rollout_path.json", budget_s=540.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.7b")
    parser.add_argument("--in-flight", type=int, default=256, help="answers at a time")
    parser.add_argument("--groups", type=int, default=64, help="of each turn")
    parser.add_argument("--answers", type=int, default=8, help="of each group")
    parser.add_argument("--tokens", type=int, default=512, help="of each answer")
    parser.add_argument("--turns", type=int, default=5, help="of each way, after one other")
    return parser.parse_args()


async def measure(args: argparse.Namespace, model: str) -> None:
    """Turns of all ways on one server, until they are done or the time is up, also in the middle of a turn."""
    from rl_lightning.engines.sglang import SGLangEngine

    ends = asyncio.get_running_loop().time() + args.budget_s
    server = server_args(args.cpu, 0, **({} if args.cpu else {"mem_fraction_static": 0.8}))
    engine = SGLangEngine(device="cpu" if args.cpu else "auto", server_args=server, api_key="benchmark")
    try:
        async with asyncio.timeout_at(ends) as budget:
            await engine.start(model)
            await take_turns(args, model, engine)
    except TimeoutError:
        if not budget.expired():
            raise
        logger.warning("out of time")
    finally:
        await engine.stop()


async def take_turns(args: argparse.Namespace, model: str, engine: SGLangEngine) -> None:
    """Every way in turn; results are written after each turn that counts, which the first of a way does not."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(1 + args.turns):
        for name, way in WAYS.items():
            rate = await take_turn(args, way, model, engine)
            if turn:
                rates[name].append(rate)
                write_rows(
                    args, "rollout_path.py", "The way through the worker", summarise(rates), COLUMNS, task=task(args), rates=rates
                )


async def take_turn(args: argparse.Namespace, way: Way, model: str, engine: SGLangEngine) -> float:
    """Tokens per second of all groups, from an empty prefix cache."""
    assert engine._client is not None
    async with way(args, model, engine) as answer_all:
        await engine._client.flush()
        started = time.monotonic()
        await answer_all()
        return float(args.groups * args.answers * args.tokens / (time.monotonic() - started))


@asynccontextmanager
async def by_bare_client(args: argparse.Namespace, model: str, engine: SGLangEngine) -> AsyncIterator[Any]:
    """One aiohttp session, its own JSON."""
    import aiohttp

    assert engine._client is not None
    url, places = engine._client.url + "/generate", asyncio.Semaphore(args.in_flight // args.answers)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {engine.api_key}"}) as session:

        async def ask(group: int) -> None:
            asked = request(group, lambda _: args.tokens)
            sampling = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "temperature": 1.0}
            body = {"input_ids": asked.prompt_ids, "sampling_params": sampling, "return_logprob": True}
            async with session.post(url, json=body) as answer:
                assert len((await answer.json())["meta_info"]["output_token_logprobs"]) == args.tokens

        async def answer_group(group: int) -> None:
            async with places:
                await asyncio.gather(*(ask(group) for _ in range(args.answers)))

        yield lambda: asyncio.gather(*(answer_group(group) for group in range(args.groups)))


@asynccontextmanager
async def by_engine(args: argparse.Namespace, model: str, engine: SGLangEngine) -> AsyncIterator[Any]:
    """The engine's `generate`."""
    places = asyncio.Semaphore(args.in_flight // args.answers)

    async def answer_group(group: int) -> None:
        async with places:
            asked = request(group, lambda _: args.tokens)
            completions = await asyncio.gather(*(engine.generate(asked) for _ in range(args.answers)))
            assert all(len(completion) == args.tokens for completion in completions)

    yield lambda: asyncio.gather(*(answer_group(group) for group in range(args.groups)))


@asynccontextmanager
async def by_worker(args: argparse.Namespace, model: str, engine: SGLangEngine) -> AsyncIterator[Any]:
    """A RolloutWorker on this event loop, attached to the server, with leases of a real controller."""
    from rl_lightning.engines.sglang import SGLangEngine
    from rl_lightning.prompts.source import PromptSource
    from rl_lightning.prompts.tokenizer import load_tokenizer
    from rl_lightning.rollout.admission import StalenessGate
    from rl_lightning.rollout.controller import RolloutController
    from rl_lightning.rollout.controller_settings import ControllerSettings
    from rl_lightning.rollout.worker import RolloutWorker, WorkerSettings
    from rl_lightning.rollout.workflow import SingleTurnWorkflow
    from rl_lightning.types import SamplingParams

    assert engine._client is not None
    tokenizer, at_a_time = load_tokenizer(model), args.in_flight // args.answers
    params = SamplingParams(max_new_tokens=args.tokens, min_new_tokens=args.tokens)
    settings = ControllerSettings(StalenessGate(args.groups, 0, at_a_time), args.answers, params, n_groups=args.groups)
    controller = RolloutController(PromptSource(SamePrompts(args), shuffle=False), settings)
    worker = RolloutWorker(
        WorkerSettings("worker", model, room=at_a_time),
        controller,
        SGLangEngine(engine._client.url, engine.api_key),
        SingleTurnWorkflow(),
        no_score,
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
    )

    async def answer_all() -> None:
        await controller.publish(0, ["worker"])
        while type(await controller.take(0, wait_s=60.0)).__name__ != "Share":
            pass

    serving = asyncio.create_task(worker.run())
    try:
        while not await controller.workers():
            await asyncio.sleep(0.001)
        yield answer_all
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


class SamePrompts:
    """The prompts of the other two ways.

    Args:
        args: `groups` and `tokens` are looked at.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def setup(self, tokenizer: Any, /) -> None:
        """Nothing is read."""

    def __len__(self) -> int:
        return int(self.args.groups)

    def __getitem__(self, i: int, /) -> Prompt:
        from rl_lightning.types import Prompt

        return Prompt(str(i), "", request(i, lambda _: self.args.tokens).prompt_ids)


async def no_score(prompt: Prompt, answers: Sequence[str]) -> list[Any]:
    """Rewards are processes of their own and no part of this."""
    from rl_lightning.rewards.pool import RewardScore

    return [RewardScore(1.0, {}, None) for _ in answers]


WAYS: dict[str, Way] = {BARE: by_bare_client, ENGINE: by_engine, WORKER: by_worker}


def summarise(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row for each way."""
    rows: list[dict[str, Any]] = []
    for way, own in rates.items():
        if own:
            rows.append({"way": way, "tokens_per_s": median(own), "least": min(own), "most": max(own), "turns": len(own)})
            rows[-1]["share"] = rows[-1]["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def task(args: argparse.Namespace) -> str:
    """What was generated."""
    return (
        f"Qwen3-{args.shape} shape, random weights; {args.groups} groups of {args.answers} answers of {args.tokens} tokens to "
        f"prompts of 128, {args.in_flight} answers at a time, log-probabilities included"
    )


if __name__ == "__main__":
    main()
