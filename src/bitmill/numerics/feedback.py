"""Rounding with error feedback inside one block of columns, compiled: the hot loop of GPTQ.

Rows do not depend on each other once the factor is known, so each runs through its block alone while both
stay in the cache, and threads share the rows.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from bitmill.core.axes import Affine, Levels
from bitmill.numerics.search import by_rows

_Array = NDArray[np.float32]

_TILE = (
    64  # rows side by side, the lanes of the update; at 16 the loop's own checks cost three times the sums
)


def round_block(x: Tensor, upper: Tensor, values: Affine | Levels) -> Tensor:
    """Put a block of columns on their grid, each column's error moving on to those after it.

    Args:
        x: ``out columns`` float32; holds the values afterwards.
        upper: ``columns columns``, this block of the factor of the inverse Hessian.
        values: what these columns can hold.

    Returns:
        Errors over pivots, ``out columns``: times the factor's later columns they are what those lose.
    """
    errors = torch.empty_like(x)
    ahead, left, factor = x.numpy(), errors.numpy(), upper.contiguous().numpy()
    if isinstance(values, Affine):
        parts = [p.expand(x.shape).contiguous().numpy() for p in (values.step, values.zero, values.base)]
        limits = np.float32(values.low), np.float32(values.high)

        def work(first: int, last: int) -> None:
            _round_evenly(first, last, ahead, factor, left, *parts, *limits)
    else:
        scale, levels = values.scale.expand(x.shape).contiguous().numpy(), values.levels.numpy()
        middles = ((values.levels[1:] + values.levels[:-1]) / 2).numpy()

        def work(first: int, last: int) -> None:
            _round_to_levels(first, last, ahead, factor, left, scale, levels, middles, values.ties_to_even)

    by_rows(x.shape[0], work)
    return errors


@njit(cache=True, nogil=True, error_model="numpy")
def _round_evenly(
    first: int,
    last: int,
    ahead: _Array,
    factor: _Array,
    left: _Array,
    steps: _Array,
    zeros: _Array,
    bases: _Array,
    low: np.float32,
    high: np.float32,
) -> None:
    columns = ahead.shape[1]
    row, missed = np.zeros((columns, _TILE), np.float32), np.zeros((columns, _TILE), np.float32)
    step, zero = np.zeros((columns, _TILE), np.float32), np.zeros((columns, _TILE), np.float32)
    base, error = np.zeros((columns, _TILE), np.float32), np.zeros(_TILE, np.float32)
    for start in range(first, last, _TILE):
        rows = min(_TILE, last - start)
        for r in range(rows):
            for j in range(columns):
                row[j, r], base[j, r] = ahead[start + r, j], bases[start + r, j]
                step[j, r], zero[j, r] = steps[start + r, j], zeros[start + r, j]
        for j in range(columns):
            pivot = factor[j, j]
            for r in range(_TILE):
                k = np.rint((row[j, r] - base[j, r]) / step[j, r] + zero[j, r])
                k = low if k < low else k
                k = high if k > high else k
                value = (k - zero[j, r]) * step[j, r] + base[j, r] if step[j, r] != 0 else base[j, r]
                error[r] = (row[j, r] - value) / pivot
                missed[j, r] = error[r]
                row[j, r] = value
            for i in range(j + 1, columns):
                coupling = factor[j, i]
                for r in range(_TILE):
                    row[i, r] -= error[r] * coupling
        for r in range(rows):
            for j in range(columns):
                ahead[start + r, j], left[start + r, j] = row[j, r], missed[j, r]


@njit(cache=True, nogil=True, error_model="numpy")
def _round_to_levels(
    first: int,
    last: int,
    ahead: _Array,
    factor: _Array,
    left: _Array,
    scales: _Array,
    levels: _Array,
    middles: _Array,
    ties_to_even: bool,
) -> None:
    for r in range(first, last):
        for j in range(ahead.shape[1]):
            scale = scales[r, j]
            value = np.float32(0)
            if scale != 0:
                wanted = ahead[r, j] / scale
                place = np.searchsorted(middles, wanted)
                if ties_to_even and place < len(middles) and middles[place] == wanted:
                    place += (place - len(levels) // 2) % 2
                value = levels[place] * scale
            _move_on(ahead[r], factor, left[r], j, value)


@njit(cache=True, nogil=True, error_model="numpy")
def _move_on(row: _Array, factor: _Array, left: _Array, j: int, value: np.float32) -> None:
    """Column ``j`` becomes ``value``; those behind it answer."""
    error = (row[j] - value) / factor[j, j]
    row[j] = value
    left[j] = error
    for i in range(j + 1, len(row)):
        row[i] -= error * factor[j, i]
