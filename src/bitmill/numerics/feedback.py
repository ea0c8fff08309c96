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
    for r in range(first, last):
        for j in range(ahead.shape[1]):
            step, zero, base = steps[r, j], zeros[r, j], bases[r, j]
            value = base
            if step != 0:
                k = np.rint((ahead[r, j] - base) / step + zero)
                value = (min(max(k, low), high) - zero) * step + base
            _move_on(ahead[r], factor, left[r], j, value)


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
