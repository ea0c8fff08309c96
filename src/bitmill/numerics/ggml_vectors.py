"""Searches of llama.cpp's two- and three-bit I-quants (Kawrakow, llama.cpp PRs #4773, #5196), bit for bit.

Magnitudes of a run of weights go to points of a codebook times a scale, signs apart. A ladder of inverse
scales is tried; each rounds every group to a tuple of levels and, where the codebook lacks it, to the best
of the points around (:mod:`bitmill.numerics.ggml_nearest`); the scale is refitted and the best fit kept. At
the end the groups that were off the codebook are placed once more with the final scale.

Conditions of equality and the side-by-side runs are those of :mod:`bitmill.numerics.ggml_search`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitmill.numerics.ggml_nearest import ABSENT, BITS, Around, Room, ladder_codes, room_for
from bitmill.numerics.ggml_search import clipped, rint
from bitmill.numerics.lanes import LANES as EIGHT

_compiled = njit(cache=True, nogil=True, error_model="numpy")

LANES = 32
"""Runs side by side; the unit of ``start … stop`` in :func:`point_runs`."""

OFF, ALL_IF_OFF, ALWAYS = range(3)
"""Groups that are placed again at the end: those off the codebook · all if any was · all."""

TOLD, SQUARED, SQUARED_AND_POWER = range(3)
"""Weights: importance · sqrt(power + x²), x², power / 4 + x²."""

_Floats = NDArray[np.float32]
_Ints = NDArray[Any]
_f, _i = np.float32, np.int32
_ZERO, _ONE, _HALF, _TENTH = _f(0), _f(1), _f(0.5), _f(0.1)
_LEVEL = _i((1 << BITS) - 1)
_MOST = 32  # elements of a run

_REACH, _SCALE, _BEST, _DOT, _NORM = range(5)  # rows of the state buffer


@_compiled
def _floats(rows: int) -> _Floats:
    return np.empty((rows, LANES), np.float32)


@_compiled
def point_runs(
    start: int,
    stop: int,
    x: _Floats,
    kind: int,
    importance: _Floats,
    power: _Floats,
    per: int,
    even: bool,
    rungs: int,
    rung: np.float32,
    fitted: bool,
    again: int,
    quiet: np.float32,
    around: Around,
    index: _Ints,
    signs: _Ints,
    scale: _Floats,
) -> None:
    """Points, signs and a scale for each run.

    Args:
        start, stop: groups of ``LANES`` runs.
        x: ``runs n``, n up to 32; run ``r`` uses ``power[r // per]``, row ``r`` of ``importance`` (its rows
            repeat).
        even: whether the minus signs of 8 weights must be even in number.
        rungs, rung: the ladder has steps ``-rungs … rungs`` times ``rung``.
        fitted: whether the ladder starts from a fitted scale of codes 0 … 4 instead of the largest weight.
        quiet: runs whose largest value is below it are all zero.
        around: of the :class:`~bitmill.numerics.ggml_codebooks.Codebook`.
        index: ``runs n/width``; ``signs`` ``runs n/8``; ``scale`` ``runs``.
    """
    n, width = x.shape[1], around.odd.shape[1]
    levels = 3 if width == 8 else 8
    groups, top, trials = n // width, _f(2 * levels - 1), 2 * rungs + 1
    size, weight, inverse, s = _floats(n), _floats(n), _floats(trials), _floats(5)
    wide, root = np.empty((LANES, n), np.float32), np.empty((LANES, n), np.float32)
    step, room = np.ones((LANES, trials + EIGHT), np.float32), room_for(LANES, trials, around)
    key, code = np.empty((groups, trials, LANES), np.int32), np.zeros((groups, trials, LANES), np.int32)
    chosen = np.empty((groups, LANES), np.int32)
    loud, wanted = np.empty(LANES, np.bool_), np.empty((groups, LANES), np.bool_)
    for group in range(start, stop):
        r0 = group * LANES
        _load(r0, n, x, kind, importance, power, per, even, size, weight, wide, root, signs)
        _reach(n, size, weight, s, fitted, top, quiet, loud)
        for t in range(trials):
            for j in range(LANES):
                inverse[t, j] = (top + _f(t - rungs) * rung) / s[_REACH, j]
                step[j, t] = _ONE / inverse[t, j]
        _to_keys(width, levels, inverse, size, key)
        for g in range(groups):
            for j in range(LANES):
                wanted[g, j] = loud[j]
        ladder_codes(wanted, wide, root, step, key, code, around, room)
        chosen[:] = ABSENT if again == ALL_IF_OFF else 0
        for t in range(trials):
            _sums(width, t, size, weight, code, s)
            for j in range(LANES):
                dot, norm = s[_DOT, j], s[_NORM, j]
                if norm > 0 and dot * dot > s[_BEST, j] * norm:
                    s[_SCALE, j] = dot / norm
                    s[_BEST, j] = s[_SCALE, j] * dot
                    for g in range(groups):
                        chosen[g, j] = code[g, t, j]
        _place_again(
            width, levels, again, size, weight, wide, root, s, loud, wanted, inverse[:1], step, key[:, :1],
            code[:, :1], chosen, around, room,
        )  # fmt: skip
        for j in range(min(LANES, x.shape[0] - r0)):
            _hand_over(
                r0 + j, j, width, levels, s[_SCALE, j], not loud[j], even, chosen, around.place, index, signs
            )
            scale[r0 + j] = abs(s[_SCALE, j]) if loud[j] else _ZERO


@_compiled
def _load(
    r0: int,
    n: int,
    x: _Floats,
    kind: int,
    importance: _Floats,
    power: _Floats,
    per: int,
    even: bool,
    size: _Floats,
    weight: _Floats,
    wide: _Floats,
    root: _Floats,
    signs: _Ints,
) -> None:
    """Magnitudes and weights by lane; magnitudes and the weights' roots by run. An odd number of minus signs
    makes the weight that matters least negative."""
    for j in range(LANES):
        r = min(r0 + j, x.shape[0] - 1)
        base = power[r // per]
        given = r % importance.shape[0]
        for i in range(n):
            value = x[r, i]
            if kind == TOLD:
                w = importance[given, i] * np.sqrt(base + value * value)
            elif kind == SQUARED:
                w = value * value
            else:
                w = _f(0.25) * base + value * value
            weight[i, j] = w
            root[j, i] = np.sqrt(w)
            size[i, j] = value if value >= 0 else -value
        for g in range(n // 8):
            minus, count, least, which = 0, 0, _ZERO, 0
            for i in range(8):
                value = x[r, 8 * g + i]
                if not value >= 0:
                    minus |= 1 << i
                    count += 1
                cost = weight[8 * g + i, j] * value * value
                if i == 0 or cost < least:
                    least, which = cost, i
            if even and count % 2:
                size[8 * g + which, j] = -size[8 * g + which, j]
                minus ^= 1 << which
            signs[r, g] = minus
        for i in range(n):
            wide[j, i] = size[i, j]


@_compiled
def _reach(
    n: int,
    size: _Floats,
    weight: _Floats,
    s: _Floats,
    fitted: bool,
    top: np.float32,
    quiet: np.float32,
    loud: NDArray[np.bool_],
) -> None:
    """What the ladder divides, and the scale if no rung is better."""
    code = np.empty(_MOST, np.int32)
    for j in range(LANES):
        most = size[0, j]
        for i in range(1, n):
            most = max(most, size[i, j])
        loud[j] = not most < quiet
        s[_REACH, j] = most
        s[_SCALE, j] = most / top
        s[_BEST, j] = _ZERO
        if fitted and loud[j]:
            s[_SCALE, j] = _fit_to_four(n, j, most, size, weight, code)
            s[_REACH, j] = s[_SCALE, j] * _f(3)
            loud[j] = not s[_REACH, j] <= 0


@_compiled
def _fit_to_four(n: int, j: int, most: np.float32, size: _Floats, weight: _Floats, code: _Ints) -> np.float32:
    """Scale of codes 0 … 4 for lane ``j``: nine ranges by squared error, then coordinate descent.

    A negative value's first code is stored in a byte, where -1 is 255.
    """
    top = _f(4)
    inverse = top / most
    step, least = _ONE / inverse, _ZERO
    for i in range(n):
        miss = size[i, j] - step * _f(rint(inverse * size[i, j]) & _i(255))
        least += weight[i, j] * miss * miss
    for trial in range(-4, 5):
        if trial == 0:
            continue
        other = (_TENTH * _f(trial) + top) / most
        step, error = _ONE / other, _ZERO
        for i in range(n):
            miss = size[i, j] - step * _f(min(_i(4), rint(other * size[i, j])))
            error += weight[i, j] * miss * miss
        if error < least:
            least, inverse = error, other
    dot, norm = _ZERO, _ZERO
    for i in range(n):
        x, w = size[i, j], weight[i, j]
        q = min(_i(4), rint(inverse * x))
        code[i] = q & _i(255)
        dot += w * x * _f(q)
        norm += w * _f(q) * _f(q)
    for _ in range(5):
        moved = False
        for i in range(n):
            x, w, was = size[i, j], weight[i, j], _f(code[i])
            dot_rest, norm_rest = dot - w * x * was, norm - w * was * was
            if not (dot_rest > 0 and norm_rest > 0):
                continue
            q = min(_i(4), rint(x * norm_rest / dot_rest))
            if q == code[i]:
                continue
            dot_rest += w * x * _f(q)
            norm_rest += w * _f(q) * _f(q)
            if dot_rest * dot_rest * norm > dot * dot * norm_rest:
                code[i], dot, norm, moved = q & _i(255), dot_rest, norm_rest, True
        if not moved:
            break
    return dot / norm if norm > 0 else _ZERO


@_compiled
def _to_keys(width: int, levels: int, inverse: _Floats, size: _Floats, key: _Ints) -> None:
    """Keys of the tuples of nearest levels, of every group at every scale."""
    highest = _i(levels - 1)
    for g in range(len(key)):
        for t in range(len(inverse)):
            for j in range(LANES):
                key[g, t, j] = 0
            power = _i(1)
            for i in range(g * width, (g + 1) * width):
                for j in range(LANES):
                    nearest = clipped(_HALF * (inverse[t, j] * size[i, j] - _ONE), _i(0), highest)
                    key[g, t, j] += nearest * power
                power *= _i(levels)


@_compiled
def _sums(width: int, t: int, size: _Floats, weight: _Floats, code: _Ints, s: _Floats) -> None:
    for j in range(LANES):
        s[_DOT, j] = _ZERO
        s[_NORM, j] = _ZERO
    for i in range(len(size)):
        g, shift = i // width, _i(BITS * (i % width))
        for j in range(LANES):
            q, w = _f(2 * ((code[g, t, j] >> shift) & _LEVEL) + 1), weight[i, j]
            s[_DOT, j] += w * size[i, j] * q
            s[_NORM, j] += w * q * q


@_compiled
def _place_again(
    width: int,
    levels: int,
    again: int,
    size: _Floats,
    weight: _Floats,
    wide: _Floats,
    root: _Floats,
    s: _Floats,
    loud: NDArray[np.bool_],
    wanted: NDArray[np.bool_],
    inverse: _Floats,
    step: _Floats,
    key: _Ints,
    code: _Ints,
    chosen: _Ints,
    around: Around,
    room: Room,
) -> None:
    """The final scale decides once more about groups that were off the codebook; then it is refitted."""
    for j in range(LANES):
        inverse[0, j] = _ONE / s[_SCALE, j]
        step[j, 0] = s[_SCALE, j]
    _to_keys(width, levels, inverse, size, key)
    for j in range(LANES):
        whole = again == ALWAYS
        for g in range(len(chosen)):
            whole = whole or (again == ALL_IF_OFF and chosen[g, j] >= ABSENT)
        for g in range(len(chosen)):
            wanted[g, j] = loud[j] and s[_SCALE, j] > 0 and (whole or chosen[g, j] >= ABSENT)
    ladder_codes(wanted, wide, root, step, key, code, around, room)
    for g in range(len(chosen)):
        for j in range(LANES):
            chosen[g, j] = code[g, 0, j] if wanted[g, j] else chosen[g, j]
            code[g, 0, j] = chosen[g, j]
    _sums(width, 0, size, weight, code, s)
    for j in range(LANES):
        moved = False
        for g in range(len(chosen)):
            moved = moved or wanted[g, j]
        if moved and s[_NORM, j] > 0:
            s[_SCALE, j] = s[_DOT, j] / s[_NORM, j]


@_compiled
def _hand_over(
    r: int,
    j: int,
    width: int,
    levels: int,
    scale: np.float32,
    silent: bool,
    even: bool,
    chosen: _Ints,
    place: _Ints,
    index: _Ints,
    signs: _Ints,
) -> None:
    """Indices of the points. A negative scale turns all signs but the eighth where that one is a parity."""
    for g in range(index.shape[1]):
        key, power = 0, 1
        for i in range(width):
            key += (chosen[g, j] >> _i(BITS * i) & _LEVEL) * power
            power *= levels
        index[r, g] = 0 if silent else place[key]
    for g in range(signs.shape[1]):
        if silent:
            signs[r, g] = 0
        elif scale < 0:
            signs[r, g] = 255 - signs[r, g]
        if even:
            signs[r, g] &= 127


@_compiled
def point_scales(
    start: int,
    stop: int,
    scale: _Floats,
    top: int,
    fudge: np.float32,
    wipe: bool,
    d: _Floats,
    scales: _Ints,
    index: _Ints,
    signs: _Ints,
) -> None:
    """Codes ``s`` in ``0 … top`` of the scales of a super-block, which mean ``(2 s + 1) d``.

    Args:
        start, stop: super-blocks; ``scale`` and ``scales`` are ``super-blocks runs``.
        fudge: what the stored ``d`` is multiplied by.
        wipe: whether a super-block without scale loses its points and signs as well.
    """
    for b in range(start, stop):
        most = _ZERO
        for k in range(scale.shape[1]):
            most = max(most, scale[b, k])
        d[b] = _ZERO
        if most == 0:
            scales[b, :] = 0
            if wipe:
                index[b, :] = 0
                signs[b, :] = 0
            continue
        step = most / _f(2 * top + 1)
        d[b] = step * fudge
        inverse = _ONE / step
        for k in range(scale.shape[1]):
            scales[b, k] = clipped(_HALF * (inverse * scale[b, k] - _ONE), _i(0), _i(top))
