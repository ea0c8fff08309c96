"""Searches of llama.cpp's one-bit I-quants (Kawrakow, llama.cpp PRs #5453, #6302): three values, shifted.

A weight is -1, 0 or 1 plus a shift of an eighth, up or down, times a scale. For sorted weights the best
three values are two cuts, so all cuts are tried; then groups of eight go to the codebook. IQ1_S shifts 32
weights alike and its bytes are llama.cpp's (conditions: :mod:`bitmill.numerics.ggml_search`). IQ1_M shifts
each 8, with 16 to a scale; llama.cpp sums its cuts in an order that changed between versions, here they are
differences of sums over the sorted weights, so that its error is met and not its bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitmill.numerics.ggml_nearest import Around
from bitmill.numerics.lanes import (
    LANES,
    least,
    load,
    load_bytes,
    minus,
    over,
    plus,
    spread,
    times,
    where_less,
)

_compiled = njit(cache=True, nogil=True, error_model="numpy")
_inlined = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)

SHIFT = 0.125

_Floats = NDArray[np.float32]
_Ints = NDArray[Any]
_Lanes = Any
_f, _i = np.float32, np.int32
_ZERO, _ONE, _SHIFT = _f(0), _f(1), _f(SHIFT)
_SMALL, _LARGE = _f(1e-30), _f(1e30)  # far from where float32 ends
_ORDER = np.arange(LANES, dtype=np.float32)


@_compiled
def cut_runs(
    start: int,
    stop: int,
    x: _Floats,
    told: bool,
    importance: _Floats,
    power: _Floats,
    per: int,
    quiet: np.float32,
    around: Around,
    points: _Ints,
    index: _Ints,
    shift: _Ints,
    scale: _Floats,
) -> None:
    """Points, shifts and a scale for each run, all of its groups shifted alike or (in runs of 16) each.

    Args:
        start, stop: runs of ``x`` (``runs n``); run ``r`` uses ``power[r // per]`` and row ``r`` of
            ``importance`` (its rows repeat), or x² as weights if not ``told``.
        quiet: runs whose largest magnitude is below it are all zero.
        around, points: of the :class:`~bitmill.numerics.ggml_codebooks.Codebook`.
        index: ``runs n/8``. ``shift``: ``runs n/8``, 1 where the shift is down. ``scale``: ``runs``.
    """
    n = x.shape[1]
    apart = n == 16
    place, many, first, near, odd, _ = around  # every look into a tuple counts a reference
    weight, order, digit = np.empty(n, np.float32), np.empty(n, np.int64), np.empty(n, np.int32)
    sum_x, sum_w = np.zeros(n + 1 + LANES, np.float32), np.zeros(n + 1 + LANES, np.float32)
    peak, sorting, rank = np.empty(n + 1, np.float32), np.empty(n, np.float32), np.empty(n, np.int32)
    for r in range(start, stop):
        scale[r] = _ZERO
        for g in range(n // 8):
            index[r, g], shift[r, g] = 0, 0
        base, given, most = power[r // per], r % importance.shape[0], _ZERO
        for i in range(n):
            value = x[r, i]
            weight[i] = importance[given, i] * np.sqrt(base + value * value) if told else value * value
            most = max(most, abs(value))
        if most < quiet:
            continue
        _sort(r, x, sorting, rank, order)
        if apart:
            found, low, high, way = _cut_apart(x, r, weight, order)
        else:
            for k in range(n):
                i = order[k]
                sum_x[k + 1] = sum_x[k] + weight[i] * x[r, i]
                sum_w[k + 1] = sum_w[k] + weight[i]
            for k in range(n + 1, n + 1 + LANES):
                sum_x[k], sum_w[k] = sum_x[n], sum_w[n]
            found, low, high, way = _cut_alike(n, sum_x, sum_w, peak)
        if way < 0:
            continue
        for k in range(n):
            digit[order[k]] = 0 if k < low else (1 if k < high else 2)
        for g in range(n // 8):
            shift[r, g] = (way >> (n // 8 - 1 - g)) & 1 if apart else way
        if found < 0:
            for i in range(n):
                digit[i] = 2 - digit[i]
            for g in range(n // 8):
                shift[r, g] = 1 - shift[r, g]
        scale[r] = _to_codebook(
            x, r, weight, abs(found), digit, shift, place, many, first, near, odd, points, index
        )


@_inlined
def _sort(r: int, x: _Floats, value: _Floats, rank: _Ints, order: _Ints) -> None:
    """Indices in the order of the values, equal ones as they come: each value's rank is counted."""
    n = x.shape[1]
    for i in range(n):
        value[i] = x[r, i]
        rank[i] = 0
    for k in range(n):
        one = value[k]
        for i in range(n):
            rank[i] += _i(1) if one < value[i] or (one == value[i] and k < i) else _i(0)
    for i in range(n):
        order[rank[i]] = i


@_inlined
def _cut_alike(n: int, sum_x: _Floats, sum_w: _Floats, peak: _Floats) -> tuple[np.float32, int, int, int]:
    """Best scale and cuts when all are shifted alike: scale, first cut, second cut, 1 if down (-1: none).

    Sums are over the sorted weights, the last of them repeated ``LANES`` times. The best of all pairs of cuts
    is found side by side; then first cuts that come within a 128th of it are gone through in llama.cpp's
    order. The others cannot matter: among 1122 pairs there is a gap, wider than rounding, somewhere in that
    128th, and the first pair above it is taken whatever was taken before.
    """
    most = _ZERO
    for a in range(n + 1):
        low = spread(_ZERO)
        for b in range(a, n + 1, LANES):
            for shift in (_SHIFT, -_SHIFT):
                d, q = _fit(a, b, n, sum_x, sum_w, shift)
                value = over(times(d, d), minus(spread(_ZERO), q))
                low = where_less(value, low, value, low)
        peak[a] = -least(low)
        most = max(most, peak[a])
    sure = _SMALL < most < _LARGE and _SMALL < sum_w[n] < _LARGE and most * sum_w[n] > _SMALL
    limit = most - most * _f(2.0**-7) if sure else _f(-np.inf)
    best, scale, low_cut, high_cut, way = _f(-np.inf), _ZERO, -1, -1, -1
    for a in range(n + 1):
        if peak[a] < limit:
            continue
        for b in range(a, n + 1):
            for down in range(2):
                v0, v1, v2 = _values(down)
                d = (sum_x[a] - sum_x[0]) * v0 + (sum_x[b] - sum_x[a]) * v1 + (sum_x[n] - sum_x[b]) * v2
                q = (sum_w[a] - sum_w[0]) * v0 * v0 + (sum_w[b] - sum_w[a]) * v1 * v1
                q = q + (sum_w[n] - sum_w[b]) * v2 * v2
                if q > 0 and d * d > best * q:
                    scale = d / q
                    best, low_cut, high_cut, way = scale * d, a, b, down
    return scale, low_cut, high_cut, way


@_inlined
def _fit(a: int, b: int, n: int, sum_x: _Floats, sum_w: _Floats, shift: np.float32) -> tuple[_Lanes, _Lanes]:
    """What the scale is the ratio of, for first cut ``a`` and second cuts from ``b``."""
    v0, middle, most = shift - _ONE, spread(shift), spread(shift + _ONE)
    at_x, at_w = load(sum_x, b), load(sum_w, b)
    d = plus(spread((sum_x[a] - sum_x[0]) * v0), times(minus(at_x, spread(sum_x[a])), middle))
    d = plus(d, times(minus(spread(sum_x[n]), at_x), most))
    q = times(times(minus(at_w, spread(sum_w[a])), middle), middle)
    q = plus(spread((sum_w[a] - sum_w[0]) * v0 * v0), q)
    return d, plus(q, times(times(minus(spread(sum_w[n]), at_w), most), most))


@_inlined
def _shift(down: int) -> np.float32:
    return -_SHIFT if down else _SHIFT


@_inlined
def _values(down: int) -> tuple[np.float32, np.float32, np.float32]:
    shift = _shift(down)
    return -_ONE + shift, shift, _ONE + shift


@_compiled
def _cut_apart(x: _Floats, r: int, weight: _Floats, order: _Ints) -> tuple[np.float32, int, int, int]:
    """Best scale and cuts of sixteen weights whose halves are shifted each its own way; bit 1 of the last
    answer says whether the first half goes down, bit 0 the second."""
    n = x.shape[1]
    sum_x, sum_w = np.zeros((2, n + 1), np.float32), np.zeros((2, n + 1), np.float32)
    for k in range(n):
        i = order[k]
        for half in range(2):
            mine = (i >= 8) == (half == 1)
            sum_x[half, k + 1] = sum_x[half, k] + (weight[i] * x[r, i] if mine else _ZERO)
            sum_w[half, k + 1] = sum_w[half, k] + (weight[i] if mine else _ZERO)
    best, scale, low, high, way = _f(-np.inf), _ZERO, -1, -1, -1
    dot, norm = np.empty((2, 2), np.float32), np.empty((2, 2), np.float32)
    for a in range(n + 1):
        for b in range(a, n + 1):
            for half in range(2):
                for down in range(2):
                    v0, v1, v2 = _values(down)
                    dot[half, down] = (
                        sum_x[half, a] * v0
                        + (sum_x[half, b] - sum_x[half, a]) * v1
                        + (sum_x[half, n] - sum_x[half, b]) * v2
                    )
                    norm[half, down] = (
                        sum_w[half, a] * v0 * v0
                        + (sum_w[half, b] - sum_w[half, a]) * v1 * v1
                        + (sum_w[half, n] - sum_w[half, b]) * v2 * v2
                    )
            for k in range(4):
                d = dot[0, k >> 1] + dot[1, k & 1]
                q = norm[0, k >> 1] + norm[1, k & 1]
                if q > 0 and d * d > best * q:
                    scale = d / q
                    best, low, high, way = scale * d, a, b, k
    return scale, low, high, way


@_inlined
def _to_codebook(
    x: _Floats,
    r: int,
    weight: _Floats,
    scale: np.float32,
    digit: _Ints,
    down: _Ints,
    place: _Ints,
    many: _Ints,
    first: _Ints,
    near: _Ints,
    odd: _Ints,
    points: _Ints,
    index: _Ints,
) -> np.float32:
    """Each group's point, the best one around where its digits are not in the codebook; then the scale."""
    off = False
    for g in range(index.shape[1]):
        key, power = 0, 1
        for i in range(8):
            key += digit[8 * g + i] * power
            power *= 3
        index[r, g] = place[key]
        if place[key] < 0:
            off = True
            start = LANES * first[key]
            best = _nearest(start, many[key], scale, _shift(down[r, g]), x, r, 8 * g, weight, odd)
            index[r, g] = near[start + best]
    if not off:
        return scale
    dot, norm = _ZERO, _ZERO
    for g in range(index.shape[1]):
        reached = _values(down[r, g])
        for i in range(8):
            w, level = weight[8 * g + i], reached[points[index[r, g], i]]
            dot += w * level * x[r, 8 * g + i]
            norm += w * level * level
    return dot / norm if dot > 0 and norm > 0 else scale


@_inlined
def _nearest(
    start: int,
    count: int,
    scale: np.float32,
    shift: np.float32,
    x: _Floats,
    r: int,
    at: int,
    weight: _Floats,
    odd: _Ints,
) -> int:
    """The first point with the least error; the first of all if none is a number."""
    scales, base, low, best = spread(scale), spread(shift - _f(1.5)), spread(_f(np.inf)), spread(_ZERO)
    for b in range(0, count, LANES):
        total = _four(spread(_ZERO), scales, base, x, r, at, weight, odd, 8 * (start + b))
        total = _four(total, scales, base, x, r, at + 4, weight, odd, 8 * (start + b) + 4 * LANES)
        best = where_less(total, low, plus(spread(_f(b)), load(_ORDER, 0)), best)
        low = where_less(total, low, total, low)
    return int(least(where_less(spread(least(low)), low, spread(_f(np.inf)), best)))


@_inlined
def _four(
    total: _Lanes,
    scale: _Lanes,
    base: _Lanes,
    x: _Floats,
    r: int,
    at: int,
    weight: _Floats,
    odd: _Ints,
    from_: int,
) -> _Lanes:
    """``total`` and the errors of four coordinates more, at eight points side by side."""
    total = plus(total, _error(scale, base, load_bytes(odd, from_), x[r, at], weight[at]))
    total = plus(total, _error(scale, base, load_bytes(odd, from_ + LANES), x[r, at + 1], weight[at + 1]))
    total = plus(total, _error(scale, base, load_bytes(odd, from_ + 2 * LANES), x[r, at + 2], weight[at + 2]))
    return plus(total, _error(scale, base, load_bytes(odd, from_ + 3 * LANES), x[r, at + 3], weight[at + 3]))


@_inlined
def _error(scale: _Lanes, base: _Lanes, odd: _Lanes, x: np.float32, weight: np.float32) -> _Lanes:
    miss = minus(times(scale, plus(times(odd, spread(_f(0.5))), base)), spread(x))
    return times(times(spread(weight), miss), miss)


@_compiled
def refit_super_scale(
    start: int,
    stop: int,
    x: _Floats,
    told: bool,
    importance: _Floats,
    power: _Floats,
    points: _Ints,
    index: _Ints,
    shift: _Ints,
    scales: _Ints,
    fudge: np.float32,
    d: _Floats,
) -> None:
    """IQ1_M's ``d`` by least squares over super-blocks ``start … stop``; 0 stays 0. Rows of ``importance``
    (``256``) repeat."""
    for b in range(start, stop):
        if d[b] == 0:
            continue
        dot, norm, given = _ZERO, _ZERO, b % importance.shape[0]
        for i in range(256):
            g, value = i // 8, x[b, i]
            w = importance[given, i] * np.sqrt(power[b] + value * value) if told else value * value
            values = _values(shift[b, g])
            q = values[points[index[b, g], i % 8]] * _f(2 * scales[b, i // 16] + 1)
            dot += w * q * value
            norm += w * q * q
        if norm > 0:
            d[b] = dot / norm * fudge
