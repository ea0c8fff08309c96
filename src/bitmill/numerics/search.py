"""Weighted least-squares fits of quantization ranges, and the small arithmetic the grids share.

The searches minimize ``Σ u (w - ŵ)²`` over a block of weights, where ``u`` is the mean square of each input
channel (the diagonal of the Hessian) and ``ŵ`` is what the *stored*, rounded parameters decode to. Every
search starts from the plain rule and replaces it only by something with a smaller error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bitmill.numerics.floats import Element

Array = np.ndarray[Any, Any]
Real = float | np.floating[Any]
Precision = tuple[float, float, float, float, float]

SYMMETRIC, INTEGER_ZERO, REAL_ZERO = 0, 1, 2

_CHUNK = 1024
_WIDEST, _COARSE, _FINE, _HOPELESS = 1.05, 0.05, 0.0125, 3.0
"""Ranges tried, as factors of the plain one: from 1.05 down to 0.30, or until the error of what is cut off is
three times the best; then closer around the best. Trying all 61 of the finer steps costs several times as
much and lowers the error of 2- to 4-bit groups by 0.01 %."""


def _precision(bits: int, low: int, most: float) -> Precision:
    """Smallest magnitude kept, smallest normal one, largest; and the two constants of :func:`_rounded`."""
    return 2.0**low, 2.0 ** (low + bits - 1), most, 1.5 * 2.0 ** (52 + low), 2.0 ** (53 - bits) + 1.0


_PRECISION = {
    "f16": _precision(11, -24, 65504.0),
    "bf16": _precision(8, -126, 3.38e38),
    "f32": _precision(24, -126, 3.40e38),
}


def stored(x: Tensor, dtype: str) -> Tensor:
    """``x`` as a scale of ``dtype`` (``f16 bf16 f32``) holds it, in float32: rounded, finite, never 0.

    The magnitude stays at or above the smallest one, so that dividing by a stored scale is always defined.
    """
    least, _, most, _, _ = _PRECISION[dtype]
    torch_dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    magnitude = x.to(torch.float32).abs().clamp(least, most).to(torch_dtype).to(torch.float32)
    return magnitude.copysign(x)


def spread(blocks: Tensor, group: int, at: int, columns: int) -> Tensor:
    """Per-block values ``out groups`` as columns ``at … at + columns``, or as one column where a single
    block covers them all (it broadcasts). ``group`` is the block's width, 0 or -1 when there is only one."""
    if group <= 0 or blocks.shape[1] == 1:
        return blocks
    first, last = at // group, (at + columns - 1) // group
    if first == last:
        return blocks[:, first : first + 1]
    index = torch.arange(at, at + columns, device=blocks.device) // group
    return blocks.index_select(1, index)


def weights_of(importance: Tensor, w: Tensor) -> Tensor:
    """``importance`` as ``1 in`` or ``out in`` float32 of mean 1; all ones when it carries no information."""
    u = importance.to(torch.float32).reshape(-1, w.shape[1])
    mean = u.mean()
    return u / mean if bool(mean > 0) else torch.ones_like(u)


def real_zero_range(low: Tensor, high: Tensor, top: int, dtype: str) -> tuple[Tensor, Tensor]:
    """Scale and real zero point, as stored, of codes ``0 … top`` that span ``low … high``; the span is
    widened to at least half of its farther end, so that a constant block has a step."""
    low, high = torch.minimum(low, high / 2), torch.maximum(high, low / 2)
    step = (high - low) / top
    scale = stored(step, dtype)
    lost = step < scale / 2  # smaller than any scale: the codes hold zeros only
    return scale, torch.where(lost, 0.0, stored(-low / scale, dtype))


