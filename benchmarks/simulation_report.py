"""The simulation's result as tables, a page and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN_ETA = 4


def table(result: dict[str, Any]) -> str:
    """Published beside simulated, on the best split."""
    published, factor = result["published_k_tokens_per_s"], result["factor"]
    head = f"| eta | published | simulated x {factor:.2f} | difference | simulated | trainer waits | engines idle | staleness |"
    lines = [head, "|" + "---|" * 8]
    for run in result["best"]["runs"]:
        simulated, theirs = run["tokens_per_s"] / 1000, published[run["eta"]]
        idle = f"{run['trainer_idle']:.0%} | {run['engine_idle']:.0%}"
        staleness = f"{run['staleness_mean']:.1f}, at most {run['staleness_max']}"
        scaled = f"{factor * simulated:.1f} | {round(100 * (factor * simulated / theirs - 1)):+d}%"
        lines.append(f"| {run['eta']} | {theirs:.1f} | {scaled} | {simulated:.1f} | {idle} | {staleness} |")
    return "\n".join(lines)


def splits_table(result: dict[str, Any]) -> str:
    """Thousand tokens/s of every split and eta, and who waits at `SHOWN_ETA`."""
    etas = [run["eta"] for run in result["splits"][0]["runs"]]
    head = " | ".join(["engines + trainers", *(f"eta {eta}" for eta in etas), "trainer waits", "engines idle", "longest lease"])
    lines = [f"| {head} |", "|" + "---|" * (len(etas) + 4)]
    for split in result["splits"]:
        run = split["runs"][etas.index(SHOWN_ETA)]
        waits = f"{run['trainer_idle']:.0%} | {run['engine_idle']:.0%} | {run['longest_lease_s']:,} s"
        lines.append(f"| {split['engines']} + {split['trainers']} | {thousands(split['runs'], etas)} | {waits} |")
    return "\n".join(lines)


def lengths_table(result: dict[str, Any]) -> str:
    """Ratios to eta 0 by the spread of the lengths, the published ones first."""
    published = result["published_k_tokens_per_s"]
    etas = [run["eta"] for run in result["lengths"][0]["runs"]][1:]
    lines = [f"| lengths | eta 0 | {' | '.join(f'eta {eta}' for eta in etas)} |", "|" + "---|" * (len(etas) + 2)]
    lines.append(f"| published | {published[0]:.1f} | {' | '.join(f'x {published[eta] / published[0]:.2f}' for eta in etas)} |")
    main = {"spread": result["inputs"]["spread"]["value"], "runs": result["best"]["runs"]}
    for row in sorted([main, *result["lengths"]], key=lambda row: row["spread"]):
        speed = {run["eta"]: run["tokens_per_s"] for run in row["runs"]}
        ratios = " | ".join(f"x {speed[eta] / speed[0]:.2f}" for eta in etas)
        lines.append(f"| spread {row['spread']} | {speed[0] / 1000:.1f} | {ratios} |")
    return "\n".join(lines)


def in_flight_table(result: dict[str, Any]) -> str:
    """What fewer prompts in flight cost and bring."""
    lines = ["| in flight | thousand tokens/s | longest lease | staleness |", "|---|---|---|---|"]
    for row in result["in_flight"]:
        (run,) = row["runs"]
        staleness = f"{run['staleness_mean']:.1f}, at most {run['staleness_max']}"
        speed, lease = run["tokens_per_s"] / 1000, run["longest_lease_s"]
        lines.append(f"| {row['concurrent']} | {speed:.1f} | {lease:,} s | {staleness} |")
    return "\n".join(lines)


def small_table(result: dict[str, Any]) -> str:
    """Thousand tokens/s of one engine and one trainer by prompts in flight, and the staleness at `SHOWN_ETA`."""
    etas = [run["eta"] for run in result["small"][0]["runs"]]
    head = " | ".join(["prompts x answers", "in flight", *(f"eta {eta}" for eta in etas), "staleness", "longest lease"])
    lines = [f"| {head} |", "|" + "---|" * (len(etas) + 4)]
    for row in result["small"]:
        run = row["runs"][etas.index(SHOWN_ETA)]
        size = f"{row['prompts']} x {row['answers']} | {row['batches_in_flight']:g} B"
        seen = f"{run['staleness_mean']:.1f}, at most {run['staleness_max']} | {run['longest_lease_s']:,} s"
        lines.append(f"| {size} | {thousands(row['runs'], etas)} | {seen} |")
    return "\n".join(lines)


def scale_table(result: dict[str, Any]) -> str:
    """Thousand tokens/s by number of engines."""
    etas = [run["eta"] for run in result["scale"][0]["runs"]]
    lines = [f"| engines + trainers | in flight | {' | '.join(f'eta {eta}' for eta in etas)} |", "|" + "---|" * (len(etas) + 2)]
    for row in result["scale"]:
        size = f"{row['engines']} + {row['trainers']} | {row['batches_in_flight']} B"
        lines.append(f"| {size} | {thousands(row['runs'], etas)} |")
    return "\n".join(lines)


def inputs_table(result: dict[str, Any]) -> str:
    """Every input with its source."""
    rows = [f"| `{name}` | {shown(entry['value'])} | {entry['source']} |" for name, entry in result["inputs"].items()]
    return "\n".join(["| input | value | from |", "|---|---|---|", *rows])


def shown(value: Any) -> str:
    """A number, or the seconds of a decode step by running answers."""
    return ", ".join(f"{n}: {1000 * s:.2f} ms" for n, s in value) if isinstance(value, tuple) else f"{value:g}"


def page(result: dict[str, Any]) -> str:
    """All of it with its circumstances."""
    best = result["best"]
    return f"""# Staleness and the split of GPUs, simulated

