"""What surrounds llama.cpp's scale searches: plain rounding of 32-blocks, super-block scales, final codes.

Every kernel does blocks ``start … stop``; the conditions of equality are those of
:mod:`bitmill.numerics.ggml_search`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitmill.numerics.ggml_search import clipped, rint

_compiled = njit(cache=True, nogil=True, error_model="numpy")

_Floats = NDArray[np.float32]
_Codes = NDArray[Any]
_f, _i = np.float32, np.int32
_ZERO, _ONE, _TINY, _TENTH = _f(0), _f(1), _f(1e-15), _f(0.1)


@_compiled
def _sortable(bits: np.int32) -> np.int32:
    """Integers in the order of the floats they are the bits of; its own inverse."""
    return _i(bits ^ ((bits >> _i(31)) & _i(0x7FFFFFFF)))


@_compiled
def _extremes(run: _Floats) -> tuple[np.float32, np.float32]:
    """Smallest and largest value. As integers, because that order may be reduced in parallel."""
    least = _sortable(_f(run[0]).view(np.int32))
    most = least
    for i in range(32):
        key = _sortable(_f(run[i]).view(np.int32))
        least, most = min(least, key), max(most, key)
    return _i(_sortable(least)).view(np.float32), _i(_sortable(most)).view(np.float32)


@_compiled
def plain_symmetric(start: int, stop: int, x: _Floats, half: int, codes: _Codes, d: _Floats) -> None:
    """Q4_0, Q5_0 without importance: the value of largest magnitude becomes code 0, that is ``-half``."""
    middle, top = _f(half) + _f(0.5), _i(2 * half - 1)
    for b in range(start, stop):
        low, high = _extremes(x[b])
        peak = high if high > -low else low
        if high == -low:  # the first of equals wins, and zeros are +0
            peak, size = _ZERO, _ZERO
            for i in range(32):
                if abs(x[b, i]) > size:
                    size, peak = abs(x[b, i]), x[b, i]
        d[b] = peak / _f(-half)
        inverse = _ONE / d[b] if d[b] != 0 else _ZERO
        for i in range(32):
            codes[b, i] = _truncated(x[b, i] * inverse + middle, top)


@_compiled
def plain_affine(start: int, stop: int, x: _Floats, top: int, codes: _Codes, d: _Floats, m: _Floats) -> None:
    """Q4_1, Q5_1 without importance: the block's range in ``top`` steps."""
    highest = _i(top)
    for b in range(start, stop):
        low, high = _extremes(x[b])
        if low == 0 or high == 0:  # +0 and -0 are equal, and the first one wins
            low, high = x[b, 0], x[b, 0]
            for i in range(32):
                lower, higher = x[b, i] < low, x[b, i] > high
                low = x[b, i] if lower else low
                high = x[b, i] if higher else high
        d[b], m[b] = (high - low) / _f(top), low
        inverse = _ONE / d[b] if d[b] != 0 else _ZERO
        for i in range(32):
            codes[b, i] = _truncated((x[b, i] - low) * inverse + _f(0.5), highest)


@_compiled
def plain_absmax(start: int, stop: int, x: _Floats, codes: _Codes, d: _Floats) -> None:
    """Q8_0: the largest magnitude in 127 steps, halves away from zero."""
    for b in range(start, stop):
        low, high = _extremes(x[b])
        d[b] = max(abs(low), abs(high)) / _f(127)
        inverse = _ONE / d[b] if d[b] != 0 else _ZERO
        for i in range(32):
            value = x[b, i] * inverse
            whole = np.trunc(value)
            whole += np.copysign(_ONE, value) if abs(value - whole) >= _f(0.5) else _ZERO
            codes[b, i] = _i(whole) if abs(whole) < _f(128) else _i(0)


@_compiled
def plain_ternary(start: int, stop: int, x: _Floats, codes: _Codes, d: _Floats) -> None:
    """TQ1_0, TQ2_0: the largest magnitude is 1; halves away from zero."""
    for b in range(start, stop):
        most = _ZERO
        for i in range(x.shape[1]):
            most = max(most, abs(x[b, i]))
        d[b] = most
        inverse = _ONE / most if most != 0 else _ZERO
        for i in range(x.shape[1]):
            value = x[b, i] * inverse
            value = value if abs(value) < _f(2) else _ZERO  # a subnormal scale has no finite inverse
            codes[b, i] = 2 if value >= _f(0.5) else (0 if value <= _f(-0.5) else 1)


@_compiled
def _truncated(value: np.float32, top: np.int32) -> np.int32:
    """Towards zero, capped; 0 where a subnormal scale has no finite inverse."""
    return min(top, _i(value)) if abs(value) < _f(256) else _i(0)


@_compiled
def scales_and_mins(
    start: int,
    stop: int,
    scale: _Floats,
    low: _Floats,
    share: _Floats,
    top: int,
    told: bool,
    d: _Floats,
    dmin: _Floats,
    scales: _Codes,
    mins: _Codes,
) -> None:
    """Scales and mins of a super-block's sub-blocks as codes ``0 … top``: searched when ``told`` what
    matters."""
    below = np.empty(scale.shape[1], np.float32)
    for b in range(start, stop):
        for j in range(scale.shape[1]):
            below[j] = -low[b, j]
        if told:
            d[b] = _positive(scale[b], share[b], top, scales[b])
            dmin[b] = _positive(below, share[b], top, mins[b])
        else:
            d[b] = _even(scale[b], top, scales[b])
            dmin[b] = _even(below, top, mins[b])


