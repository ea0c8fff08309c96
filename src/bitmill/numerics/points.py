"""Nearest points of codebooks, and error feedback and coordinate descent on them, compiled.

Errors of half a point (four coordinates) are computed once for all its tuples of levels, so that a point
costs two look-ups. Where minus signs must be even in number, the cheapest single change of sign within each
half is tabulated too. Rows are independent, and threads share them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from bitmill.core.axes import Points
from bitmill.numerics.search import by_rows

_compiled = njit(cache=True, nogil=True, error_model="numpy")

_Floats = NDArray[np.float32]
_Ints = NDArray[Any]
_f = np.float32
_INFINITE = _f(np.inf)
_SIGNS = {"free": 0, "even": 1, "none": 2}
_EVEN, _NONE = 1, 2

SPAN = 8
"""Columns of a vector."""


def nearest(x: Tensor, weights: Tensor, points: Points) -> tuple[Tensor, ...]:
    """The best point for every eight columns.

    Args:
        x: ``out columns`` float32.
        weights: ``columns``, of squared errors.

    Returns:
        ``out vectors`` int64 each: index of the point (of the first half's), index of the second half's,
        minus signs as bits, and whether the opposite shift was taken.
    """
    codes = np.zeros((4, x.shape[0], x.shape[1] // SPAN), np.int64)
    values, u, known = _numbers(x), _numbers(weights), _known(points)

    def work(first: int, last: int) -> None:
        _encode_rows(first, last, values, u, codes, *known)

    by_rows(x.shape[0], work)
    return tuple(torch.from_numpy(part) for part in codes)


def round_points(x: Tensor, upper: Tensor, points: Points) -> Tensor:
    """Put a block of columns on their points, each vector's error moving on to the columns after it.

    Args:
        x: ``out columns`` float32; holds the values afterwards.
        upper: ``columns columns``, this block of the factor of the inverse Hessian.

    Returns:
        Errors over pivots, ``out columns``; see :func:`bitmill.numerics.feedback.round_block`.
    """
    errors = torch.empty_like(x)
    root = torch.stack([_metric(upper[a : a + SPAN, a : a + SPAN]) for a in range(0, x.shape[1], SPAN)])
    ahead, left, factor, u, known = x.numpy(), errors.numpy(), _numbers(upper), _numbers(root), _known(points)

    def work(first: int, last: int) -> None:
        _round_rows(first, last, ahead, factor, u.reshape(-1), left, *known)

    by_rows(x.shape[0], work)
    return errors


def move_points(now: Tensor, pull: Tensor, near: Tensor, points: Points) -> None:
    """Each vector to the point nearest to its best free value where that is no loss; ``now`` and ``pull``
    follow. See :func:`bitmill.numerics.descent.descend`."""
    blocks = range(0, now.shape[1], SPAN)
    inverse = torch.stack([torch.linalg.inv(near[a : a + SPAN, a : a + SPAN]) for a in blocks])
    ahead, wish, gram, known = now.numpy(), pull.numpy(), _numbers(near), _known(points)
    apart = _numbers(inverse)

    def work(first: int, last: int) -> None:
        _move_rows(first, last, ahead, wish, gram, apart, *known)

    by_rows(now.shape[0], work)


def _metric(pivot: Tensor) -> Tensor:
    """Diagonal of the loss's metric within a span: what an error there costs once later columns answered."""
    eye = torch.eye(SPAN, device=pivot.device)
    return torch.linalg.solve_triangular(pivot, eye, upper=True).square().sum(1)


def _numbers(values: Tensor) -> _Floats:
    return values.to("cpu", torch.float32).contiguous().numpy()


def _known(points: Points) -> Any:
    """A :class:`~bitmill.core.axes.Points` as what the loops take."""
    tables = (points.halves.numpy(), points.points.numpy())
    steps = (_numbers(points.step), _numbers(points.shift), points.either)
    return *steps, _numbers(points.levels), *tables, _SIGNS[points.signs]


@_compiled
def _buffers(tuples: int) -> tuple[_Floats, _Floats, _Ints]:
    """Errors of half tuples (four rows, and eight for those of single levels), a vector's value, its code."""
    return np.empty((12, max(tuples, 8)), np.float32), np.empty(8, np.float32), np.empty(4, np.int64)


@_compiled
def _encode_rows(
    first: int,
    last: int,
    x: _Floats,
    weight: _Floats,
    codes: _Ints,
    step: _Floats,
    shift: _Floats,
    either: bool,
    levels: _Floats,
    halves: _Ints,
    points: _Ints,
    signs: int,
) -> None:
    cost, value, code = _buffers(len(halves))
    for r in range(first, last):
        for v in range(step.shape[1]):
            part, u = x[r, 8 * v : 8 * v + 8], weight[8 * v : 8 * v + 8]
            _best(part, u, step[r, v], shift[r, v], either, levels, halves, points, signs, cost, value, code)
            for k in range(4):
                codes[k, r, v] = code[k]


@_compiled
def _round_rows(
    first: int,
    last: int,
    ahead: _Floats,
    factor: _Floats,
    weight: _Floats,
    left: _Floats,
    step: _Floats,
    shift: _Floats,
    either: bool,
    levels: _Floats,
    halves: _Ints,
    points: _Ints,
    signs: int,
) -> None:
    columns = ahead.shape[1]
    cost, value, code = _buffers(len(halves))
    for r in range(first, last):
        row, errors = ahead[r], left[r]
        for v in range(step.shape[1]):
            a = 8 * v
            _best(
                row[a : a + 8], weight[a : a + 8], step[r, v], shift[r, v], either, levels, halves, points,
                signs, cost, value, code,
            )  # fmt: skip
            for i in range(8):
                error = row[a + i] - value[i]
                for k in range(i):
                    error -= errors[a + k] * factor[a + k, a + i]
                errors[a + i] = error / factor[a + i, a + i]
            for i in range(8):
                row[a + i] = value[i]
                for k in range(a + 8, columns):
                    row[k] -= errors[a + i] * factor[a + i, k]


@_compiled
def _move_rows(
    first: int,
    last: int,
    now: _Floats,
    pull: _Floats,
    gram: _Floats,
    inverse: _Floats,
    step: _Floats,
    shift: _Floats,
    either: bool,
    levels: _Floats,
    halves: _Ints,
    points: _Ints,
    signs: int,
) -> None:
    columns = now.shape[1]
    cost, value, code = _buffers(len(halves))
    wanted, weight, change = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
    for r in range(first, last):
        row, wish = now[r], pull[r]
        for v in range(step.shape[1]):
            a = 8 * v
            for i in range(8):
                wanted[i], weight[i] = row[a + i], gram[a + i, a + i]
                for k in range(8):
                    wanted[i] += wish[a + k] * inverse[v, k, i]
            _best(
                wanted, weight, step[r, v], shift[r, v], either, levels, halves, points, signs, cost, value,
                code,
            )  # fmt: skip
            gain = _f(0)
            for i in range(8):
                change[i] = value[i] - row[a + i]
            for i in range(8):
                reached = _f(0)
                for k in range(8):
                    reached += gram[a + i, a + k] * change[k]
                gain += change[i] * (_f(2) * wish[a + i] - reached)
            if gain > 0:
                for i in range(8):
                    row[a + i] = value[i]
                    for k in range(columns):
                        wish[k] -= change[i] * gram[a + i, k]


@_compiled
def _best(
    x: _Floats,
    weight: _Floats,
    step: np.float32,
    shift: np.float32,
    either: bool,
    levels: _Floats,
    halves: _Ints,
    points: _Ints,
    signs: int,
    cost: _Floats,
    value: _Floats,
    code: _Ints,
) -> None:
    """Value of the best vector for ``x`` and its code: point, second half's point, minus signs, shift."""
    for i in range(8):
        value[i] = _f(0)
    for k in range(4):
        code[k] = 0
    if step == 0:
        return
    error, first, second, turn = _search(x, weight, step, shift, levels, halves, points, signs, cost)
    if either:
        other, first_, second_, turn_ = _search(x, weight, step, -shift, levels, halves, points, signs, cost)
        if other < error:
            first, second, turn, shift, code[3] = first_, second_, turn_, -shift, 1
    code[0], code[1] = first, second
    for half in range(2):
        tuple_ = points[first, half] if points.shape[1] == 2 else points[second if half else first, 0]
        which, least = -1, _INFINITE
        for i in range(4):
            k = 4 * half + i
            value[k] = step * (levels[halves[tuple_, i]] + shift)
            if signs != _NONE and x[k] < 0:
                value[k] = -value[k]
                code[2] |= 1 << k
            more = weight[k] * abs(value[k] * x[k])
            if half == turn and more < least:
                which, least = k, more
        if which >= 0:
            value[which] = -value[which]
            code[2] ^= 1 << which


@_compiled
def _search(
    x: _Floats,
    weight: _Floats,
    step: np.float32,
    shift: np.float32,
    levels: _Floats,
    halves: _Ints,
    points: _Ints,
    signs: int,
    cost: _Floats,
) -> tuple[np.float32, int, int, int]:
    """Least weighted error, indices of the point and of the second half's, half whose sign turns or -1."""
    odd = 0
    if signs == _EVEN:
        for i in range(8):
            odd ^= 1 if x[i] < 0 else 0
    for half in range(2):
        _costs(
            x[4 * half : 4 * half + 4], weight[4 * half : 4 * half + 4], step, shift, levels, halves, signs,
            odd == 1, cost[half], cost[2 + half], cost[4:8], cost[8:],
        )  # fmt: skip
    if points.shape[1] == 2:
        return _of_eight(cost, points, odd == 1)
    return _of_fours(cost, points, odd == 1)


@_compiled
def _costs(
    x: _Floats,
    weight: _Floats,
    step: np.float32,
    shift: np.float32,
    levels: _Floats,
    halves: _Ints,
    signs: int,
    odd: bool,
    cost: _Floats,
    turned: _Floats,
    miss: _Floats,
    more: _Floats,
) -> None:
    """Squared error of every half tuple, and with the cheapest sign turned if that will be asked; the last
    two arguments are room for those of single levels."""
    for i in range(4):
        value = x[i] if signs == _NONE else abs(x[i])
        for q in range(len(levels)):
            reached = step * (levels[q] + shift)
            miss[i, q] = weight[i] * (reached - value) * (reached - value)
            more[i, q] = weight[i] * _f(4) * reached * value
    for t in range(len(halves)):
        a, b, c, d = halves[t, 0], halves[t, 1], halves[t, 2], halves[t, 3]
        cost[t] = miss[0, a] + miss[1, b] + miss[2, c] + miss[3, d]
        if odd:
            turned[t] = cost[t] + min(more[0, a], more[1, b], more[2, c], more[3, d])


@_compiled
def _of_eight(cost: _Floats, points: _Ints, odd: bool) -> tuple[np.float32, int, int, int]:
    best, least, turn = 0, _INFINITE, -1
    for p in range(len(points)):
        a, b = points[p, 0], points[p, 1]
        error = cost[0, a] + cost[1, b]
        if odd:
            error = min(cost[2, a] + cost[1, b], cost[0, a] + cost[3, b])
        if error < least:
            best, least = p, error
    if odd:
        a, b = points[best, 0], points[best, 1]
        turn = 0 if cost[2, a] + cost[1, b] <= cost[0, a] + cost[3, b] else 1
    return least, best, 0, turn


@_compiled
def _of_fours(cost: _Floats, points: _Ints, odd: bool) -> tuple[np.float32, int, int, int]:
    best, least = np.zeros(4, np.int64), np.full(4, np.inf, np.float32)
    for k in range(4 if odd else 2):
        for p in range(len(points)):
            if cost[k, points[p, 0]] < least[k]:
                best[k], least[k] = p, cost[k, points[p, 0]]
    if not odd:
        return least[0] + least[1], best[0], best[1], -1
    if least[2] + least[1] <= least[0] + least[3]:
        return least[2] + least[1], best[2], best[1], 0
    return least[0] + least[3], best[0], best[3], 1