Thousand tokens trained per second. The controller is the real one; engines and trainer are fakes with the speeds below.
How to read it: [scale](../scale.md).

## Published and simulated

{best["engines"]} GPUs generate, {best["trainers"]} train. One factor for all speeds, fitted to eta 0: {result["factor"]}.

{table(result)}

![tokens per second over eta, and over engines](simulation.png)

## Every split

Waiting, idleness and the longest lease are those of eta {SHOWN_ETA}. Generation and training are equally fast with
{result["generating_share"]:.0%} of the GPUs on generation.

{splits_table(result)}

## Lengths

What eta brings on {best["engines"]} + {best["trainers"]} GPUs, when answers vary less or more in length.

{lengths_table(result)}

## Prompts in flight

On {best["engines"]} + {best["trainers"]} GPUs at eta {SHOWN_ETA}, with less than a batch in flight (`max_concurrent_rollouts`).

{in_flight_table(result)}

## Small batches

One engine and one trainer. A group waits for its longest answer, so that fewer answers run at a time than are in flight.
Staleness and the longest lease are those of eta {SHOWN_ETA}.

{small_table(result)}

## 1 to 512 engines

The same batch of B prompts, half as many GPUs to train as to generate. By default B are in flight.

{scale_table(result)}

## Inputs

{inputs_table(result)}

{result["date"]}, {result["machine"]}, Python {result["python"]}, commit {result["commit"][:12]}.
{result["cpu_s"]:.0f} s of one core.

    {result["command"]}
"""


def thousands(runs: Sequence[dict[str, Any]], etas: Sequence[int]) -> str:
    """Cells of thousand tokens/s, empty for an eta that was not run."""
    by_eta = {run["eta"]: f"{run['tokens_per_s'] / 1000:,.1f}" for run in runs}
    return " | ".join(by_eta.get(eta, "") for eta in etas)


def plot(result: dict[str, Any], path: Path) -> None:
    """Every split beside the published line, and the same batch on more engines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plot_splits(result, left)
    plot_scale(result, right)
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_splits(result: dict[str, Any], panel: Any) -> None:
    """Tokens per second over eta: the published, the best split's, and the others'."""
    published, factor, best = result["published_k_tokens_per_s"], result["factor"], result["best"]
    places = {eta: place for place, eta in enumerate(published)}
    thin: dict[str, Any] = {"color": "grey", "lw": 0.8}
    thick: dict[str, Any] = {"color": "tab:blue", "marker": "o", "label": "simulated"}
    others = [(split, thin) for split in result["splits"] if split["engines"] != best["engines"]]
    for split, style in [*others, (best, thick)]:
        speeds = [factor * run["tokens_per_s"] / 1000 for run in split["runs"]]
        panel.plot([places[run["eta"]] for run in split["runs"]], speeds, **style)
        panel.annotate(f"{split['engines']}+{split['trainers']}", (len(places) - 0.9, speeds[-1]), fontsize=8)
    panel.plot(list(places.values()), list(published.values()), "k--", marker="s", label="published")
    panel.set(xlabel="eta", ylabel="thousand tokens/s", title="engines + trainers", ylim=(0, None))
    panel.set_xticks(list(places.values()), [str(eta) for eta in places])


def plot_scale(result: dict[str, Any], panel: Any) -> None:
    """Tokens per second over engines, a line for each eta, dotted with more in flight."""
    etas = [run["eta"] for run in result["scale"][0]["runs"]]
    for colour, eta in enumerate(etas):
        for wide, style in ((False, {"label": f"eta {eta}"}), (True, {"ls": ":"})):
            rows = [row for row in result["scale"] if (row["batches_in_flight"] > 1) == wide]
            seen = [(row["engines"], run["tokens_per_s"] / 1000) for row in rows for run in row["runs"] if run["eta"] == eta]
            panel.plot([x for x, _ in seen], [y for _, y in seen], marker="o", ms=4, color=f"C{colour}", **style)
    panel.set(xlabel="engines", title="one batch on more engines (dotted: more in flight)", xscale="log", yscale="log")
