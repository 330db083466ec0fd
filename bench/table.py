"""The table of ratios, from rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.compare import brief

HEAD = ("work", "peer", "ratio", "spread", "n", "goal", "defaults", "memory", "share", "tok/s", "peer tok/s", "peer's fastest setting")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["work"], row["peer"], "-", "-", "0", "", "", "", "", "", "", f"NOT MEASURED: {row['failed']}")
    low, high = row["spread"]
    default = row.get("ratio_default")
    return (
        row["work"],
        row["peer"],
        f"{row['ratio']:.2f}x",
        f"{low:.2f}-{high:.2f}",
        str(row["n"]),
        f"{row['promised']:g}x",
        "-" if default is None else f"{default:.2f}x",
        f"{row['memory_ratio']:.0%}",
        f"{row['share_of_ceiling']:.0%}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['peer_tokens_per_second']:.0f}",
        brief(row["peer_setting"]),
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = [HEAD, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    padded = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])
