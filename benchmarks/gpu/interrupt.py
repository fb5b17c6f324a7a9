"""What interruptible generation is worth, with contexts computed again or kept, against updates that wait for all answers.

    python benchmarks/gpu/interrupt.py --shape 1.7b --budget-s 400

A server keeps as many requests in flight as asked for, with answers of lognormal length, and gets new weights a fixed time
after the update before: as long as a batch takes that is larger than what is in flight, which is the case in AReaL's recipes
(at 20,000 tokens/s the default period makes 780 answers, with 256 in flight).  Interrupted answers keep their tokens and go
on under the new weights, with keys and values computed again or as they are; the other way, no new request starts until the
running ones have ended.  All ways, and no updates at all, take turns on one server under one load.  Every sampled token
counts, also those of answers that have not ended.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_machine import benchmark_parser  # noqa: E402
from random_qwen3 import SHAPES  # noqa: E402
from served_engine import Lengths, Load, random_weights, server_args, write_rows, write_shape  # noqa: E402
from weight_sync import Weights, update  # noqa: E402

logger = logging.getLogger("interrupt")

COLUMNS = {
    "way": "update",
    "tokens_per_s": "tokens/s",
    "share": "of no updates",
    "gain": "x waiting",
    "seconds": "measured, s",
    "updates": "updates",
    "drain_s": "waiting for answers, s",
    "stopped_s": "generation stopped, s",
}
NONE, KEEP, INTERRUPT, WAIT = "none", "interrupts, keeps the cache", "interrupts", "waits for all answers"
WAYS = (NONE, KEEP, INTERRUPT, WAIT)
"""In the order of their turns; all but the first are repeated."""


def main() -> None:
    """Measures all ways by turns and writes table and JSON."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as folder:
        asyncio.run(measure(args, write_shape(Path(folder), args.shape)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__, "gpu_interrupt.json", budget_s=540.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.7b")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--period-s", type=float, default=30.0, help="from the end of an update to the next one")
    parser.add_argument("--periods", type=int, default=1, help="measured in each turn")
    parser.add_argument("--turns", type=int, default=2, help="of each way with updates, as far as the budget goes")
    parser.add_argument("--median-tokens", type=int, default=512)
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of the length")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--transport", default="tensor", help="tensor or disk: the server is on the trainer's GPU")
    return parser.parse_args()


async def measure(args: argparse.Namespace, folder: Path) -> None:
    """Turns of all ways on one server, until they are done or the time is up, also in the middle of a period."""
    from rl_lightning.engines.sglang import SGLangEngine
    from rl_lightning.weights.transport_choice import make_transport

    ends = asyncio.get_running_loop().time() + args.budget_s
    sizes: dict[str, Any] = {} if args.cpu else {"mem_fraction_static": 0.5}
    engine = SGLangEngine(device="cpu" if args.cpu else "auto", server_args=server_args(args.cpu, 0, **sizes), colocated=True)
    weights, transport = random_weights(folder, "cpu" if args.cpu else "cuda:0"), make_transport(args.transport)
    load = Load(engine, args.in_flight, Lengths(args.median_tokens, args.sigma, args.max_tokens))
    try:
        async with asyncio.timeout_at(ends) as budget:
            await engine.start(str(folder))
            async with load:
                await take_turns(args, load, partial(update, engine, transport, weights), weights)
    except TimeoutError:
        if not budget.expired():
            raise
        logger.warning("out of time")
    finally:
        transport.close()
        await engine.stop()


async def take_turns(args: argparse.Namespace, load: Load, send: Callable[[], Awaitable[float]], weights: Weights) -> None:
    """Every way in turn; results are written after each measured period.

    Not counted are periods in which answers are not yet as mixed as they will be: the first of a turn of `WAIT`, and the first
    two after everything began anew, at the start or by waiting.
    """
    periods: list[dict[str, Any]] = []
    before, turns = WAIT, (NONE, *(way for _ in range(args.turns) for way in WAYS[1:]))
    for way in turns:
        load.engine.keep_cache = way == KEEP
        n_warm = 1 if way == WAIT else 2 if before == WAIT else 0
        for number in range(n_warm + args.periods):
            period = await take_period(args, way, load, send, weights)
            logger.info("%s%s: %s", way, "" if number >= n_warm else " (not counted)", period)
            if number >= n_warm:
                periods.append(period)
                write_rows(
                    args, "interrupt.py", "Interrupting answers", summarise(periods), COLUMNS, task=task(args), periods=periods
                )
        before = way


async def take_period(
    args: argparse.Namespace, way: str, load: Load, send: Callable[[], Awaitable[float]], weights: Weights
) -> dict[str, Any]:
    """An update, if there is one, and generation after it."""
    started, tokens, drain_s, stopped_s = time.monotonic(), await sampled(load), 0.0, 0.0
    if way == WAIT:
        await load.drain()
        drain_s = time.monotonic() - started
    if way != NONE:
        weights[0][1].mul_(1.001)
        stopped_s = await send()
        load.go_on()
    await asyncio.sleep(args.period_s)
    tokens = await sampled(load) - tokens
    return {
        "way": way,
        "tokens": tokens,
        "seconds": time.monotonic() - started,
        "drain_s": drain_s,
        "stopped_s": stopped_s,
    }


async def sampled(load: Load) -> int:
    """Tokens of all answers until now, for which the server stands still for some milliseconds."""
    engine = load.engine
    gate, pause = engine._gate, engine._pause
    assert gate is not None and pause is not None
    async with pause.interrupted(gate.version, asleep=False, cache="counted"):
        pass
    tokens = load.tokens + sum(spans[-1][0] for spans in engine._flight._spans.values())
    gate.open(gate.version)
    return tokens


def summarise(periods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way."""
    rows, rates = [], dict[str, float]()
    for way in WAYS:
        if own := [period for period in periods if period["way"] == way]:
            seconds = sum(period["seconds"] for period in own)
            rates[way] = sum(period["tokens"] for period in own) / seconds
            row = {"way": way, "tokens_per_s": rates[way], "share": rates[way] / rates[NONE], "seconds": seconds}
            means = {name: mean(period[name] for period in own) for name in ("drain_s", "stopped_s")}
            rows.append(row | ({"updates": len(own), **means} if way != NONE else {}))
    for row in rows:
        if WAIT in rates:
            row["gain"] = row["tokens_per_s"] / rates[WAIT]
    return rows


def task(args: argparse.Namespace) -> str:
    """What was generated."""
    return (
        f"Qwen3-{args.shape} shape, random weights; {args.in_flight} requests in flight, answers lognormal with median "
        f"{args.median_tokens} and sigma {args.sigma}, at most {args.max_tokens} tokens; an update {args.period_s:g} s after "
        f"the one before, by {args.transport}"
    )


if __name__ == "__main__":
    main()
