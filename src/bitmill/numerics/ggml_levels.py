"""Scale search of llama.cpp's non-linear four-bit types (Kawrakow, llama.cpp PRs #5590, #5747), bit for bit.

Sixteen fixed levels times a scale; a ladder of scales that put the largest weight near the lowest level, each
refitted by weighted least squares. Conditions of equality and the side-by-side lanes are those of
:mod:`bitmill.numerics.ggml_search`. Levels are whole numbers a few apart, so comparing with the exact middle
of two is the same as comparing the two distances in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitmill.numerics.ggml_search import clipped

_compiled = njit(cache=True, nogil=True, error_model="numpy")

LANES = 64
"""Runs side by side; the unit of ``start … stop`` in :func:`level_runs`."""
TRIES = 7

_Floats = NDArray[np.float32]
_Ints = NDArray[Any]
_f, _i = np.float32, np.int32
_ZERO, _ONE, _TINY = _f(0), _f(1), _f(1e-15)
_PEAK, _SIZE, _SCALE, _BEST, _INVERSE, _DOT, _NORM = range(7)  # rows of the state buffer


@_compiled
def level_runs(
    start: int,
    stop: int,
    x: _Floats,
    told: bool,
    importance: _Floats,
    power: _Floats,
    per: int,
    levels: _Floats,
    scale: _Floats,
) -> None:
    """The best of sixteen scales, which may be negative, for each run of 32.

    Args:
        start, stop: groups of ``LANES`` runs of ``x`` (``runs 32``).
        told: weights are importance · sqrt(power + x²), or else x². Run ``r`` uses ``power[r // per]`` and
            row ``r`` of ``importance``, whose rows repeat.
        levels: sixteen, sorted.
        scale: ``runs``.
    """
    n = x.shape[1]
    value, weight = np.empty((n, LANES), np.float32), np.empty((n, LANES), np.float32)
    nearest, s = np.empty(LANES, np.float32), np.empty((7, LANES), np.float32)
    middle, gap = np.empty(15, np.float32), np.empty(15, np.float32)
    for k in range(15):
        middle[k], gap[k] = (levels[k] + levels[k + 1]) / _f(2), levels[k + 1] - levels[k]
    for group in range(start, stop):
        first = group * LANES
        for j in range(LANES):
            r = min(first + j, x.shape[0] - 1)
            base, given = power[r // per], r % importance.shape[0]
            for i in range(n):
                v = x[r, i]
                value[i, j] = v
                weight[i, j] = importance[given, i] * np.sqrt(base + v * v) if told else v * v
        _peak(n, value, s)
        for j in range(LANES):
            s[_INVERSE, j] = _ONE / (-s[_PEAK, j] / levels[0])
        _sums(n, value, weight, levels[0], middle, gap, nearest, s)
        for j in range(LANES):
            s[_SCALE, j] = s[_DOT, j] / s[_NORM, j] if s[_NORM, j] > 0 else _ZERO
            s[_BEST, j] = s[_SCALE, j] * s[_DOT, j]
        for trial in range(-TRIES, TRIES + 1):
            for j in range(LANES):
                s[_INVERSE, j] = (_f(trial) + levels[0]) / s[_PEAK, j]
            _sums(n, value, weight, levels[0], middle, gap, nearest, s)
            for j in range(LANES):
                dot, norm = s[_DOT, j], s[_NORM, j]
                better = norm > 0 and dot * dot > s[_BEST, j] * norm
                s[_SCALE, j] = dot / norm if better else s[_SCALE, j]
                s[_BEST, j] = s[_SCALE, j] * dot if better else s[_BEST, j]
        for j in range(min(LANES, x.shape[0] - first)):
            scale[first + j] = _ZERO if s[_SIZE, j] < _TINY else s[_SCALE, j]


@_compiled
def _peak(n: int, value: _Floats, s: _Floats) -> None:
    """Signed value of largest magnitude, the first of equals, and its magnitude."""
    for j in range(LANES):
        s[_PEAK, j] = _ZERO
        s[_SIZE, j] = _ZERO
    for i in range(n):
        for j in range(LANES):
            larger = abs(value[i, j]) > s[_SIZE, j]
            s[_PEAK, j] = value[i, j] if larger else s[_PEAK, j]
            s[_SIZE, j] = abs(value[i, j]) if larger else s[_SIZE, j]


@_compiled
def _sums(
    n: int,
    value: _Floats,
    weight: _Floats,
    lowest: np.float32,
    middle: _Floats,
    gap: _Floats,
    nearest: _Floats,
    s: _Floats,
) -> None:
    """Round every lane at its inverse scale and add up; a level is the lowest plus all gaps passed."""
    for j in range(LANES):
        s[_DOT, j] = _ZERO
        s[_NORM, j] = _ZERO
    for i in range(n):
        for j in range(LANES):
            nearest[j] = lowest
        for k in range(15):
            for j in range(LANES):
                nearest[j] += _ZERO if s[_INVERSE, j] * value[i, j] < middle[k] else gap[k]
        for j in range(LANES):
            q, w = nearest[j], weight[i, j]
            s[_DOT, j] += w * q * value[i, j]
            s[_NORM, j] += w * q * q


@_compiled
def level_scales(start: int, stop: int, scale: _Floats, d: _Floats, scales: _Ints) -> None:
    """Six-bit scales of eight runs, the largest at -32; super-blocks ``start … stop``."""
    for b in range(start, stop):
        peak, size = _ZERO, _ZERO
        for k in range(8):
            if abs(scale[b, k]) > size:
                size, peak = abs(scale[b, k]), scale[b, k]
        d[b] = -peak / _f(32)
        inverse = _ONE / d[b] if d[b] != 0 else _ZERO
        for k in range(8):
            scales[b, k] = clipped(inverse * scale[b, k], _i(-32), _i(31))


@_compiled
def level_codes(start: int, stop: int, x: _Floats, step: _Floats, levels: _Floats, codes: _Ints) -> None:
    """Codes of runs ``start … stop`` at their final scales; a scale of 0 gives the code nearest to 0."""
    for r in range(start, stop):
        inverse = _ONE / step[r] if step[r] != 0 else _ZERO
        for i in range(x.shape[1]):
            wanted, code = inverse * x[r, i], 0
            for k in range(15):
                code += 0 if wanted < (levels[k] + levels[k + 1]) / _f(2) else 1
            codes[r, i] = code
