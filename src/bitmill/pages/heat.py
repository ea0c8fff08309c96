"""Every linear weight as a cell: blocks across, roles down; by type, bits or error, and for each of several
files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bitmill.measurement.report import percent
from bitmill.pages.svg import WIDTH, svg, text

Plain = Mapping[str, Any]
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "linear")
_LEFT, _HIGH = 58, 26
_MOST = 4000  # cells of a picture


def cells_of(record: Plain) -> dict[tuple[str, int], Plain]:
    """The linears of a record by role and block; of experts, the one with the largest error."""
    found: dict[tuple[str, int], Plain] = {}
    for row in record["tensors"]:
        if row["layer"] is None or row["role"] not in ROLES:
            continue
        key = (row["role"], row["layer"])
        if key not in found or _error(row) > _error(found[key]):
            found[key] = row
    return dict(list(found.items())[:_MOST])


def heat(records: Sequence[Plain], weighted: Sequence[Mapping[str, float]]) -> tuple[str, dict[str, Any]]:
    """The picture of the first record's errors, and for the script what every cell of every record is.

    Args:
        weighted: errors of outputs by tensor, a mapping a record; empty where a run left none.
    """
    tables = [cells_of(record) for record in records]
    keys = sorted({key for table in tables for key in table}, key=lambda k: (ROLES.index(k[0]), k[1]))
    if not keys:
        return "", {}
    roles = [role for role in ROLES if any(key[0] == role for key in keys)]
    layers = sorted({key[1] for key in keys})
    width = (WIDTH - _LEFT) / len(layers)
    column = {layer: i for i, layer in enumerate(layers)}
    shades = _shades([_error(tables[0][key]) if key in tables[0] else None for key in keys])
    parts = [text(_LEFT - 10, 20 + i * _HIGH, role, "label", "end") for i, role in enumerate(roles)]
    for at, (key, shade) in enumerate(zip(keys, shades, strict=True)):
        x, y = _LEFT + column[key[1]] * width, 5 + roles.index(key[0]) * _HIGH
        row = tables[0].get(key)
        said = "" if row is None else f"{row['name']}: {percent(row['relative'])}, {row['grid']}"
        broken = row is not None and row["relative"] is None
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{max(width - 2, 1):.1f}" height="{_HIGH - 3}" rx="2" '
            f'class="cell{" broken" if broken else ""}" fill-opacity="{shade:.3f}" data-cell="{at}">'
            f"<title>{escape(said)}</title></rect>"
        )
    base = 6 + len(roles) * _HIGH
    every = max(1, math.ceil(len(layers) / 16))
    for j, layer in enumerate(layers):
        if j % every == 0:
            parts.append(text(_LEFT + (j + 0.5) * width - 1, base + 14, str(layer), "tick", "middle"))
    data = {
        "columns": len(layers),
        "at": [[roles.index(role), column[layer]] for role, layer in keys],
        "files": [_values(table, keys, told) for table, told in zip(tables, weighted, strict=True)],
    }
    return svg(base + 20, parts, "errors by role and block", "heat"), data


def _values(
    table: Mapping[tuple[str, int], Plain], keys: Sequence[tuple[str, int]], told: Mapping[str, float]
) -> list[list[Any] | None]:
    """Name, type, bits a weight, error of the weight and of its output, for each cell."""
    found: list[list[Any] | None] = []
    for key in keys:
        row = table.get(key)
        if row is None:
            found.append(None)
            continue
        bits = round(row["bits"] / max(math.prod(row["shape"]), 1), 4)
        output = told.get(row["name"])
        found.append([row["name"], row["grid"], bits, _round(row["relative"]), _round(output)])
    return found


def _shades(errors: Sequence[float | None]) -> list[float]:
    known = [e for e in errors if e is not None and math.isfinite(e)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    span = (high - low) or high or 1.0
    return [
        0.0 if e is None else 1.0 if not math.isfinite(e) else 0.1 + 0.9 * (e - low) / span for e in errors
    ]


def _error(row: Plain) -> float:
    return math.inf if row["relative"] is None else float(row["relative"])


def _round(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
