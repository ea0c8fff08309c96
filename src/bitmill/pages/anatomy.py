"""One stored tensor from inside: its weights before and after on the very grid, its scales, its worst blocks,
and the arithmetic of one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmill.core.axes import AffineGrid, Checkpoint, LevelGrid
from bitmill.core.types import Quantized

BINS, SCALE_BINS = 99, 36
SHOWN = 32  # weights of the block that is shown, and columns of a segment that is judged
WORST = 5
MOST_POINTS = 64  # of a grid that is drawn
MOST_TENSORS = 600
_COLUMNS = 1024  # of a tensor that is counted
_WEIGHTS = 1 << 19
_MATRIX = 2
_DIGITS = 6


@dataclass(frozen=True, eq=False)
class _Spaced:
    """The grid of some columns: where weights stand in its own unit, and what its values are there.

    Attributes:
        place: of weights ``out columns`` in the grid's unit: codes of an even grid, levels of a table.
        unit: size of that unit, broadcast to ``out columns``.
        values: of one row and one column of these, all that can be stored.
        low, high: ends of the unit's axis.
        said: how one stored value is made, from row, column and the value.
    """

    place: Callable[[Tensor], Tensor]
    unit: Tensor
    values: Callable[[int, int], Tensor]
    low: float
    high: float
    said: Callable[[int, int, float], str]


def anatomies(
    quantized: Checkpoint,
    reference: Checkpoint,
    names: Sequence[str],
    tell: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Plain values for the panels of these tensors, in this order; those that are not on a grid are left out.

    Args:
        tell: called with tensors done and in all.
    """
    found: dict[str, Any] = {}
    wanted = names[:MOST_TENSORS]
    for at, name in enumerate(wanted):
        tell(at, len(wanted))
        stored = quantized.stored(name)
        known = reference.tensors.get(name)
        if stored is None or known is None or known.shape != stored.shape or len(stored.shape) != _MATRIX:
            continue
        found[name] = anatomy(stored, reference.read(name).float())
    tell(len(wanted), len(wanted))
    return found


def anatomy(
    stored: Quantized, w: Tensor, place: tuple[int, int] | None = None, shown: int = SHOWN
) -> dict[str, Any]:
    """The panel of one tensor; ``w`` is ``out in``, float32, before.

    Args:
        place: row and first column of the block that is shown; None is the worst.
        shown: columns of that block.
    """
    columns = torch.arange(min(w.shape[1], _COLUMNS))
    ours = stored.dense()
    spaced = _spaced(stored, columns)
    worst = _worst(ours, w)
    row, column = place or (worst[0]["row"], worst[0]["column"])
    return {
        "shape": list(w.shape),
        "type": str(stored.grid),
        "bits": stored.bits / max(w.numel(), 1),
        "histogram": _histogram(spaced, ours[:, : len(columns)], w[:, : len(columns)]),
        "scales": None if spaced is None else _scales(spaced.unit, len(columns), w.shape[0]),
        "worst": worst,
        "block": _block(stored, ours, w, row, column, shown),
    }


def _spaced(stored: Quantized, columns: Tensor) -> _Spaced | None:
    grid = stored.grid
    if isinstance(grid, AffineGrid):
        even = grid.affine(stored.params, columns)
        shape = (stored.shape[0], len(columns))
        step, zero, base = (x.expand(shape) for x in (even.step, even.zero, even.base))
        codes = torch.arange(even.low, even.high + 1, dtype=torch.float32)

        def made(row: int, column: int, value: float) -> str:
            unit, offset, at = (float(x[row, column]) for x in (step, base, zero))
            code = round((value - offset) / unit + at) if unit else round(at)
            counted = f"({code} − {at:g})" if at else f"{code}"
            sign = "−" if offset < 0 else "+"
            return f"{counted} × {unit:.5g}{f' {sign} {abs(offset):.5g}' if offset else ''}"

        return _Spaced(
            place=lambda w: torch.where(step == 0, zero, (w - base) / step + zero),
            unit=step,
            values=lambda row, column: (codes - zero[row, column]) * step[row, column] + base[row, column],
            low=even.low - 0.5,
            high=even.high + 0.5,
            said=made,
        )
    if isinstance(grid, LevelGrid):
        table = grid.levels_of(stored.params, columns, stored.shape[0])
        scale = table.scale.expand(stored.shape[0], len(columns))
        reach = float(table.levels.abs().max()) * 1.05

        def taken(row: int, column: int, value: float) -> str:
            unit = float(scale[row, column])
            level = table.levels[(table.levels - (value / unit if unit else 0.0)).abs().argmin()]
            return f"{float(level):.5g} × {unit:.5g}"

        return _Spaced(
            place=lambda w: torch.where(scale == 0, 0.0, w / scale),
            unit=scale,
            values=lambda row, column: table.levels * scale[row, column],
            low=-reach,
            high=reach,
            said=taken,
        )
    return None


