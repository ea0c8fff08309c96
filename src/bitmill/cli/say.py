"""What a command says: results to standard output, the rest to standard error, tables as plain columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import typer


def result(text: str = "") -> None:
    """A line of the answer, to standard output."""
    typer.echo(text)


def note(text: str = "") -> None:
    """A line about the work, to standard error."""
    typer.echo(text, err=True)


def emit(value: Any) -> None:
    """The answer as JSON, to standard output."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False, default=str)
    sys.stdout.write("\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """Aligned columns under a head, two spaces between them; ``right`` names columns of numbers."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    flush = set(right)
    lines = []
    for row in [list(head), ["-" * w for w in widths], *cells]:
        padded = [
            c.rjust(w) if i in flush else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def size(bytes_: float) -> str:
    """``91.7 MB``, in units of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes_ < 1000 or unit == "GB":
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.1f} TB"


def duration(seconds: float) -> str:
    """``42 s``, ``3:07``, ``2:15:00``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def shortened(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, its middle left out."""
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[: width - 1 - half]}…{text[len(text) - half :]}"
