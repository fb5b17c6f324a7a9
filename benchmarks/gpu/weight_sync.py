"""How long new weights take from a trainer into a generating SGLang server, and how long generation stands still for them.

    python benchmarks/gpu/weight_sync.py --shapes 0.6b 1.7b

A trainer's float32 weights of a real model's shape go into a bfloat16 server again and again, slightly changed each time, by
every transport that the machine allows: NCCL to a server on a GPU of its own (two GPUs), CUDA IPC to a server on the
trainer's GPU, files in /dev/shm to both; with and without requests in flight.  Every update ends with the proof that the
server holds what was sent.  `--soak` repeats one of them many times and notes the memory in use.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_machine import benchmark_parser  # noqa: E402
from random_qwen3 import SHAPES  # noqa: E402
from served_engine import Load, random_weights, server_args, write_rows, write_shape  # noqa: E402

if TYPE_CHECKING:
    import torch

    from rl_lightning.engines.sglang import SGLangEngine

logger = logging.getLogger("weight_sync")

COLUMNS = {
    "shape": "shape",
    "transport": "transport",
    "server": "server",
    "in_flight": "requests in flight",
    "gib": "GiB sent",
    "first_s": "first, s",
    "seconds": "update, s",
    "stopped_s": "generation stopped, s",
    "stopped_max_s": "longest, s",
    "proof_s": "of it, proof, s",
    "updates": "updates",
    "memory_gib": "memory in use, GiB: first and last",
}
BESIDE, APART = "trainer's GPU", "GPU of its own"
Weights = list[tuple[str, "torch.Tensor"]]


def main() -> None:
    """Measures every combination and writes table and JSON."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows: list[dict[str, Any]] = []
    args.deadline = time.monotonic() + args.budget_s
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as folder:
        for shape in args.shapes:
            asyncio.run(measure_shape(args, write_shape(Path(folder), shape), rows))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_parser(__doc__, "gpu_weight_sync.json", budget_s=540.0)
    parser.add_argument("--shapes", choices=list(SHAPES), nargs="+", default=["0.6b", "1.7b"])
    parser.add_argument("--transports", nargs="+", default=["distributed", "tensor", "disk"])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[0, 256])
    parser.add_argument("--updates", type=int, default=10, help="measured updates of each combination, after two others")
    parser.add_argument("--soak", type=int, default=0, help="updates of the last combination of each server, noting memory")
    parser.add_argument("--answer-tokens", type=int, default=2048, help="of the requests in flight")
    return parser.parse_args()


async def measure_shape(args: argparse.Namespace, folder: Path, rows: list[dict[str, Any]]) -> None:
    """All combinations of one shape; the servers of both places start at the same time."""
    engines = make_engines(args)
    weights = random_weights(folder, "cpu" if args.cpu else "cuda:0")
    try:
        await asyncio.gather(*(engine.start(str(folder)) for engine in engines.values()))
        for place, engine in engines.items():
            await measure_engine(args, folder.name, place, engine, weights, rows)
    finally:
        await asyncio.gather(*(engine.stop() for engine in engines.values()))


def make_engines(args: argparse.Namespace) -> dict[str, SGLangEngine]:
    """Not started, by where their server is."""
    import torch

    from rl_lightning.engines.sglang import SGLangEngine

    if args.cpu:
        return {"CPU": SGLangEngine(device="cpu", server_args=server_args(True, 0))}
    places = {BESIDE: SGLangEngine(server_args=server_args(False, 0, mem_fraction_static=0.4), colocated=True)}
    if torch.cuda.device_count() > 1:
        places[APART] = SGLangEngine(server_args=server_args(False, 1, mem_fraction_static=0.7))
    else:
        logger.warning("one GPU: nothing is measured by NCCL, which needs two")
    wanted = [place for place, engine in places.items() if set(engine.transports) & set(args.transports)]
    return {place: places[place] for place in wanted}


async def measure_engine(
    args: argparse.Namespace, shape: str, place: str, engine: SGLangEngine, weights: Weights, rows: list[dict[str, Any]]
) -> None:
    """Every transport that the engine takes; adds to `rows`."""
    allowed = [name for name in args.transports if name in engine.transports and (place, name) != (APART, "tensor")]
    cells = [(name, n, args.updates) for name in allowed for n in args.in_flight]
    if args.soak and cells:
        cells.append((cells[-1][0] if args.cpu else allowed[0], args.in_flight[-1], args.soak))
    for name, in_flight, updates in cells:
        if time.monotonic() > args.deadline:
            logger.warning("out of time: %s, %s with %d in flight is not measured", shape, name, in_flight)
            continue
        row = {"shape": shape, "transport": name, "server": place, "in_flight": in_flight}
        rows.append(row | await measure(engine, name, weights, in_flight, updates, args))
        write_rows(args, "weight_sync.py", "Weight updates", rows, COLUMNS)


async def measure(
    engine: SGLangEngine, transport_name: str, weights: Weights, in_flight: int, updates: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Medians over `updates`, of which the first two are not counted."""
    from rl_lightning.weights.transport_choice import make_transport

    transport, load = make_transport(transport_name), Load(engine, in_flight, lambda number: args.answer_tokens)
    seconds, stopped, proofs, memory = [], [], [], []
    try:
        async with load:
            for _ in range(2 + updates):
                for _, weight in (weights[0], weights[-1]):
                    weight.mul_(1.001)
                await asyncio.sleep(args.cpu * 0.2)  # a CPU computes too slowly to have everything in flight at once
                started = time.monotonic()
                stopped.append(await update(engine, transport, weights))
                seconds.append(time.monotonic() - started)
                assert engine._receiver is not None
                proofs.append(engine._receiver.proof_s)
                memory.append(memory_in_use_gib(engine))
    finally:
        transport.close()
    return {
        "gib": sum(weight.numel() for _, weight in weights) * (4 if engine.target.dtype == "float32" else 2) / 2**30,
        "first_s": seconds[0],
        "seconds": median(seconds[2:]),
        "stopped_s": median(stopped[2:]),
        "stopped_max_s": max(stopped[2:]),
        "proof_s": median(proofs[2:]),
        "updates": updates,
        "memory_gib": f"{memory[2]:.2f} to {memory[-1]:.2f}",
        "memory_by_update_gib": [round(value, 3) for value in memory],
    }


async def update(engine: SGLangEngine, transport: Any, weights: Weights) -> float:
    """One update as the publisher makes it; seconds of stopped generation."""
    from rl_lightning.weights.source import NamedWeights

    assert engine._gate is not None
    [told] = transport.stage(engine._gate.version + 1, NamedWeights(weights), [engine.target])
    taken = asyncio.create_task(engine.update_weights(told))
    try:
        await asyncio.to_thread(transport.send, 120.0)
        return await taken
    finally:
        taken.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(taken, return_exceptions=True)
        transport.release()


def memory_in_use_gib(engine: SGLangEngine) -> float:
    """Of all GPUs; on a CPU, of this process and the server's."""
    import psutil
    import torch

    if torch.cuda.is_available():
        used = [total - free for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))]
        return sum(used) / 2**30
    assert engine._process is not None
    server = psutil.Process(engine._process.pid)
    family = [psutil.Process(), server, *server.children(recursive=True)]
    return float(sum(process.memory_info().rss for process in family)) / 2**30


if __name__ == "__main__":
    main()
