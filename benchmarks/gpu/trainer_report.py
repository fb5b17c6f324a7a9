"""The trainer benchmark's results as Markdown."""

from __future__ import annotations

from typing import Any

from step_profile import profile_table


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each cell."""
    lines = ["| shape | length | variant | tokens/s | MFU | peak GiB | of it optimiser | recompilations |", "|---" * 8 + "|"]
    for row in rows:
        cells = [row["shape"], row["case"], row["variant"]]
        if "seconds" in row:
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}", f"{row['peak_gib']:.1f}"]
            cells += [f"{row['optimizer_gib']:.1f}", str(row["recompilations"])]
        else:
            cells += [row["failure"], "", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and where the time of the profiled steps went."""
    profiled = [row for row in rows if "profile" in row]
    parts = [f"## {row['shape']}, {row['case']}, {row['variant']}\n\n{profile_table(row['profile'])}" for row in profiled]
    return "\n\n".join([table(rows), *parts])
