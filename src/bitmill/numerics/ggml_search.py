"""Scale searches of llama.cpp's block quantizers (K-quants: Kawrakow, llama.cpp PR #1684), bit for bit.

Three searches over one block's scale: symmetric (codes around 0), affine (scale and non-positive minimum) and
positive (the scales of the scales). All of them try a ladder of inverse scales, refit by weighted least
squares and keep the best. Equality to the byte needs float32 throughout, sums in element order, no fused
multiply-add and the same rounding trick; hence compiled loops without fast-math.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_compiled = njit(cache=True, nogil=True, error_model="numpy")

_f = np.float32
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the rounded integer in the mantissa
_TINY = np.float32(1e-15)
_TENTH = np.float32(0.1)


@_compiled
def rint(value):
    """Round half to even, exact for ``|value|`` below 2^22 and well defined beyond it."""
    return (_f(value + _ROUND).view(np.int32) & 0x007FFFFF) - 0x00400000


@_compiled
def _clipped(value, low, high):
    return max(low, min(high, rint(value)))


@_compiled
def symmetric(x, w, half, codes):
    """Least-squares scale of codes ``-half … half-1`` (stored with ``half`` added); 19 inverse scales."""
    peak, size = _f(0), _f(0)
    for i in range(x.size):
        if abs(x[i]) > size:
            size, peak = abs(x[i]), x[i]
    codes[:] = 0
    if size < _TINY:
        return _f(0)
    scale, best, chosen = _f(0), _f(0), _f(0)
    for trial in range(-10, 10):
        offset = 0 if trial == -10 else trial
        if trial == 0:
            continue
        inverse = -(_f(half) + _TENTH * _f(offset)) / peak
        dot, norm = _f(0), _f(0)
        for i in range(x.size):
            q = _f(_clipped(inverse * x[i], -half, half - 1))
            dot += w[i] * x[i] * q
            norm += w[i] * q * q
        if trial == -10 or (norm > 0 and dot * dot > best * norm):
            scale = dot / norm if norm != 0 else _f(0)
            best, chosen = scale * dot, inverse
    for i in range(x.size):
        codes[i] = half + _clipped(chosen * x[i], -half, half - 1)
    return scale


@_compiled
def affine(x, w, top, first, stride, steps, codes):
    """Scale and minus the minimum of codes ``0 … top``; the ladder is ``first + stride·k + top``, k ≤ steps."""
    low, high = x[0], x[0]
    sum_w, sum_x = _f(0), _f(0)
    for i in range(x.size):
        low, high = min(low, x[i]), max(high, x[i])
        sum_w += w[i]
        sum_x += w[i] * x[i]
    low = min(low, _f(0))
    codes[:] = 0
    if high <= low:
        return _f(0), -low
    inverse = _f(top) / (high - low)
    scale, best = _f(1) / inverse, _f(0)
    chosen, origin = inverse, low
    for i in range(x.size):
        miss = scale * _f(_clipped(inverse * (x[i] - low), 0, top)) + low - x[i]
        best += w[i] * (miss * miss)
    for k in range(steps + 1):
        inverse = (first + stride * _f(k) + _f(top)) / (high - low)
        sum_q, sum_qq, sum_xq = _f(0), _f(0), _f(0)
        for i in range(x.size):
            q = _f(_clipped(inverse * (x[i] - low), 0, top))
            sum_q += w[i] * q
            sum_qq += w[i] * q * q
            sum_xq += w[i] * q * x[i]
        det = sum_w * sum_qq - sum_q * sum_q
        if not det > 0:
            continue
        new_scale = (sum_w * sum_xq - sum_x * sum_q) / det
        new_low = (sum_qq * sum_x - sum_q * sum_xq) / det
        if new_low > 0:
            new_low, new_scale = _f(0), sum_xq / sum_qq
        error = _f(0)
        for i in range(x.size):
            q = _f(_clipped(inverse * (x[i] - low), 0, top))
            miss = new_scale * q + new_low - x[i]
            error += w[i] * (miss * miss)
        if error < best:
            best, chosen, origin = error, inverse, low
            scale, low = new_scale, new_low
    for i in range(x.size):
        codes[i] = _clipped(chosen * (x[i] - origin), 0, top)
    return scale, -low


@_compiled
def positive(x, w, top, codes):
    """Scale of non-negative values in codes ``0 … top``: nine inverse scales, then coordinate descent."""
    high = _f(0)
    for i in range(x.size):
        high = max(high, x[i])
    codes[:] = 0
    if high < _TINY:
        return _f(0)
    chosen, best = _f(0), _f(0)
    for trial in range(-5, 5):
        offset = 0 if trial == -5 else trial
        if trial == 0:
            continue
        inverse = (_TENTH * _f(offset) + _f(top)) / high
        scale, error = _f(1) / inverse, _f(0)
        for i in range(x.size):
            miss = x[i] - scale * _f(min(top, rint(inverse * x[i])))
            error += w[i] * miss * miss
        if trial == -5 or error < best:
            chosen, best = inverse, error
    dot, norm = _f(0), _f(0)
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
    return dot / norm if norm > 0 else _f(0)


@_compiled
def plain_symmetric(start, stop, x, half, codes, d):
    """Q4_0, Q5_0 without importance: the value of largest magnitude becomes code 0, that is ``-half``."""
    for b in range(start, stop):
        peak, size = _f(0), _f(0)
        for i in range(32):
            if abs(x[b, i]) > size:
                size, peak = abs(x[b, i]), x[b, i]
        d[b] = peak / _f(-half)
        inverse = _f(1) / d[b] if d[b] != 0 else _f(0)
        for i in range(32):
            codes[b, i] = _truncated(x[b, i] * inverse + (_f(half) + _f(0.5)), 2 * half - 1)


@_compiled
def plain_affine(start, stop, x, top, codes, d, m):
    """Q4_1, Q5_1 without importance: the block's range in ``top`` steps."""
    for b in range(start, stop):
        low, high = x[b, 0], x[b, 0]
        for i in range(32):
            low, high = min(low, x[b, i]), max(high, x[b, i])
        d[b], m[b] = (high - low) / _f(top), low
        inverse = _f(1) / d[b] if d[b] != 0 else _f(0)
        for i in range(32):
            codes[b, i] = _truncated((x[b, i] - low) * inverse + _f(0.5), top)


