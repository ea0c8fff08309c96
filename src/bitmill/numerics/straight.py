"""Derivatives through rounding that counts as the identity, summed over blocks in one pass on a processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bitmill.numerics.search import by_rows

Array = Any  # numpy's, as compiled code sees it
Real = Any

_HALF, _NONE = np.float32(0.5), np.float32(0)
_EXACT_ENOUGH = {"reassoc", "nsz", "contract"}  # sums in any order, but a NaN stays one


def sums_inside(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    top: Tensor,
    bottom: Tensor,
    block: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """A gradient where it passes, and its sums over blocks.

    It passes where the shifted weight is at most half a step beyond its block's range.

    Args:
        tensors: gradient, value, weight, shifted weight and step; each ``out in`` float32 on the processor.
        top, bottom: ends of each block's range, ``ceil(out / height) ceil(in / width)``.
        block: ``height`` and ``width``.

    Returns:
        The gradient, 0 where it does not pass, ``out in``; and four sums a block, ``4 ...``: of it times
        value less weight; of the gradient above the range; of that below; of both times the value.
    """
    passed, sums = torch.empty_like(tensors[2]), torch.zeros(4, *top.shape)
    arrays = [one.contiguous().numpy() for one in (*tensors, top, bottom, passed, sums)]

    def work(first: int, last: int) -> None:
        _sum_rows(first, last, *block, *arrays)

    by_rows(top.shape[0], work)
    return passed, sums


@njit(nogil=True, cache=True, error_model="numpy", fastmath=_EXACT_ENOUGH)
def _sum_rows(
    first: int,
    last: int,
    height: int,
    width: int,
    gradient: Array,
    value: Array,
    weight: Array,
    shifted: Array,
    step: Array,
    top: Array,
    bottom: Array,
    passed: Array,
    sums: Array,
) -> None:
    rows, columns = weight.shape
    for at in range(first, last):
        for row in range(at * height, min((at + 1) * height, rows)):
            for block in range(top.shape[1]):
                a, b = block * width, min((block + 1) * width, columns)
                found = _sum_run(
                    gradient[row, a:b],
                    value[row, a:b],
                    weight[row, a:b],
                    shifted[row, a:b],
                    step[row, a:b],
                    top[at, block],
                    bottom[at, block],
                    passed[row, a:b],
                )
                for i in range(4):
                    sums[i, at, block] += found[i]


@njit(nogil=True, cache=True, error_model="numpy", fastmath=_EXACT_ENOUGH)
def _sum_run(
    gradient: Array,
    value: Array,
    weight: Array,
    shifted: Array,
    step: Array,
    top: Real,
    bottom: Real,
    passed: Array,
) -> tuple[Real, Real, Real, Real]:
    slips = over = under = stuck = _NONE
    for i in range(gradient.shape[0]):
        margin = _HALF * step[i]
        above = gradient[i] if shifted[i] > top + margin else _NONE
        below = gradient[i] if shifted[i] < bottom - margin else _NONE
        passed[i] = gradient[i] - above - below
        slips += passed[i] * (value[i] - weight[i])
        over += above
        under += below
        stuck += (above + below) * value[i]
    return slips, over, under, stuck