def by_rows(rows: int, work: Callable[[int, int], None]) -> None:
    """``work(first, last)`` over all rows, on as many threads as torch uses; ``work`` releases the GIL."""
    threads = max(1, min(torch.get_num_threads(), rows))
    if threads == 1:
        work(0, rows)
        return
    edges = [rows * k // threads for k in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, a, b) for a, b in pairwise(edges)]:
            done.result()


def search_affine(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, *, bits: int, kind: int, floor: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """Scale and zero of ``scale · (code - zero)`` with the least weighted error, block by block.

    Shrinks the plain range in steps, moves the zero beside it, then alternates codes and least squares
    until nothing improves. For ``SYMMETRIC`` blocks of up to 5 bits negative scales are tried too: they turn
    the one extra negative level to the side that needs it.

    Args:
        w: ``out in`` float32; every row holds ``scale.shape[1]`` blocks of equal width.
        u: ``out in`` or ``1 in`` float32, the weight of each squared error.
        scale, zero: ``out blocks``, the plain rule's answer, already rounded.
        bits: width of a code. kind: ``SYMMETRIC``, ``INTEGER_ZERO`` or ``REAL_ZERO``.
        floor: smallest integer zero. dtype: what the scale (and a real zero) is stored in.

    Returns:
        ``scale`` and ``zero``, rounded, of the same shapes.
    """
    values, weights = w.contiguous().cpu().numpy(), u.contiguous().cpu().numpy()
    scales, zeros = scale.clone().cpu().numpy(), zero.clone().cpu().numpy()
    top = 2**bits - 1
    precision = _PRECISION[dtype]

    def work(first: int, last: int) -> None:
        _affine_rows(first, last, values, weights, scales, zeros, top, kind, floor, precision)

    by_rows(w.shape[0], work)
    return torch.from_numpy(scales).to(w.device), torch.from_numpy(zeros).to(w.device)


def search_scale(w: Tensor, u: Tensor, scales: Tensor, element: Element | Tensor) -> Tensor:
    """Which of several scales gives each block the least weighted error; the first of equals.

    Args:
        w: ``out in`` float32; every row holds ``scales.shape[1]`` blocks of equal width.
        u: ``out in`` or ``1 in`` float32, the weight of each squared error.
        scales: ``out blocks candidates`` float32, positive, as stored.
        element: what is scaled: a small floating-point number, or a sorted table of 16 levels.

    Returns:
        Index of the best candidate, ``out blocks`` int64.
    """
    values, weights = w.contiguous().cpu().numpy(), u.contiguous().cpu().numpy()
    candidates = scales.contiguous().cpu().numpy()
    best = np.zeros(candidates.shape[:2], np.int64)
    if isinstance(element, Element):
        shape = (element.mantissa, element.lowest, element.largest)

        def work(first: int, last: int) -> None:
            _float_rows(first, last, values, weights, candidates, best, *shape)

    else:
        levels = element.to(torch.float32).cpu().numpy()
        middles = (levels[1:] + levels[:-1]) / 2

        def work(first: int, last: int) -> None:
            _level_rows(first, last, values, weights, candidates, best, levels, middles)

    by_rows(w.shape[0], work)
    return torch.from_numpy(best).to(w.device)


@njit(nogil=True, cache=True)
def _rounded(x: Real, precision: Precision) -> Any:
    """``x`` to the nearest number with that many significant bits; what :func:`stored` does, one number.

    Veltkamp's splitting in float64: two multiplications instead of taking the exponent apart, which costs
    more than the error of a group of weights. Halfway cases may go either way.
    """
    least, normal, most, shift, split = precision
    size = min(max(np.float64(abs(x)), least), most)
    if size < normal:
        size = (size + shift) - shift
    else:
        high = size * split
        size = high - (high - size)
    return np.float32(math.copysign(size, x))


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _affine_error(v: Array, u: Array, scale: Real, zero: Real, top: int) -> Any:
    total = 0.0
    inverse = np.float32(1.0) / scale
    high = np.float32(top)
    for start in range(0, v.shape[0], _CHUNK):
        part = np.float32(0.0)
        for i in range(start, min(start + _CHUNK, v.shape[0])):
            code = min(max(np.rint(v[i] * inverse + zero), np.float32(0.0)), high)
            miss = v[i] - scale * (code - zero)
            part += u[i] * miss * miss
        total += part
    return total


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _affine_sums(v: Array, u: Array, scale: Real, zero: Real, top: int) -> Any:
    """``Σu, Σuq, Σuq², Σuw, Σuwq`` for the codes ``q`` that ``scale`` and ``zero`` give."""
    su = suq = suqq = suw = suwq = 0.0
    inverse, high = np.float32(1.0) / scale, np.float32(top)
    for i in range(v.shape[0]):
        q = np.float64(min(max(np.rint(v[i] * inverse + zero), np.float32(0.0)), high))
        weight, value = np.float64(u[i]), np.float64(v[i])
        su += weight
        suq += weight * q
        suqq += weight * q * q
        suw += weight * value
        suwq += weight * value * q
    return su, suq, suqq, suw, suwq


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_refit(
    v: Array, u: Array, scale: Real, zero: Real, top: int, kind: int, floor: int, precision: Precision
) -> Any:
    """Least squares for the codes that ``scale`` and ``zero`` give; the old pair where it is singular."""
    su, suq, suqq, suw, suwq = _affine_sums(v, u, scale, zero, top)
    z = np.float64(zero)
    if kind != SYMMETRIC:
        determinant = su * suqq - suq * suq
        if determinant <= 1e-9 * su * suqq:
            return scale, zero
        slope = (su * suwq - suq * suw) / determinant
        if slope <= 0.0:
            return scale, zero
        z = (suq * slope - suw) / (su * slope)
        if kind == REAL_ZERO:
            if abs(z) > 2.0 * top:
                return scale, zero
            return _rounded(slope, precision), _rounded(z, precision)
        z = min(max(np.rint(z), np.float64(floor)), np.float64(top))
    square = suqq - 2.0 * z * suq + z * z * su
    if square <= 0.0:
        return scale, zero
    slope = (suwq - z * suw) / square
    if slope == 0.0:
        return scale, zero
    return _rounded(slope, precision), np.float32(z)


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_block(
    v: Array,
    u: Array,
    scale: Real,
    zero: Real,
    top: int,
    kind: int,
    floor: int,
    precision: Precision,
) -> Any:
    best, best_scale, best_zero = _affine_error(v, u, scale, zero, top), scale, zero
    if best == 0.0:
        return scale, zero
    centre = np.float32(top) / np.float32(2.0)
    found = np.float32(1.0)
    for step, tries in ((_COARSE, 16), (_FINE, 5)):
        first = _WIDEST if tries == 16 else found + 2 * step
        for i in range(tries):
            factor, least = np.float32(first - i * step), np.inf
            s = _rounded(scale * factor, precision)
            for k in range(-1, 2):
                if kind == SYMMETRIC:
                    if k == 0 or (k < 0 and top > 31):
                        continue
                    trial, z = np.float32(k) * s, zero
                elif kind == INTEGER_ZERO:
                    trial, z = s, min(max(zero + np.float32(k), np.float32(floor)), np.float32(top))
                else:
                    shift = centre + np.float32(k) - (centre - zero) * (scale / s)
                    trial, z = s, _rounded(shift, precision)
                error = _affine_error(v, u, trial, z, top)
                least = min(least, error)
                if error < best:
                    best, best_scale, best_zero = error, trial, z
                    found = factor if tries == 16 else found
            if least > _HOPELESS * best:
                break
    for _ in range(8):
        s, z = _affine_refit(v, u, best_scale, best_zero, top, kind, floor, precision)
        error = _affine_error(v, u, s, z, top)
        if not error < best:
            break
        best, best_scale, best_zero = error, s, z
    return best_scale, best_zero


@njit(nogil=True, cache=True, error_model="numpy")
def _affine_rows(
    first: int,
    last: int,
    values: Array,
    weights: Array,
    scales: Array,
    zeros: Array,
    top: int,
    kind: int,
    floor: int,
    precision: Precision,
) -> None:
    width = values.shape[1] // scales.shape[1]
    for row in range(first, last):
        u = weights[row if weights.shape[0] > 1 else 0]
        for block in range(scales.shape[1]):
            a, b = block * width, (block + 1) * width
            scales[row, block], zeros[row, block] = _affine_block(
                values[row, a:b],
                u[a:b],
                scales[row, block],
                zeros[row, block],
                top,
                kind,
                floor,
                precision,
            )


@njit(nogil=True, cache=True, fastmath=True)
def _float_error(
    v: Array, u: Array, scale: Real, mantissa: int, lowest: int, largest: Real, quanta: Array
) -> Any:
    """``quanta`` is scratch: the spacing of the numbers at each value, by arithmetic on exponent bits."""
    total = 0.0
    inverse = np.float32(1.0) / scale
    bits = quanta.view(np.int32)
    floor = np.int32((lowest + 127) << 23)
    drop = np.int32(mantissa << 23)
    mask = np.int32(0x7F800000)
    for start in range(0, v.shape[0], _CHUNK):
        n = min(_CHUNK, v.shape[0] - start)
        for i in range(n):
            quanta[i] = abs(v[start + i]) * inverse
        for i in range(n):
            bits[i] = max(bits[i] & mask, floor) - drop
        part = np.float32(0.0)
        for i in range(n):
            size = abs(v[start + i])
            near = min(np.rint(size * inverse / quanta[i]) * quanta[i], largest)
            miss = size - scale * near
            part += u[start + i] * miss * miss
        total += part
    return total


@njit(nogil=True, cache=True)
def _float_rows(
    first: int,
    last: int,
    values: Array,
    weights: Array,
    candidates: Array,
    best: Array,
    mantissa: int,
    lowest: int,
    largest: Real,
) -> None:
    blocks = candidates.shape[1]
    width = values.shape[1] // blocks
    quanta = np.empty(_CHUNK, np.float32)
    high = np.float32(largest)
    for row in range(first, last):
        u = weights[row if weights.shape[0] > 1 else 0]
        for block in range(blocks):
            a, b = block * width, (block + 1) * width
            least = np.inf
            for k in range(candidates.shape[2]):
                scale = candidates[row, block, k]
                error = _float_error(values[row, a:b], u[a:b], scale, mantissa, lowest, high, quanta)
                if error < least:
                    least, best[row, block] = error, k


@njit(nogil=True, cache=True, fastmath=True)
def _level_error(v: Array, u: Array, scale: Real, levels: Array, middles: Array) -> Any:
    """The nearest of 16 levels by a binary search without branches, which vectorizes."""
    total = 0.0
    inverse = np.float32(1.0) / scale
    none = np.int32(0)
    for start in range(0, v.shape[0], _CHUNK):
        part = np.float32(0.0)
        for i in range(start, min(start + _CHUNK, v.shape[0])):
            x = v[i] * inverse
            code = np.int32(8) if x > middles[7] else none
            code += np.int32(4) if x > middles[code + 3] else none
            code += np.int32(2) if x > middles[code + 1] else none
            code += np.int32(1) if x > middles[code] else none
            miss = v[i] - scale * levels[code]
            part += u[i] * miss * miss
        total += part
    return total


@njit(nogil=True, cache=True)
def _level_rows(
    first: int,
    last: int,
    values: Array,
    weights: Array,
    candidates: Array,
    best: Array,
    levels: Array,
    middles: Array,
) -> None:
    blocks = candidates.shape[1]
    width = values.shape[1] // blocks
    for row in range(first, last):
        u = weights[row if weights.shape[0] > 1 else 0]
        for block in range(blocks):
            a, b = block * width, (block + 1) * width
            least = np.inf
            for k in range(candidates.shape[2]):
                error = _level_error(values[row, a:b], u[a:b], candidates[row, block, k], levels, middles)
                if error < least:
                    least, best[row, block] = error, k