@_compiled
def plain_absmax(start, stop, x, codes, d):
    """Q8_0: the largest magnitude in 127 steps, halves away from zero."""
    for b in range(start, stop):
        size = _f(0)
        for i in range(32):
            size = max(size, abs(x[b, i]))
        d[b] = size / _f(127)
        inverse = _f(1) / d[b] if d[b] != 0 else _f(0)
        for i in range(32):
            value = x[b, i] * inverse
            whole = np.trunc(value)
            if abs(value - whole) >= _f(0.5):
                whole += np.copysign(_f(1), value)
            codes[b, i] = np.int8(whole) if abs(whole) <= 127 else np.int8(0)


@_compiled
def _truncated(value, top):
    """Towards zero, capped; 0 where a subnormal scale has no finite inverse."""
    return min(top, np.int32(value)) if abs(value) < _f(256) else 0


@_compiled
def row_power(start, stop, x, power):
    """Mean square of each row, summed in order."""
    for r in range(start, stop):
        total = _f(0)
        for i in range(x.shape[1]):
            total += x[r, i] * x[r, i]
        power[r] = total / _f(x.shape[1])


@_compiled
def weighted_legacy(start, stop, x, importance, power, span, two_sided, codes, d, m):
    """Q4_0 Q5_0 (``two_sided``, ``span`` = half) and Q4_1 Q5_1 (``span`` = top) with importance."""
    w = np.empty(32, np.float32)
    per_row = x.shape[0] // power.size
    for b in range(start, stop):
        for i in range(32):
            shape = np.sqrt(power[b // per_row] + x[b, i] * x[b, i])
            w[i] = importance[b % importance.shape[0], i] * shape
        if two_sided:
            d[b] = symmetric(x[b], w, span, codes[b])
        else:
            d[b], low = affine(x[b], w, span, _f(-0.9), _f(0.05), 36, codes[b])
            m[b] = -low


@_compiled
def search_q4_k(start, stop, x, importance, codes, d, dmin, scales, mins):
    """Q4_K super-blocks: eight affine searches, then six-bit scales and mins. ``importance`` may be empty."""
    w = np.empty(32, np.float32)
    s, m, share = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
    for b in range(start, stop):
        power = _f(0)
        for i in range(256):
            power += x[b, i] * x[b, i]
        power = _f(2) * power / _f(256)
        for j in range(8):
            run, into = x[b, 32 * j : 32 * j + 32], codes[b, 32 * j : 32 * j + 32]
            if importance.size:
                share[j] = _f(0)
                for i in range(32):
                    w[i] = importance[b % importance.shape[0], 32 * j + i] * np.sqrt(power + run[i] * run[i])
                    share[j] += w[i]
                s[j], m[j] = affine(run, w, 15, _f(-0.9), _f(0.05), 36, into)
            else:
                total = _f(0)
                for i in range(32):
                    total += run[i] * run[i]
                rms = np.sqrt(total / _f(32))
                for i in range(32):
                    w[i] = rms + abs(run[i])
                s[j], m[j] = affine(run, w, 15, _f(-1), _f(0.1), 20, into)
        if importance.size:
            d[b] = positive(s, share, 63, scales[b])
            dmin[b] = positive(m, share, 63, mins[b])
        else:
            d[b] = _six_bits(s, scales[b])
            dmin[b] = _six_bits(m, mins[b])


@_compiled
def _six_bits(values, codes):
    high = _f(0)
    for j in range(values.size):
        high = max(high, values[j])
    inverse = _f(63) / high if high > 0 else _f(0)
    for j in range(values.size):
        codes[j] = min(63, rint(inverse * values[j]))
    return high / _f(63)


@_compiled
def search_q6_k(start, stop, x, importance, codes, d, scales):
    """Q6_K super-blocks: sixteen symmetric searches, then eight-bit scales. ``importance`` may be empty."""
    w, s = np.empty(16, np.float32), np.empty(16, np.float32)
    for b in range(start, stop):
        peak, size = _f(0), _f(0)
        for j in range(16):
            run = x[b, 16 * j : 16 * j + 16]
            for i in range(16):
                if importance.size:
                    w[i] = importance[b % importance.shape[0], 16 * j + i]
                else:
                    w[i] = run[i] * run[i]
            s[j] = symmetric(run, w, 32, codes[b, 16 * j : 16 * j + 16])
            if abs(s[j]) > size:
                size, peak = abs(s[j]), s[j]
        if size < _TINY:
            d[b] = _f(0)
            scales[b] = 0
            codes[b] = 0
            continue
        inverse = _f(-128) / peak
        d[b] = _f(1) / inverse
        for j in range(16):
            scales[b, j] = min(127, rint(inverse * s[j]))


@_compiled
def settle_q4_k(start, stop, x, d, dmin, scales, mins, codes):
    """Codes against the stored (half-precision) scales; a sub-block whose scale is 0 keeps its codes."""
    for b in range(start, stop):
        for j in range(8):
            scale, low = d[b] * _f(scales[b, j]), dmin[b] * _f(mins[b, j])
            if scale != 0:
                for i in range(32 * j, 32 * j + 32):
                    codes[b, i] = _clipped((x[b, i] + low) / scale, 0, 15)


@_compiled
def settle_q6_k(start, stop, x, d, scales, codes):
    """Codes against the stored (half-precision) scales; a sub-block whose scale is 0 keeps its codes."""
    for b in range(start, stop):
        for j in range(16):
            scale = d[b] * _f(scales[b, j])
            if scale != 0:
                for i in range(16 * j, 16 * j + 16):
                    codes[b, i] = 32 + _clipped(x[b, i] / scale, -32, 31)
