"""Nearest points of the I-quants' codebooks when scales are given, by looking at all of them.

Errors of half a point (four coordinates) are computed once for all its tuples of levels, so that a point
costs two look-ups. Where minus signs must be even in number, the cheapest single change of sign within each
half is tabulated too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_compiled = njit(cache=True, nogil=True, error_model="numpy")

_Floats = NDArray[np.float32]
_Ints = NDArray[Any]
_f = np.float32

FREE, EVEN, NONE = range(3)
"""Signs: apart from the point and free · even in number · none, the levels have their own."""


@_compiled
def nearest_points(
    start: int,
    stop: int,
    x: _Floats,
    step: _Floats,
    weight: _Floats,
    shift: _Floats,
    values: _Floats,
    halves: _Ints,
    points: _Ints,
    signs: int,
    first: _Ints,
    second: _Ints,
    minus: _Ints,
) -> None:
    """The best code for each row of ``x``.

    Args:
        start, stop: rows of ``x`` (``vectors 8``).
        weight: of squared errors, ``· 8``; its rows repeat.
        step: scale of each row; ``shift`` (in steps) is added to its levels.
        values: of the levels.
        halves: ``tuples 4`` levels of every half tuple.
        points: ``points 2`` numbers of half tuples, or ``points 1`` where each half has a point of its own.
        first, second: index of the point, and of the second half's; ``minus``: signs, bit ``i`` for ``i``.
    """
    count = len(halves)
    cost, turned = np.empty((2, count), np.float32), np.empty((2, count), np.float32)
    for r in range(start, stop):
        first[r], second[r], minus[r] = 0, 0, 0
        if step[r] == 0:
            continue
        odd = 0
        for i in range(8):
            if signs != NONE and x[r, i] < 0:
                minus[r] |= 1 << i
                odd ^= 1
        for half in range(2):
            part = x[r, 4 * half : 4 * half + 4]
            u = weight[r % len(weight), 4 * half : 4 * half + 4]
            _costs(part, step[r], u, shift[r], values, halves, signs, cost[half], turned[half])
        turn = -1
        if points.shape[1] == 2:
            turn, first[r] = _of_eight(cost, turned, points, signs == EVEN and odd == 1)
        else:
            turn, first[r], second[r] = _of_fours(cost, turned, points, signs == EVEN and odd == 1)
        if turn >= 0:
            at = points[second[r] if turn == 1 else first[r], 0]
            if points.shape[1] == 2:
                at = points[first[r], turn]
            which, least = 0, _f(np.inf)
            for i in range(4):
                more = weight[r % len(weight), 4 * turn + i] * values[halves[at, i]] * abs(x[r, 4 * turn + i])
                if more < least:
                    which, least = i, more
            minus[r] ^= 1 << (4 * turn + which)


@_compiled
def _costs(
    x: _Floats,
    step: np.float32,
    weight: _Floats,
    shift: np.float32,
    values: _Floats,
    halves: _Ints,
    signs: int,
    cost: _Floats,
    turned: _Floats,
) -> None:
    """Squared error of every half tuple, and with the cheapest sign turned."""
    levels = len(values)
    miss, more = np.empty((4, levels), np.float32), np.empty((4, levels), np.float32)
    for i in range(4):
        value = x[i] if signs == NONE else abs(x[i])
        for q in range(levels):
            reached = step * (values[q] + shift)
            miss[i, q] = weight[i] * (reached - value) * (reached - value)
            more[i, q] = weight[i] * _f(4) * reached * value
    for t in range(len(halves)):
        a, b, c, d = halves[t, 0], halves[t, 1], halves[t, 2], halves[t, 3]
        cost[t] = miss[0, a] + miss[1, b] + miss[2, c] + miss[3, d]
        if signs == EVEN:
            turned[t] = cost[t] + min(more[0, a], more[1, b], more[2, c], more[3, d])


@_compiled
def _of_eight(cost: _Floats, turned: _Floats, points: _Ints, odd: bool) -> tuple[int, int]:
    """Half whose sign turns (-1: none) and index of the best point."""
    best, least, turn = 0, _f(np.inf), -1
    for p in range(len(points)):
        a, b = points[p, 0], points[p, 1]
        if odd:
            low, high = turned[0, a] + cost[1, b], cost[0, a] + turned[1, b]
            error = min(low, high)
        else:
            low = error = cost[0, a] + cost[1, b]
        if error < least:
            best, least = p, error
            turn = (0 if low <= error else 1) if odd else -1
    return turn, best


@_compiled
def _of_fours(cost: _Floats, turned: _Floats, points: _Ints, odd: bool) -> tuple[int, int, int]:
    """Half whose sign turns (-1: none) and indices of the two best points."""
    plain, other = np.zeros(2, np.int64), np.zeros(2, np.int64)
    least, least_turned = np.full(2, np.inf, np.float32), np.full(2, np.inf, np.float32)
    for half in range(2):
        for p in range(len(points)):
            t = points[p, 0]
            if cost[half, t] < least[half]:
                least[half], plain[half] = cost[half, t], p
            if odd and turned[half, t] < least_turned[half]:
                least_turned[half], other[half] = turned[half, t], p
    if not odd:
        return -1, plain[0], plain[1]
    if least_turned[0] + least[1] <= least[0] + least_turned[1]:
        return 0, other[0], plain[1]
    return 1, plain[0], other[1]