@_compiled
def scales_q3_k(start: int, stop: int, scale: _Floats, d: _Floats, scales: _Codes) -> None:
    """Six-bit scales of sixteen sub-blocks, the largest at -32."""
    for b in range(start, stop):
        peak = _largest(scale[b])
        inverse = _f(-32) / peak if peak != 0 else _ZERO
        d[b] = _ONE / inverse if peak != 0 else _ZERO
        for j in range(16):
            scales[b, j] = clipped(inverse * scale[b, j], _i(-32), _i(31)) if peak != 0 else _i(-32)


@_compiled
def _largest(values: _Floats) -> np.float32:
    """The value of largest magnitude, the first of equals."""
    peak, size = _ZERO, _ZERO
    for j in range(values.size):
        if abs(values[j]) > size:
            size, peak = abs(values[j]), values[j]
    return peak


@_compiled
def scales_q6_k(start: int, stop: int, scale: _Floats, codes: _Codes, d: _Floats, scales: _Codes) -> None:
    """Eight-bit scales of sixteen sub-blocks, the largest at -128; a silent super-block is all zero bytes."""
    for b in range(start, stop):
        peak = _largest(scale[b])
        if abs(peak) < _TINY:
            d[b] = _ZERO
            scales[b] = 0
            codes[b] = 0
            continue
        inverse = _f(-128) / peak
        d[b] = _ONE / inverse
        for j in range(16):
            scales[b, j] = min(_i(127), rint(inverse * scale[b, j]))


@_compiled
def _positive(x: _Floats, w: _Floats, top: int, codes: _Codes) -> np.float32:
    """Scale of non-negative values in codes ``0 … top``: nine inverse scales, then coordinate descent."""
    high = _ZERO
    for i in range(x.size):
        high = max(high, x[i])
    codes[:] = 0
    if high < _TINY:
        return _ZERO
    chosen, best = _ZERO, _ZERO
    for trial in range(-5, 5):
        if trial == 0:
            continue
        inverse = (_f(top) if trial == -5 else _TENTH * _f(trial) + _f(top)) / high
        scale, error = _ONE / inverse, _ZERO
        for i in range(x.size):
            miss = x[i] - scale * _f(min(top, rint(inverse * x[i])))
            error += w[i] * miss * miss
        if trial == -5 or error < best:
            chosen, best = inverse, error
    dot, norm = _ZERO, _ZERO
    for i in range(x.size):
        codes[i] = min(top, rint(chosen * x[i]))
        dot += w[i] * x[i] * _f(codes[i])
        norm += w[i] * _f(codes[i]) * _f(codes[i])
    for _ in range(5):
        moved = False
        for i in range(x.size):
            q = _f(codes[i])
            dot_rest, norm_rest = dot - w[i] * x[i] * q, norm - w[i] * q * q
            if not (dot_rest > 0 and norm_rest > 0):
                continue
            code = min(top, rint(x[i] * norm_rest / dot_rest))
            if code == codes[i]:
                continue
            dot_new = dot_rest + w[i] * x[i] * _f(code)
            norm_new = norm_rest + w[i] * _f(code) * _f(code)
            if dot_new * dot_new * norm > dot * dot * norm_new:
                codes[i], dot, norm, moved = code, dot_new, norm_new, True
        if not moved:
            break
    return dot / norm if norm > 0 else _ZERO


@_compiled
def _even(values: _Floats, top: int, codes: _Codes) -> np.float32:
    high = _ZERO
    for j in range(values.size):
        high = max(high, values[j])
    inverse = _f(top) / high if high > 0 else _ZERO
    for j in range(values.size):
        codes[j] = min(_i(top), rint(inverse * values[j]))
    return high / _f(top)


@_compiled
def settle_ranged(
    start: int,
    stop: int,
    x: _Floats,
    d: _Floats,
    dmin: _Floats,
    scales: _Codes,
    mins: _Codes,
    top: int,
    codes: _Codes,
) -> None:
    """Codes ``0 … top`` against the stored (half-precision) scales; a sub-block whose scale is 0 keeps its
    codes."""
    run, highest = x.shape[1] // scales.shape[1], _i(top)
    for b in range(start, stop):
        for j in range(scales.shape[1]):
            scale, low = d[b] * _f(scales[b, j]), dmin[b] * _f(mins[b, j])
            if scale != 0:
                for i in range(run * j, run * j + run):
                    codes[b, i] = clipped((x[b, i] + low) / scale, _i(0), highest)


@_compiled
def settle_symmetric(
    start: int, stop: int, x: _Floats, d: _Floats, scales: _Codes, half: int, codes: _Codes
) -> None:
    """Codes ``-half … half-1`` likewise, stored with ``half`` added."""
    run, least, most = x.shape[1] // scales.shape[1], _i(-half), _i(half - 1)
    for b in range(start, stop):
        for j in range(scales.shape[1]):
            scale = d[b] * _f(scales[b, j])
            if scale != 0:
                for i in range(run * j, run * j + run):
                    codes[b, i] = _i(half) + clipped(x[b, i] / scale, least, most)
