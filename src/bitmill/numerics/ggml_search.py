"""Scale searches of llama.cpp's block quantizers (K-quants: Kawrakow, llama.cpp PR #1684), bit for bit.

Two searches over runs of weights: symmetric (codes around 0) and affine (scale and non-positive minimum).
Both try a ladder of inverse scales, refit by weighted least squares and keep the best. Equality to the byte
needs float32 throughout, sums in element order, no fused multiply-add and the same rounding trick; hence
compiled loops without fast-math.

The order of a sum leaves nothing to vectorize inside a run, so ``LANES`` runs go side by side: a work buffer
holds element ``i`` of every lane next to each other, and each sum is a row of lanes. Buffers are flat with
constant offsets because that is what lets the compiler see that rows do not overlap.

Every kernel does items ``start … stop`` of its arrays, so that callers can share them out to threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitmill.numerics.lanes import LANES as EIGHT
from bitmill.numerics.lanes import load, minus, over, plus, spread, store, times, where_less

_compiled = njit(cache=True, nogil=True, error_model="numpy")
_inlined = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)

LANES = 64
"""Runs a search takes side by side; the unit of ``start … stop`` in the two run searches."""

SQUARE, SIZE, LOUDNESS, GIVEN, SHAPED = range(5)
"""Weights of elements: x² · |x| · rms + |x| · importance · importance times sqrt(power + x²)."""

_Floats = NDArray[np.float32]
_Codes = NDArray[Any]
_Eight = Any
_f, _i = np.float32, np.int32
_ROUND, _MANTISSA, _MIDDLE = _f(12582912.0), _i(0x007FFFFF), _i(0x00400000)
_TINY, _TENTH, _ZERO, _ONE = _f(1e-15), _f(0.1), _f(0), _f(1)

# Rows of the state buffer, as offsets.
_LOW, _HIGH, _INVERSE, _SCALE, _BEST, _CHOSEN, _ORIGIN, _SUM_W, _SUM_X, _SUM_Q, _SUM_QQ, _SUM_XQ, _ERROR = (
    LANES * row for row in range(13)
)
_NEW_SCALE, _NEW_LOW = LANES * 13, LANES * 14
_ROWS = 15


@_compiled
def rint(value: np.float32) -> np.int32:
    """Round half to even, exact below 2^22 and well defined beyond: 1.5 · 2^23 leaves it in the mantissa."""
    return _i((_f(value + _ROUND).view(np.int32) & _MANTISSA) - _MIDDLE)


@_compiled
def clipped(value: np.float32, low: np.int32, high: np.int32) -> np.int32:
    """``rint`` inside ``low … high``."""
    return max(low, min(high, rint(value)))


@_compiled
def _load(
    work: _Floats, n: int, first: int, x: _Floats, kind: int, importance: _Floats, power: _Floats, per: int
) -> None:
    """Fill ``work``: row 2i is element i of ``LANES`` runs from ``first``, row 2i+1 its weight.

    Run ``r`` uses ``power[r // per]`` and row ``r`` of ``importance``, whose rows repeat.
    """
    for j in range(LANES):
        r = min(first + j, x.shape[0] - 1)
        given = r % importance.shape[0] if kind >= GIVEN else 0
        base = _ZERO
        if kind == SHAPED:
            base = power[r // per]
        if kind == LOUDNESS:
            for i in range(n):
                base += x[r, i] * x[r, i]
            base = np.sqrt(base / _f(n))
        for i in range(n):
            value = x[r, i]
            if kind == SQUARE:
                weight = value * value
            elif kind == SIZE:
                weight = abs(value)
            elif kind == LOUDNESS:
                weight = base + abs(value)
            elif kind == GIVEN:
                weight = importance[given, i]
            else:
                weight = importance[given, i] * np.sqrt(base + value * value)
            work[2 * i * LANES + j] = value
            work[(2 * i + 1) * LANES + j] = weight


@_compiled
def symmetric_runs(
    start: int,
    stop: int,
    x: _Floats,
    kind: int,
    importance: _Floats,
    power: _Floats,
    per: int,
    half: int,
    codes: _Codes,
    scale: _Floats,
    share: _Floats,
) -> None:
    """Least-squares scale of codes ``-half … half-1`` (stored with ``half`` added), 19 inverse scales a run.

    Args:
        start, stop: groups of ``LANES`` runs.
        x: ``runs n``; ``codes`` likewise; ``scale`` and ``share`` (sum of weights) are ``runs``.
        kind, importance, power, per: weights of the elements, see :func:`_load`.
    """
    n = x.shape[1]
    work, s = np.empty(2 * n * LANES, np.float32), np.empty(_ROWS * LANES, np.float32)
    least, most = _i(-half), _i(half - 1)
    low, high = _f(least), _f(most)
    for group in range(start, stop):
        first = group * LANES
        _load(work, n, first, x, kind, importance, power, per)
        _peak(work, n, s)
        for trial in range(-10, 10):
            if trial != 0:
                ladder = _f(half) if trial == -10 else _f(half) + _TENTH * _f(trial)
                _try_symmetric(work, n, s, ladder, trial == -10, low, high)
        for j in range(min(LANES, x.shape[0] - first)):
            silent = s[_ERROR + j] < _TINY
            scale[first + j], share[first + j] = _ZERO if silent else s[_SCALE + j], s[_SUM_W + j]
            for i in range(n):
                q = _i(half) + clipped(s[_CHOSEN + j] * work[2 * i * LANES + j], least, most)
                codes[first + j, i] = _i(0) if silent else q


@_compiled
def _peak(work: _Floats, n: int, s: _Floats) -> None:
    """Signed value of largest magnitude (the first of equals) to ``_HIGH``, the magnitude to ``_ERROR``;
    the sum of weights to ``_SUM_W``."""
    for j in range(LANES):
        s[_HIGH + j] = _ONE
        s[_ERROR + j] = _ZERO
        s[_SUM_W + j] = _ZERO
    for i in range(n):
        for j in range(LANES):
            value = work[2 * i * LANES + j]
            larger = abs(value) > s[_ERROR + j]
            s[_HIGH + j] = value if larger else s[_HIGH + j]
            s[_ERROR + j] = abs(value) if larger else s[_ERROR + j]
            s[_SUM_W + j] += work[(2 * i + 1) * LANES + j]


@_compiled
def _try_symmetric(
    work: _Floats, n: int, s: _Floats, ladder: np.float32, always: bool, least: np.float32, most: np.float32
) -> None:
    for j in range(0, LANES, EIGHT):
        inverse = over(spread(-ladder), load(s, _HIGH + j))
        dot, norm = _fit_symmetric(work, n, j, inverse, least, most)
        scale = over(dot, norm)
        if always:
            scale = where_less(spread(_ZERO), norm, scale, spread(_ZERO))
            store(s, _SCALE + j, scale)
            store(s, _BEST + j, times(scale, dot))
            store(s, _CHOSEN + j, inverse)
        else:  # where the norm is 0, so is the product, which then is not above anything
            best = load(s, _BEST + j)
            gained, needed = times(dot, dot), times(best, norm)
            store(s, _SCALE + j, where_less(needed, gained, scale, load(s, _SCALE + j)))
            store(s, _BEST + j, where_less(needed, gained, times(scale, dot), best))
            store(s, _CHOSEN + j, where_less(needed, gained, inverse, load(s, _CHOSEN + j)))


@_inlined
def _fit_symmetric(
    work: _Floats, n: int, j: int, inverse: _Eight, least: np.float32, most: np.float32
) -> tuple[_Eight, _Eight]:
    """Sums of ``w x q`` and ``w q²`` of eight runs from ``j``; sums stay in registers."""
    low, high, middle = spread(least), spread(most), spread(_ROUND)
    dot, norm = spread(_ZERO), spread(_ZERO)
    for i in range(n):
        x, w = load(work, 2 * i * LANES + j), load(work, (2 * i + 1) * LANES + j)
        q = minus(plus(times(inverse, x), middle), middle)
        q = where_less(q, low, low, q)
        q = where_less(high, q, high, q)
        dot = plus(dot, times(times(w, x), q))
        norm = plus(norm, times(times(w, q), q))
    return dot, norm


@_compiled
def affine_runs(
    start: int,
    stop: int,
    x: _Floats,
    kind: int,
    importance: _Floats,
    power: _Floats,
    per: int,
    top: int,
    first_rung: np.float32,
    rung: np.float32,
    steps: int,
    absolute: bool,
    codes: _Codes,
    scale: _Floats,
    low: _Floats,
    share: _Floats,
) -> None:
    """Scale and minimum (never positive) of codes ``0 … top``.

    The inverse scales tried are ``first_rung + rung·k + top`` over the range, k ≤ ``steps``; what counts is
    the square of what is missed, or its size where ``absolute``.

    Args:
        start, stop: groups of ``LANES`` runs.
        x: ``runs n``; ``codes`` likewise; ``scale``, ``low`` (the minimum) and ``share`` (sum of weights) are
            ``runs``.
        kind, importance, power, per: weights of the elements, see :func:`_load`.
    """
    n = x.shape[1]
    work, s = np.empty(2 * n * LANES, np.float32), np.empty(_ROWS * LANES, np.float32)
    highest = _i(top)
    for group in range(start, stop):
        first = group * LANES
        _load(work, n, first, x, kind, importance, power, per)
        _range(work, n, s)
        _first_affine(work, n, s, highest, absolute)
        for k in range(steps + 1):
            _try_affine(work, n, s, highest, first_rung + rung * _f(k) + _f(top), absolute)
        for j in range(min(LANES, x.shape[0] - first)):
            flat = s[_BEST + j] < 0
            scale[first + j] = _ZERO if flat else s[_SCALE + j]
            low[first + j], share[first + j] = s[_LOW + j], s[_SUM_W + j]
            for i in range(n):
                shifted = work[2 * i * LANES + j] - s[_ORIGIN + j]
                q = clipped(s[_CHOSEN + j] * shifted, _i(0), highest)
                codes[first + j, i] = _i(0) if flat else q


@_compiled
def _range(work: _Floats, n: int, s: _Floats) -> None:
    """Smallest value or 0, largest value, sums of w and w·x. Of +0 and -0 the first one stays."""
    for j in range(LANES):
        s[_LOW + j] = work[j]
        s[_HIGH + j] = work[j]
        s[_SUM_W + j] = _ZERO
        s[_SUM_X + j] = _ZERO
    for i in range(n):
        for j in range(LANES):
            x, w = work[2 * i * LANES + j], work[(2 * i + 1) * LANES + j]
            lower, higher = x < s[_LOW + j], x > s[_HIGH + j]
            s[_LOW + j] = x if lower else s[_LOW + j]
            s[_HIGH + j] = x if higher else s[_HIGH + j]
            s[_SUM_W + j] += w
            s[_SUM_X + j] += w * x
    for j in range(LANES):
        s[_LOW + j] = _ZERO if s[_LOW + j] > 0 else s[_LOW + j]


@_compiled
def _first_affine(work: _Floats, n: int, s: _Floats, top: np.int32, absolute: bool) -> None:
    """The plain range as the answer to beat; a lane without range gets an error nothing can beat."""
    for j in range(LANES):
        s[_INVERSE + j] = _f(top) / (s[_HIGH + j] - s[_LOW + j])
        s[_NEW_SCALE + j] = _ONE / s[_INVERSE + j]
        s[_NEW_LOW + j] = s[_LOW + j]
    _affine_error(work, n, s, top, absolute)
    for j in range(LANES):
        s[_SCALE + j] = s[_NEW_SCALE + j]
        s[_BEST + j] = s[_ERROR + j] if s[_HIGH + j] > s[_LOW + j] else -_ONE
        s[_CHOSEN + j] = s[_INVERSE + j]
        s[_ORIGIN + j] = s[_LOW + j]


@_compiled
def _try_affine(work: _Floats, n: int, s: _Floats, top: np.int32, ladder: np.float32, absolute: bool) -> None:
    """One rung: assign codes, solve the two normal equations, keep the fit if its error is lower."""
    for j in range(LANES):
        s[_INVERSE + j] = ladder / (s[_HIGH + j] - s[_LOW + j])
        s[_SUM_Q + j] = _ZERO
        s[_SUM_QQ + j] = _ZERO
        s[_SUM_XQ + j] = _ZERO
    for i in range(n):
        for j in range(LANES):
            x, w = work[2 * i * LANES + j], work[(2 * i + 1) * LANES + j]
            q = _f(clipped(s[_INVERSE + j] * (x - s[_LOW + j]), _i(0), top))
            s[_SUM_Q + j] += w * q
            s[_SUM_QQ + j] += w * q * q
            s[_SUM_XQ + j] += w * q * x
    for j in range(LANES):
        sum_q, sum_qq, sum_xq = s[_SUM_Q + j], s[_SUM_QQ + j], s[_SUM_XQ + j]
        sum_w, sum_x = s[_SUM_W + j], s[_SUM_X + j]
        det = sum_w * sum_qq - sum_q * sum_q
        low = (sum_qq * sum_x - sum_q * sum_xq) / det
        scale = (sum_w * sum_xq - sum_x * sum_q) / det
        s[_NEW_SCALE + j] = sum_xq / sum_qq if low > 0 else scale
        s[_NEW_LOW + j] = _ZERO if low > 0 else low
        s[_SUM_Q + j] = det  # the sum has served; where det is not positive the fit is void
    _affine_error(work, n, s, top, absolute)
    for j in range(LANES):
        if s[_SUM_Q + j] > 0 and s[_ERROR + j] < s[_BEST + j]:
            s[_BEST + j] = s[_ERROR + j]
            s[_CHOSEN + j] = s[_INVERSE + j]
            s[_ORIGIN + j] = s[_LOW + j]
            s[_SCALE + j] = s[_NEW_SCALE + j]
            s[_LOW + j] = s[_NEW_LOW + j]


@_compiled
def _affine_error(work: _Floats, n: int, s: _Floats, top: np.int32, absolute: bool) -> None:
    for j in range(LANES):
        s[_ERROR + j] = _ZERO
    for i in range(n):
        for j in range(LANES):
            x, w = work[2 * i * LANES + j], work[(2 * i + 1) * LANES + j]
            q = _f(clipped(s[_INVERSE + j] * (x - s[_LOW + j]), _i(0), top))
            miss = s[_NEW_SCALE + j] * q + s[_NEW_LOW + j] - x
            s[_ERROR + j] += w * (abs(miss) if absolute else miss * miss)


@_compiled
def descent_runs(start: int, stop: int, x: _Floats, half: int, codes: _Codes, scale: _Floats) -> None:
    """Codes ``-half … half-1`` (stored with ``half`` added) by coordinate descent, every weight ``x²``.

    Element by element, the code that fits best to all the others; up to five sweeps of runs ``start … stop``.
    """
    n, least, most = x.shape[1], _i(-half), _i(half - 1)
    for r in range(start, stop):
        peak, size = _ZERO, _ZERO
        for i in range(n):
            if abs(x[r, i]) > size:
                size, peak = abs(x[r, i]), x[r, i]
        codes[r], scale[r] = 0, _ZERO
        if size < _TINY:
            continue
        inverse, dot, norm = _f(-half) / peak, _ZERO, _ZERO
        for i in range(n):
            q, w = clipped(inverse * x[r, i], least, most), x[r, i] * x[r, i]
            codes[r, i] = q + _i(half)
            dot += w * x[r, i] * _f(q)
            norm += w * _f(q) * _f(q)
        for _ in range(5):
            moved = False
            for i in range(n):
                value = x[r, i]
                w, was = value * value, _f(_i(codes[r, i]) - _i(half))
                dot_rest = dot - w * value * was
                if not dot_rest > 0:
                    continue
                norm_rest = norm - w * was * was
                code = clipped(value * norm_rest / dot_rest, least, most)
                if code == _i(codes[r, i]) - _i(half):
                    continue
                dot_new = dot_rest + w * value * _f(code)
                norm_new = norm_rest + w * _f(code) * _f(code)
                if norm_new > 0 and dot_new * dot_new * norm > dot * dot * norm_new:
                    codes[r, i], dot, norm, moved = code + _i(half), dot_new, norm_new, True
            if not moved:
                break
        scale[r] = dot / norm if norm > 0 else _ZERO


@_compiled
def mean_square(start: int, stop: int, x: _Floats, factor: np.float32, power: _Floats) -> None:
    """``factor`` times the mean square of each row, summed in order."""
    for r in range(start, stop):
        total = _ZERO
        for i in range(x.shape[1]):
            total += x[r, i] * x[r, i]
        power[r] = factor * total / _f(x.shape[1])
