"""Where the time of one training step goes, from torch's profiler: shares by kind of kernel, the longest kernels and gaps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

KINDS = {
    "attention": r"flash|fmha|varlen|sdpa",
    "layers, compiled": r"^triton_",
    "matrix products": r"gemm|cutlass|cublas|nvjet|xmma|ampere_|sm90_|hopper",
    "optimiser": r"multi_tensor|adam|foreach",
    "copies": r"memcpy|memset|copy_",
    "elementwise, gather, reduce": r"elementwise|reduce|index|gather|scatter|softmax|embedding|sort|cat|fill",
}
"""By kind the pattern of its kernels' names; the first that fits."""


def profile_step(step: Callable[[], None], top: int = 15) -> dict[str, Any]:
    """Seconds of `step` by kind of kernel, the time without a kernel, and the `top` longest kernels and gaps between kernels.

    Seconds are those under the profiler, which a step with many small kernels feels; shares are of them.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - started
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and not is_range(e)]
    kernels: dict[str, tuple[float, int]] = {}
    for event in events:
        seconds, count = kernels.get(event.name, (0.0, 0))
        kernels[event.name] = (seconds + event.device_time_total * 1e-6, count + 1)
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, (seconds, _) in kernels.items():
        shares[kind_of(name)] += seconds / wall_s
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:top]
    return {
        "seconds": round(wall_s, 4),
        "shares": {kind: round(share, 4) for kind, share in shares.items()} | {"idle": round(1 - sum(shares.values()), 4)},
        "kernels": [{"name": name[:160], "kind": kind_of(name), "s": round(s, 5), "calls": n} for name, (s, n) in longest],
        "gaps": sorted(gaps(events), key=lambda gap: -gap["s"])[:top],
    }


def gaps(events: Sequence[Any]) -> list[dict[str, Any]]:
    """Where no kernel ran between the first and the last: for how long, at which second, and between which two."""
    found: list[dict[str, Any]] = []
    ordered = sorted(events, key=lambda event: event.time_range.start)
    if not ordered:
        return found
    last, began = ordered[0], ordered[0].time_range.start
    for event in ordered[1:]:
        idle_us = event.time_range.start - last.time_range.end
        if idle_us > 0:
            at = round((last.time_range.end - began) * 1e-6, 4)
            found.append({"s": round(idle_us * 1e-6, 6), "at": at, "after": last.name[:80], "before": event.name[:80]})
        last = max(last, event, key=lambda e: e.time_range.end)
    return found


def is_range(event: Any) -> bool:
    """Whether an event is no kernel but a named stretch of time around some."""
    marked = bool(getattr(event, "is_user_annotation", False))
    return marked or event.name.startswith(("##", "Torch-Compiled", "Optimizer.", "ProfilerStep", "CompiledFunction"))


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "other")


def profile_table(profile: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"{profile['seconds']:.3f} s under the profiler.", "", "| kind | share |", "|---|---|"]
    lines += [f"| {kind} | {share:.1%} |" for kind, share in profile["shares"].items()]
    lines += ["", "| kernel | kind | ms | calls |", "|---|---|---|---|"]
    lines += [f"| `{k['name'][:80]}` | {k['kind']} | {k['s'] * 1000:.1f} | {k['calls']} |" for k in profile["kernels"]]
    lines += ["", "| the GPU waits after | before | ms | at s |", "|---|---|---|---|"]
    lines += [f"| `{g['after'][:50]}` | `{g['before'][:50]}` | {g['s'] * 1000:.2f} | {g['at']:.3f} |" for g in profile["gaps"]]
    return "\n".join(lines)
