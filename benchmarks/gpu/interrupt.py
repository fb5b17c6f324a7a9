"""What interruptible generation is worth: updates that interrupt answers against updates that wait for all of them.

    python benchmarks/gpu/interrupt.py --shape 1.7b

A server keeps as many requests in flight as asked for, with answers of lognormal length, and gets new weights a fixed time
after the update before.  Interrupted answers keep their tokens and go on under the new weights; the other way, no new
request starts until the running ones have ended.  The two ways alternate on one server.  Tokens of answers that ended within
the measured periods are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_machine import benchmark_parser  # noqa: E402
from random_qwen3 import SHAPES  # noqa: E402
from served_engine import Lengths, Load, random_weights, server_args, write_results, write_shape  # noqa: E402
from weight_sync import Weights, update  # noqa: E402

if TYPE_CHECKING:
    from rl_lightning.engines.sglang import SGLangEngine

logger = logging.getLogger("interrupt")

COLUMNS = {
    "way": "update",
    "tokens_per_s": "tokens/s",
    "gain": "x waiting",
    "updates": "updates",
    "drain_s": "waiting for answers, s",
    "stopped_s": "generation stopped, s",
}
WARMUP = 2
WAIT, INTERRUPT = "waits for all answers", "interrupts"


def main() -> None:
    """Measures both ways by turns and writes table and JSON."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as folder:
        asyncio.run(measure(args, write_shape(Path(folder), args.shape)))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__, "interrupt.json", budget_s=540.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="1.7b")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--period-s", type=float, default=10.0, help="from the end of an update to the next one")
    parser.add_argument("--periods", type=int, default=4, help="measured in each turn, after two others")
    parser.add_argument("--turns", type=int, default=2, help="of each way")
    parser.add_argument("--median-tokens", type=int, default=512)
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of the length")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--transport", default="tensor", help="tensor or disk: the server is on the trainer's GPU")
    return parser.parse_args()


async def measure(args: argparse.Namespace, folder: Path) -> None:
    """Turns of both ways on one server."""
    from rl_lightning.engines.sglang import SGLangEngine
    from rl_lightning.weights.transport_choice import make_transport

    ends = time.monotonic() + args.budget_s
    sizes: dict[str, Any] = {} if args.cpu else {"mem_fraction_static": 0.5}
    engine = SGLangEngine(device="cpu" if args.cpu else "auto", server_args=server_args(args.cpu, 0, **sizes), colocated=True)
    weights, transport = random_weights(folder, "cpu" if args.cpu else "cuda:0"), make_transport(args.transport)
    turns: list[dict[str, Any]] = []
    try:
        await engine.start(str(folder))
        for turn in range(2 * args.turns):
            if time.monotonic() > ends:
                logger.warning("out of time after %d of %d turns", turn, 2 * args.turns)
                break
            turns.append(await take_turn(args, (INTERRUPT, WAIT)[turn % 2], engine, transport, weights))
            write_results(args, "interrupt.py", summarise(turns), COLUMNS, task=task(args), turns=turns)
    finally:
        transport.close()
        await engine.stop()


async def take_turn(args: argparse.Namespace, way: str, engine: SGLangEngine, transport: Any, weights: Weights) -> dict[str, Any]:
    """One way over several periods, each of them generation and then an update; the first ones make it steady."""
    drains, stops = [], []
    load = Load(engine, args.in_flight, Lengths(args.median_tokens, args.sigma, args.max_tokens))
    async with load:
        for period in range(WARMUP + args.periods):
            if period == WARMUP:
                started, tokens = time.monotonic(), load.tokens
            await asyncio.sleep(args.period_s)
            asked = time.monotonic()
            if way == WAIT:
                await load.drain()
            drains.append(time.monotonic() - asked)
            weights[0][1].mul_(1.001)
            stops.append(await update(engine, transport, weights))
            load.go_on()
        seconds, tokens = time.monotonic() - started, load.tokens - tokens
    return {
        "way": way,
        "tokens": tokens,
        "seconds": seconds,
        "updates": args.periods,
        "drain_s": mean(drains[WARMUP:]),
        "stopped_s": mean(stops[WARMUP:]),
    }


def summarise(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way."""
    rows = []
    for way in (WAIT, INTERRUPT):
        own = [turn for turn in turns if turn["way"] == way]
        if own:
            rate = sum(turn["tokens"] for turn in own) / sum(turn["seconds"] for turn in own)
            means = {name: mean(turn[name] for turn in own) for name in ("drain_s", "stopped_s")}
            rows.append({"way": way, "tokens_per_s": rate, "updates": sum(turn["updates"] for turn in own), **means})
    if len(rows) == 2:
        for row in rows:
            row["gain"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
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
