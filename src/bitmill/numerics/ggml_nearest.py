"""Points of a codebook that a ladder of scales leads to (Kawrakow, llama.cpp PRs #4773, #5196), bit for bit.

Each scale rounds a group of weights to a tuple of levels; where the codebook lacks it, the point around it
with the least weighted squared error takes its place, errors being summed in llama.cpp's order. Scales that
are neighbours mostly round to the same tuple, so that the same points are around it. Of two points, the
difference of errors is the scale times a line in the scale: who loses at both ends of a stretch of scales
loses inside. Hence all points are compared at the ends only; inside, the two that won there, unless others
come within rounding of them.

The work goes in passes over many runs, none waiting for its own results.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitmill.numerics.lanes import (
    LANES,
    least,
    load,
    load_bytes,
    minus,
    plus,
    spread,
    store,
    times,
    where_less,
)

_compiled = njit(cache=True, nogil=True, error_model="numpy")
_inlined = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)

BITS = 3
"""Bits of a level in a code: coordinate ``i`` begins at bit ``BITS · i``."""
ABSENT = 1 << 30
"""Set in the code of a group whose tuple is not in the codebook."""

_Floats = NDArray[np.float32]
_Ints = NDArray[Any]
_Lanes = Any
_f, _i = np.float32, np.int32
_ZERO, _ONE, _INF, _ABSENT = _f(0), _f(1), _f(np.inf), _i(ABSENT)
_ORDER = np.arange(LANES, dtype=np.float32)
_EPSILON, _SLACK = _f(2.0**-24), _f(2.0**-15)
_SMALL, _LARGE = _f(1e-22), _f(1e30)  # sums of squares far from where float32 ends


class Around(NamedTuple):
    """Where to look for each tuple of levels, whose key is ``sum(level · levels ** coordinate)``.

    Attributes:
        place: index of the point that the tuple is, or -1.
        many: points around it; 0 if it is one itself.
        first: where they begin in the next two, in blocks of ``LANES``.
        near: indices of points, nearest first; a tuple's last block is filled up with its last point.
        odd: ``blocks width LANES``, their coordinates as odd numbers: ``2 · level + 1``.
        packed: levels of each point, ``BITS`` bits each.
    """

    place: NDArray[np.int32]
    many: NDArray[np.int32]
    first: NDArray[np.int32]
    near: NDArray[np.uint16]
    odd: NDArray[np.uint8]
    packed: NDArray[np.int32]


class Room(NamedTuple):
    """What the passes hand on: for each comparison of all points the run, the scale, where its errors begin
    and the winner; for each stretch of scales its first comparison (the second is the next)."""

    run: NDArray[np.int32]
    scale: NDArray[np.int32]
    begin: NDArray[np.int32]
    winner: NDArray[np.int32]
    stretch: NDArray[np.int32]
    error: NDArray[np.float32]


@_compiled
def room_for(runs: int, scales: int, around: Around) -> Room:
    """Enough for ``runs`` side by side."""
    most, end = runs * scales + 1, (around.many.max() + LANES - 1) // LANES * LANES
    run, scale, begin = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most + 1, np.int32)
    winner, stretch = np.empty(most, np.int32), np.empty(most, np.int32)
    return Room(run, scale, begin, winner, stretch, np.empty((most + 1) * end, np.float32))


@_compiled
def ladder_codes(
    wanted: NDArray[np.bool_],
    size: _Floats,
    root: _Floats,
    step: _Floats,
    key: _Ints,
    code: _Ints,
    around: Around,
    room: Room,
) -> None:
    """Codes of every group of every run for every scale of the run's falling ladder.

    Args:
        wanted: ``groups runs``; the codes of others stay.
        size, root: ``runs n``, magnitudes and the weights of errors.
        step: ``runs scales``, with room for ``LANES`` more scales.
        key, code: ``groups scales runs``; a key is the tuple that the scale rounds to.
    """
    # Unpacked, because every look into a tuple counts a reference.
    place, many, first, near, odd, packed = around
    run, scale, begin, winner, stretch, error = room
    for g in range(len(key)):
        comparisons, stretches = _divide(
            g, wanted, key, code, place, many, packed, run, scale, begin, stretch
        )
        for c in range(comparisons):
            _compare(
                c, g, run[c], scale[c], size, root, step, key, code, many, first, near, odd, packed, begin,
                winner, error,
            )  # fmt: skip
        for k in range(stretches):
            c = stretch[k]
            j, start, last = run[c], scale[c], scale[c + 1]
            if _alone(c, g, j, last - start, size, root, odd, begin, winner, error):
                _decide(
                    c, g, j, start, last, size, root, step, key, code, first, near, odd, packed, begin,
                    winner, error,
                )  # fmt: skip
                continue
            for t in range(start + 1, last):
                _compare(
                    c, g, j, t, size, root, step, key, code, many, first, near, odd, packed, begin, winner,
                    error,
                )  # fmt: skip


@_inlined
def _divide(
    g: int,
    wanted: NDArray[np.bool_],
    key: _Ints,
    code: _Ints,
    place: _Ints,
    many: _Ints,
    packed: _Ints,
    run: _Ints,
    scale: _Ints,
    begin: _Ints,
    stretch: _Ints,
) -> tuple[int, int]:
    """Stretches of scales with the same tuple; comparisons at their ends, and stretches with an inside."""
    scales = key.shape[1]
    comparisons, stretches, starts = 0, 0, np.empty(scales + 2, np.int32)
    begin[0] = 0
    for j in range(key.shape[2]):
        if not wanted[g, j]:
            continue
        parts = 0
        for t in range(scales):
            starts[parts] = t  # stays if the tuple is new
            parts += 1 if t == 0 or key[g, t, j] != key[g, t - 1, j] else 0
            code[g, t, j] = packed[max(_i(0), place[key[g, t, j]])]
        starts[parts] = scales
        for part in range(parts):
            k, last = starts[part], starts[part + 1] - 1
            count = many[key[g, k, j]]
            length = (count + LANES - 1) // LANES * LANES
            stretch[stretches] = comparisons
            stretches += 1 if count > 0 and last > k + 1 else 0
            for end in range(2):
                run[comparisons], scale[comparisons] = j, k if end == 0 else last
                begin[comparisons + 1] = begin[comparisons] + length
                comparisons += 1 if count > 0 and (end == 0 or last > k) else 0
    return comparisons, stretches


@_inlined
def _compare(
    c: int,
    g: int,
    j: int,
    t: int,
    size: _Floats,
    root: _Floats,
    step: _Floats,
    key: _Ints,
    code: _Ints,
    many: _Ints,
    first: _Ints,
    near: _Ints,
    odd: _Ints,
    packed: _Ints,
    begin: _Ints,
    winner: _Ints,
    error: _Floats,
) -> None:
    """Comparison ``c``: the first point with the least error, the first of all if none is a number."""
    width = odd.shape[1]
    into, at, start, count = begin[c], g * width, LANES * first[key[g, t, j]], many[key[g, t, j]]
    steps, low, best = spread(step[j, t]), spread(_INF), spread(_ZERO)
    for b in range(0, count, LANES):
        from_ = (start + b) * width
        total = _four(spread(_ZERO), steps, size, root, j, at, odd, from_)
        if width == 8:
            total = _four(total, steps, size, root, j, at + 4, odd, from_ + 4 * LANES)
        store(error, into + b, total)
        best = where_less(total, low, plus(spread(_f(b)), load(_ORDER, 0)), best)
        low = where_less(total, low, total, low)
    lowest = spread(least(low))
    found = _i(least(where_less(lowest, low, spread(_INF), best)))
    winner[c] = found
    code[g, t, j] = packed[near[start + found]] | _ABSENT


@_inlined
def _four(
    total: _Lanes, step: _Lanes, size: _Floats, root: _Floats, j: int, at: int, odd: _Ints, from_: int
) -> _Lanes:
    """``total`` and the errors of four coordinates more, at eight points side by side."""
    total = plus(total, _error(step, load_bytes(odd, from_), size[j, at], root[j, at]))
    total = plus(total, _error(step, load_bytes(odd, from_ + LANES), size[j, at + 1], root[j, at + 1]))
    total = plus(total, _error(step, load_bytes(odd, from_ + 2 * LANES), size[j, at + 2], root[j, at + 2]))
    return plus(total, _error(step, load_bytes(odd, from_ + 3 * LANES), size[j, at + 3], root[j, at + 3]))


@_inlined
def _error(step: _Lanes, level: _Lanes, size: np.float32, root: np.float32) -> _Lanes:
    miss = minus(times(step, level), spread(size))
    return times(times(spread(root), miss), miss)


@_inlined
def _alone(
    c: int,
    g: int,
    j: int,
    length: int,
    size: _Floats,
    root: _Floats,
    odd: _Ints,
    begin: _Ints,
    winner: _Ints,
    error: _Floats,
) -> bool:
    """Whether no point but the winners of comparisons ``c`` and ``c + 1`` can win between them.

    Rounding moves an error E by less than ``e = 4 u (√(E·X) + 4 E + u X)``, X being the sum of weighted
    squares and ``u`` 2^-24: each miss is off by ``u (|x| + 2 |miss|)``. Who is ahead by 128 e a step at one
    end and not behind at the other is ahead by more than rounding at every scale inside, as scales differ by
    a half at most.
    """
    here, there, width, square = begin[c], begin[c + 1], odd.shape[1], _ZERO
    one, two = winner[c], winner[c + 1]
    for i in range(g * width, g * width + width):
        square += root[j, i] * size[j, i] * size[j, i]
    limit, other_limit = error[here + two], error[there + one]
    worst = max(limit, other_limit)
    slack = _f(length) * _SLACK * (np.sqrt(worst * square) + _f(4) * worst + _EPSILON * square)
    error[here + one], error[here + two] = _INF, _INF
    low, limits, infinite = spread(_INF), spread(limit + slack), spread(_INF)
    for b in range(0, there - here, LANES):
        near = where_less(load(error, here + b), limits, load(error, there + b), infinite)
        low = where_less(near, low, near, low)
    sure = square > _SMALL and square < _LARGE and worst < _LARGE
    return bool(sure and not least(low) < other_limit + slack)


@_inlined
def _decide(
    c: int,
    g: int,
    j: int,
    k: int,
    last: int,
    size: _Floats,
    root: _Floats,
    step: _Floats,
    key: _Ints,
    code: _Ints,
    first: _Ints,
    near: _Ints,
    odd: _Ints,
    packed: _Ints,
    begin: _Ints,
    winner: _Ints,
    error: _Floats,
) -> None:
    """Codes of the scales between ``k`` and ``last``: one of the two winners."""
    start, at, verdict = first[key[g, k, j]], g * odd.shape[1], begin[c]
    low, high = min(winner[c], winner[c + 1]), max(winner[c], winner[c + 1])
    lower, higher = packed[near[LANES * start + low]] | _ABSENT, packed[near[LANES * start + high]] | _ABSENT
    for t in range(k + 1, last, LANES):
        steps, a, b = load(step, j * step.shape[1] + t), spread(_ZERO), spread(_ZERO)
        for i in range(odd.shape[1]):
            x, w = size[j, at + i], root[j, at + i]
            a = plus(a, _error(steps, spread(_f(odd[start + (low >> 3), i, low & 7])), x, w))
            b = plus(b, _error(steps, spread(_f(odd[start + (high >> 3), i, high & 7])), x, w))
        store(error, verdict, where_less(b, a, spread(_ONE), spread(_ZERO)))
        for inside in range(t, min(t + LANES, last)):
            code[g, inside, j] = higher if error[verdict + inside - t] > 0 else lower
