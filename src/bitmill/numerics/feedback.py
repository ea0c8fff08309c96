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

from bitmill.core.axes import Affine
from bitmill.numerics.search import by_rows

_Matrix = NDArray[np.float32]


def round_block(x: Tensor, upper: Tensor, affine: Affine) -> Tensor:
    """Put a block of columns on evenly spaced values, each column's error moving on to those after it.

    Args:
        x: ``out columns`` float32; holds the values afterwards.
        upper: ``columns columns``, this block of the factor of the inverse Hessian.
        affine: the values of these columns.

    Returns:
        Errors over pivots, ``out columns``: times the factor's later columns they are what those lose.
    """
    errors = torch.empty_like(x)
    steps, zeros, bases = (
        part.expand(x.shape).contiguous().numpy() for part in (affine.step, affine.zero, affine.base)
    )
    values, factor, left = x.numpy(), upper.contiguous().numpy(), errors.numpy()
    low, high = np.float32(affine.low), np.float32(affine.high)

    def work(first: int, last: int) -> None:
        _round_rows(first, last, values, factor, steps, zeros, bases, low, high, left)

    by_rows(x.shape[0], work)
    return errors


@njit(cache=True, nogil=True, error_model="numpy")
def _round_rows(
    first: int,
    last: int,
    values: _Matrix,
    factor: _Matrix,
    steps: _Matrix,
    zeros: _Matrix,
    bases: _Matrix,
    low: np.float32,
    high: np.float32,
    left: _Matrix,
) -> None:
    columns = values.shape[1]
    for r in range(first, last):
        row = values[r]
        for j in range(columns):
            step, zero, base = steps[r, j], zeros[r, j], bases[r, j]
            value = base
            if step != 0:
                k = np.rint((row[j] - base) / step + zero)
                value = (min(max(k, low), high) - zero) * step + base
            error = (row[j] - value) / factor[j, j]
            row[j] = value
            left[r, j] = error
            for i in range(j + 1, columns):
                row[i] -= error * factor[j, i]