def _histogram(spaced: _Spaced | None, ours: Tensor, w: Tensor) -> dict[str, Any]:
    """Counts of a sample of rows, in the grid's own unit where it has one."""
    every = max(1, -(-w.numel() // _WEIGHTS))
    if spaced is None:
        reach = float(w.abs().max()) or 1.0
        before, after, low, high = w[::every], ours[::every], -reach, reach
    else:
        before, after = spaced.place(w)[::every], spaced.place(ours)[::every]
        low, high = spaced.low, spaced.high
    bins = BINS
    if spaced is not None and high - low <= BINS and (high - low).is_integer():
        a_code = BINS // round(high - low)
        bins = round(high - low) * max(1, a_code - (a_code % 2 == 0))  # odd: a code is in the middle of one
    counts = [torch.histc(x.clamp(low, high), bins, low, high).int().tolist() for x in (before, after)]
    return {
        "unit": "value" if spaced is None else "step",
        "low": low,
        "high": high,
        "before": counts[0],
        "after": counts[1],
        "weights": before.numel(),
    }


def _scales(unit: Tensor, columns: int, rows: int) -> dict[str, Any] | None:
    """The distribution of block scales: absolute values, one of every sixteen columns."""
    sizes = unit[:, :: min(16, columns)].abs()
    every = max(1, -(-sizes.numel() // _WEIGHTS))
    sizes = sizes[::every]
    low, high = float(sizes.min()), float(sizes.max())
    if not math.isfinite(high):
        return None
    counts = torch.histc(sizes, SCALE_BINS, low, high if high > low else low + 1e-12).int().tolist()
    return {"low": low, "high": high, "counts": counts, "of": rows}


def _worst(ours: Tensor, w: Tensor) -> list[dict[str, Any]]:
    """The segments of :data:`SHOWN` columns with the largest relative error; nearly empty ones do not
    count."""
    rows, columns = w.shape
    width = SHOWN if columns % SHOWN == 0 else columns
    wrong = (ours - w).square().view(rows, -1, width).sum(-1)
    right = w.square().view(rows, -1, width).sum(-1)
    ratio = torch.where(right > 1e-3 * right.mean(), wrong / right.clamp_min(1e-30), 0.0).nan_to_num(1e30)
    found = ratio.reshape(-1).topk(min(WORST, ratio.numel()))
    return [
        {
            "row": int(at) // ratio.shape[1],
            "column": int(at) % ratio.shape[1] * width,
            "relative": _round(math.sqrt(float(value))),
        }
        for value, at in zip(found.values, found.indices, strict=True)
    ]


def _block(stored: Quantized, ours: Tensor, w: Tensor, row: int, column: int, shown: int) -> dict[str, Any]:
    """Weights, stored values and how each is made, of one run of columns."""
    stop = min(column + shown, w.shape[1])
    spaced = _spaced(stored, torch.arange(column, stop))
    values, before = ours[row, column:stop], w[row, column:stop]
    made = [] if spaced is None else [spaced.said(row, i, float(v)) for i, v in enumerate(values)]
    points, alike = _points(spaced, row, stop - column)
    return {
        "row": row,
        "column": column,
        "before": [_round(float(v)) for v in before],
        "after": [_round(float(v)) for v in values],
        "made": made,
        "points": points,
        "alike": alike,
    }


def _points(spaced: _Spaced | None, row: int, columns: int) -> tuple[list[float], int]:
    """All values that the first column of a run could be stored as, and how many columns have the same;
    nothing where they are too many to draw."""
    if spaced is None:
        return [], 0
    first = spaced.values(row, 0)
    if len(first) > MOST_POINTS:
        return [], 0
    alike = next((i for i in range(columns) if not torch.equal(spaced.values(row, i), first)), columns)
    return [_round(float(v)) or 0.0 for v in first.sort().values], alike


def _round(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
