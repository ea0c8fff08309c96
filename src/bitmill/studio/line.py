"""Some rows of a tensor on a grid: what is stored, how, what is lost, and what other settings would lose."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitmill.core.axes import Grid
from bitmill.core.errors import BadRecipe, Refused, Unsolvable
from bitmill.core.registry import grid_families, parse_grid
from bitmill.grids.integer import Integer
from bitmill.numerics.hadamard import apply, largest_factor
from bitmill.pages.anatomy import anatomy
from bitmill.studio.asked import Asked
from bitmill.studio.desk import ROWS, Desk, Tile

FIELDS = ("tensor", "row", "column", "rows", "shown", "grid", "outlier", "at", "turn")
SHOWN = (16, 32, 64, 128)
GROUPS = (16, 32, 64, 128, 256, 0, -1)
ZEROS = ("sym", "asym", "fz")
LARGEST_OUTLIER = 200.0
"""Times the root mean square of its row."""

_LONGEST_NAME, _LONGEST_GRID = 300, 300
_MOST_TO_COMPARE = 1 << 17
_HUGE = 1 << 40
_DIGITS = 6


@dataclass(frozen=True, eq=False)
class Look:
    """What is looked at: rows of a tensor, changed as asked, and the run of columns that is drawn.

    Attributes:
        tile: the rows as they are in the file.
        values: the rows to be rounded.
        outlier: row and column of these of a weight that was put there, or None.
        order: of the Hadamard matrix that they were multiplied by; 0 for none.
        row, column, shown: of the run, counted in the tile.
    """

    tile: Tile
    values: Tensor
    outlier: tuple[int, int] | None
    order: int
    row: int
    column: int
    shown: int


def look(desk: Desk, asked: Asked) -> Look:
    """The rows that a request is about.

    Raises:
        Refused: something about it is not within bounds.
    """
    rows = asked.one_of("rows", ROWS, ROWS[1])
    row = asked.whole("row", 0, _HUGE, 0)
    tile = desk.tile(asked.word("tensor", _LONGEST_NAME), row, rows)
    columns = tile.shape[1]
    shown = asked.one_of("shown", SHOWN, SHOWN[1])
    column = asked.whole("column", 0, columns - 1, 0) // shown * shown
    size = asked.number("outlier", -LARGEST_OUTLIER, LARGEST_OUTLIER, 0.0)
    at = asked.whole("at", 0, columns - 1, column)
    turn = asked.one_of("turn", (True, False), False)
    values, here, outlier = tile.values, row - tile.first, None
    if size:
        outlier, values = (here, at), values.clone()
        values[here, at] = size * float(values[here].square().mean().sqrt())
    order = largest_factor(columns) if turn else 0
    if order:
        values = apply(values, order)
    return Look(tile, values, outlier, order, here, column, shown)


def on_grid(desk: Desk, asked: Asked) -> dict[str, Any]:
    """The answer to ``line``: everything about these rows on the grid that was asked for, as plain values."""
    seen = look(desk, asked)
    grid = _grid(asked, seen)
    stored = grid.round(seen.values)
    ours = stored.dense()
    found = anatomy(stored, seen.values, (seen.row, seen.column), seen.shown)
    codes = stored.codes[seen.row, seen.column : seen.column + seen.shown]
    scalar = stored.codes.shape == ours.shape and not stored.codes.dtype.is_floating_point
    shape, block = seen.tile.shape, found["block"]
    return {
        **found,
        "grid": str(grid),
        "row": seen.tile.first + seen.row,
        "rows": [seen.tile.first, seen.tile.first + len(ours) - 1],
        "whole": list(shape),
        "bits": grid.storage_bits(shape) / math.prod(shape) if grid.refuses(shape) is None else None,
        "lost": _error(seen, ours),
        "block": {**block, "codes": codes.tolist() if scalar else [], "occurring": not block["points"]},
        "rms": _plain(float(seen.tile.values[seen.row].square().mean().sqrt())),
        "largest": _plain(float(seen.values[seen.row].abs().max())),
        "order": seen.order,
        "remark": _remark(grid, len(ours)),
        "kept": desk.kept(seen.tile.name),
        "beside": _beside(grid, seen),
    }


def compare(desk: Desk, asked: Asked) -> dict[str, Any]:
    """The answer to ``compare``: every grid that fits these rows, the smallest first; what does not fit."""
    seen = look(desk, asked)
    if seen.values.numel() > _MOST_TO_COMPARE:
        most = max((n for n in ROWS if n * seen.tile.shape[1] <= _MOST_TO_COMPARE), default=0)
        raise Refused(
            f"{seen.values.numel():,} weights on every grid would take long",
            where="rows",
            fix=f"rows: {most}" if most else "a narrower tensor",
        )
    rows, left = [], []
    for grid in _every(asked):
        why = _misfit(grid, seen)
        if why is not None:
            left.append({"grid": str(grid), "why": why})
            continue
        bits = grid.storage_bits(seen.tile.shape) / math.prod(seen.tile.shape)
        try:
            lost = _error(seen, grid.round(seen.values).dense())
        except Unsolvable as error:
            left.append({"grid": str(grid), "why": error.what})
            continue
        rows.append({"grid": str(grid), "bits": bits, "rmse": lost["rmse"], "relative": lost["relative"]})
    rows.sort(key=lambda row: (row["bits"], _badness(row)))
    best = math.inf
    for row in rows:
        row["front"] = _badness(row) < best
        best = min(best, _badness(row))
    return {"rows": rows, "left": left, "weights": seen.values.numel()}


def offered(shape: tuple[int, int]) -> list[str]:
    """Names of the grids that a matrix of this shape can be stored on."""
    return [str(grid) for grid in _examples() if grid.refuses(shape) is None]


def _every(asked: Asked) -> list[Grid]:
    """All examples, and the grid that is looked at."""
    text = asked.word("grid", _LONGEST_GRID).strip()
    ours = [parse_grid(text)] if text else []
    return list({str(grid): grid for grid in [*ours, *_examples()]}.values())


def _examples() -> Iterator[Grid]:
    for family in grid_families():
        yield from family.examples()


def _grid(asked: Asked, seen: Look) -> Grid:
    text = asked.word("grid", _LONGEST_GRID, "int4-g64-sym").strip()
    try:
        grid = parse_grid(text)
    except BadRecipe as error:
        raise Refused(error.what, where="grid", fix=error.fix) from error
    why = _misfit(grid, seen)
    if why is not None:
        raise Refused(why, where="grid", fix="another grid or group, or more rows")
    return grid


def _misfit(grid: Grid, seen: Look) -> str | None:
    """Why these rows, or the tensor, cannot be stored on it."""
    return grid.refuses(seen.tile.shape) or grid.refuses(tuple(seen.values.shape))


def _remark(grid: Grid, rows: int) -> str:
    """What is not as it would be for the whole tensor."""
    high, wide = grid.block
    if grid.span[1] > 1:
        return f"{grid.span[1]} weights are chosen together, so not every row of such values is possible."
    if high == 1:
        return ""
    many = f"{rows} rows" if rows > 1 else "one row"
    if (high, wide) == (0, 0):
        return f"One scale serves the whole tensor; here it is that of the {many} above."
    return f"This grid shares numbers between rows; here between the {many} above."


def _error(seen: Look, ours: Tensor) -> dict[str, Any]:
    """What rounding changed, in the tensor's own basis; of the others too, where an outlier was put in."""
    wrong, right = ours - seen.values, seen.values
    if seen.order:
        wrong, right = (apply(x, seen.order, transposed=True) for x in (wrong, right))
    power, noise = float(right.square().sum()), float(wrong.square().sum())
    at = int(wrong.abs().argmax())
    row, column = divmod(at, wrong.shape[1])
    found = {
        "rmse": _plain(math.sqrt(noise / wrong.numel())),
        "relative": _plain(math.sqrt(noise / power)) if power else 0.0,
        "worst": _plain(float(wrong[row, column].abs())),
        "place": [seen.tile.first + row, column],
        "others": None,
    }
    if seen.outlier is not None and wrong.numel() > 1:
        keep = torch.ones_like(wrong, dtype=torch.bool)
        keep[seen.outlier] = False
        noise, power = (float(x[keep].square().sum()) for x in (wrong, right))
        found["others"] = _plain(math.sqrt(noise / power)) if power else 0.0
    return found


def _beside(grid: Grid, seen: Look) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """The error with other bits, other groups, and other zero points; nothing for other families."""
    if not isinstance(grid, Integer):
        return {}
    return {
        "bits": _curve(seen, [(str(b), replace(grid, bits=b)) for b in range(2, 9)]),
        "group": _curve(seen, [(str(g), replace(grid, group=g)) for g in GROUPS]),
        "zero": _curve(seen, [(z, replace(grid, zero=z, zero_floor=0)) for z in ZEROS]),
    }


def _curve(seen: Look, grids: Sequence[tuple[str, Integer]]) -> list[dict[str, Any]]:
    found = []
    for value, grid in grids:
        if _misfit(grid, seen) is None:
            lost = _error(seen, grid.round(seen.values).dense())
            found.append(
                {"value": value, "error": lost["relative"] if lost["others"] is None else lost["others"]}
            )
    return found


def _badness(row: Mapping[str, Any]) -> float:
    return math.inf if row["rmse"] is None else float(row["rmse"])


def _plain(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
