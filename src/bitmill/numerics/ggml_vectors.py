"""Searches of llama.cpp's two- and three-bit I-quants (Kawrakow, llama.cpp PRs #4773, #5196), bit for bit.

Magnitudes of a run of weights go to points of a codebook times a scale, signs apart. A ladder of inverse
scales is tried; each rounds every group to a tuple of levels and, where the codebook lacks it, to the best
of the points around; the scale is refitted and the best fit kept. At the end the groups that were off the
codebook are placed once more with the final scale.

Conditions of equality and the side-by-side lanes are those of :mod:`bitmill.numerics.ggml_search`. What is
looked up is the squared error of each level at each coordinate, computed once a group: a point's error is a
sum over that table, in the order in which llama.cpp adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from bitmill.numerics.ggml_search import clipped, rint

_compiled = njit(cache=True, nogil=True, error_model="numpy")

LANES = 64
"""Runs side by side; the unit of ``start … stop`` in :func:`point_runs`."""

OFF, ALL_IF_OFF, ALWAYS = range(3)
"""Groups that are placed again at the end: those off the codebook · all if any was · all."""

TOLD, SQUARED, SQUARED_AND_POWER = range(3)
"""Weights: importance · sqrt(power + x²), x², power / 4 + x²."""

_Floats = NDArray[np.float32]
_Ints = NDArray[Any]
_f, _i = np.float32, np.int32
_ZERO, _ONE, _HALF, _TENTH = _f(0), _f(1), _f(0.5), _f(0.1)
_MOST = 32  # elements of a run

_REACH, _SCALE, _BEST, _INVERSE, _STEP, _DOT, _NORM = range(7)  # rows of the state buffer


@_compiled
def _floats(rows: int) -> _Floats:
    return np.empty((rows, LANES), np.float32)


@_compiled
def _whole(rows: int) -> _Ints:
    return np.empty((rows, LANES), np.int32)


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
    place: _Ints,
    first: _Ints,
    near: _Ints,
    cells: _Ints,
    points: _Ints,
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
        place, first, near, cells, points: of the :class:`~bitmill.numerics.ggml_codebooks.Codebook`.
        index: ``runs n/width``; ``signs`` ``runs n/8``; ``scale`` ``runs``.
    """
    n, width = x.shape[1], points.shape[1]
    levels = 3 if width == 8 else 8
    groups, top, highest = n // width, _f(2 * levels - 1), _i(levels - 1)
    size, weight, root = _floats(n), _floats(n), _floats(n)
    s, one, two, table = _floats(7), _floats(9), _floats(9), _floats(42)
    level, chosen, key, off, best_off = _whole(n), _whole(n), _whole(groups), _whole(groups), _whole(groups)
    silent = np.empty(LANES, np.bool_)
    for group in range(start, stop):
        r0 = group * LANES
        _load(r0, n, x, kind, importance, power, per, even, size, weight, root, signs)
        _reach(n, size, weight, s, fitted, top, quiet, silent)
        chosen[:] = 0
        best_off[:] = 1 if again == ALL_IF_OFF else 0
        for trial in range(-rungs, rungs + 1):
            for j in range(LANES):
                s[_INVERSE, j] = (top + _f(trial) * rung) / s[_REACH, j]
                s[_STEP, j] = _ONE / s[_INVERSE, j]
            _to_levels(n, width, levels, highest, size, s, level, key)
            for g in range(groups):
                _tabulate(g, width, s[_STEP], size, root, one, two, table)
                for j in range(LANES):
                    off[g, j] = 1 if not silent[j] and place[key[g, j]] < 0 else 0
                _look_around(g, width, off[g], key[g], table, first, near, cells, points, level)
            _sums(n, size, weight, level, s)
            for j in range(LANES):
                dot, norm = s[_DOT, j], s[_NORM, j]
                if norm > 0 and dot * dot > s[_BEST, j] * norm:
                    s[_SCALE, j] = dot / norm
                    s[_BEST, j] = s[_SCALE, j] * dot
                    for i in range(n):
                        chosen[i, j] = level[i, j]
                    for g in range(groups):
                        best_off[g, j] = off[g, j]
        _place_again(
            n, width, levels, highest, again, size, weight, root, s, one, two, table, silent, best_off, key,
            level, chosen, place, first, near, cells, points,
        )  # fmt: skip
        for j in range(min(LANES, x.shape[0] - r0)):
            _hand_over(
                r0 + j, j, n, width, levels, s[_SCALE, j], silent[j], even, chosen, place, index, signs
            )
            scale[r0 + j] = _ZERO if silent[j] else abs(s[_SCALE, j])


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
    root: _Floats,
    signs: _Ints,
) -> None:
    """Magnitudes, weights and their roots by lane. An odd number of minus signs makes the weight that
    matters least negative."""
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
            root[i, j] = np.sqrt(w)
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


@_compiled
def _reach(
    n: int,
    size: _Floats,
    weight: _Floats,
    s: _Floats,
    fitted: bool,
    top: np.float32,
    quiet: np.float32,
    silent: NDArray[np.bool_],
) -> None:
    """What the ladder divides, and the scale if no rung is better."""
    for j in range(LANES):
        most = size[0, j]
        for i in range(1, n):
            most = max(most, size[i, j])
        silent[j] = most < quiet
        s[_REACH, j] = most
        s[_SCALE, j] = most / top
        s[_BEST, j] = _ZERO
        if fitted and not silent[j]:
            s[_SCALE, j] = _fit_to_four(n, j, most, size, weight)
            s[_REACH, j] = s[_SCALE, j] * _f(3)
            silent[j] = s[_REACH, j] <= 0


@_compiled
def _fit_to_four(n: int, j: int, most: np.float32, size: _Floats, weight: _Floats) -> np.float32:
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
    code = np.empty(_MOST, np.int32)
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
def _to_levels(
    n: int, width: int, levels: int, highest: np.int32, size: _Floats, s: _Floats, level: _Ints, key: _Ints
) -> None:
    """Nearest level of every weight, and the key of every group's tuple."""
    for g in range(n // width):
        for j in range(LANES):
            key[g, j] = 0
        power = _i(1)
        for i in range(g * width, (g + 1) * width):
            for j in range(LANES):
                nearest = clipped(_HALF * (s[_INVERSE, j] * size[i, j] - _ONE), _i(0), highest)
                level[i, j] = nearest
                key[g, j] += nearest * power
            power *= _i(levels)


@_compiled
def _tabulate(
    g: int,
    width: int,
    step: _Floats,
    size: _Floats,
    root: _Floats,
    one: _Floats,
    two: _Floats,
    table: _Floats,
) -> None:
    """Errors of group ``g`` that make up the errors of points, in the rows that ``cells`` names.

    Those of each level at each of four coordinates; or, for points of eight, of all levels of the first three
    together, then of each level at the others.
    """
    if width == 4:
        _errors(4 * g, 4, 8, step, size, root, table, 0)
        return
    _errors(8 * g, 3, 3, step, size, root, one, 0)
    _errors(8 * g + 3, 5, 3, step, size, root, table, 27)
    _joined(one, 3, one, 3, two)
    _joined(two, 9, one, 6, table)


@_compiled
def _errors(
    first: int, count: int, levels: int, step: _Floats, size: _Floats, root: _Floats, table: _Floats, row: int
) -> None:
    """Rows of errors of every level at ``count`` coordinates, weighted by the roots of the weights."""
    for i in range(count):
        for q in range(levels):
            level = _f(2 * q + 1)
            for j in range(LANES):
                miss = step[j] * level - size[first + i, j]
                table[row + i * levels + q, j] = root[first + i, j] * miss * miss


@_compiled
def _joined(sums: _Floats, count: int, one: _Floats, row: int, out: _Floats) -> None:
    """One coordinate further: row ``3 a + q`` is row ``a`` of ``sums`` plus row ``row + q`` of ``one``."""
    for a in range(count):
        for q in range(3):
            for j in range(LANES):
                out[3 * a + q, j] = sums[a, j] + one[row + q, j]


@_compiled
def _look_around(
    g: int,
    width: int,
    lost: _Ints,
    key: _Ints,
    table: _Floats,
    first: _Ints,
    near: _Ints,
    cells: _Ints,
    points: _Ints,
    level: _Ints,
) -> None:
    """In lanes that are ``lost``, levels of the point around the tuple with the least error."""
    for j in range(LANES):
        if lost[j] == 0:
            continue
        start, stop = first[key[j]], first[key[j] + 1]
        best, least = start, _f(np.inf)
        if width == 8:
            for c in range(start, stop):
                error = table[cells[c, 0], j] + table[cells[c, 1], j]
                error = error + table[cells[c, 2], j] + table[cells[c, 3], j]
                error = error + table[cells[c, 4], j] + table[cells[c, 5], j]
                best = c if error < least else best
                least = error if error < least else least
        else:
            for c in range(start, stop):
                error = table[cells[c, 0], j] + table[cells[c, 1], j]
                error = error + table[cells[c, 2], j] + table[cells[c, 3], j]
                best = c if error < least else best
                least = error if error < least else least
        for i in range(width):
            level[g * width + i, j] = points[near[best], i]


@_compiled
def _sums(n: int, size: _Floats, weight: _Floats, level: _Ints, s: _Floats) -> None:
    for j in range(LANES):
        s[_DOT, j] = _ZERO
        s[_NORM, j] = _ZERO
    for i in range(n):
        for j in range(LANES):
            q, w = _f(2 * level[i, j] + 1), weight[i, j]
            s[_DOT, j] += w * size[i, j] * q
            s[_NORM, j] += w * q * q


@_compiled
def _place_again(
    n: int,
    width: int,
    levels: int,
    highest: np.int32,
    again: int,
    size: _Floats,
    weight: _Floats,
    root: _Floats,
    s: _Floats,
    one: _Floats,
    two: _Floats,
    table: _Floats,
    silent: NDArray[np.bool_],
    off: _Ints,
    key: _Ints,
    level: _Ints,
    chosen: _Ints,
    place: _Ints,
    first: _Ints,
    near: _Ints,
    cells: _Ints,
    points: _Ints,
) -> None:
    """The final scale decides once more about groups that were off the codebook; then it is refitted."""
    for j in range(LANES):
        s[_INVERSE, j] = _ONE / s[_SCALE, j]
    _to_levels(n, width, levels, highest, size, s, level, key)
    moved, lost = np.zeros(LANES, np.bool_), np.empty(LANES, np.int32)
    for j in range(LANES):
        whole = again == ALWAYS
        for g in range(n // width):
            whole = whole or (again == ALL_IF_OFF and off[g, j] == 1)
        for g in range(n // width):
            moving = (whole or off[g, j] == 1) and s[_SCALE, j] > 0 and not silent[j]
            off[g, j] = 1 if moving else 0
            moved[j] = moved[j] or moving
    for g in range(n // width):
        _tabulate(g, width, s[_SCALE], size, root, one, two, table)
        for j in range(LANES):
            lost[j] = 1 if off[g, j] == 1 and place[key[g, j]] < 0 else 0
        _look_around(g, width, lost, key[g], table, first, near, cells, points, level)
        for i in range(g * width, (g + 1) * width):
            for j in range(LANES):
                chosen[i, j] = level[i, j] if off[g, j] == 1 else chosen[i, j]
    _sums(n, size, weight, chosen, s)
    for j in range(LANES):
        if moved[j] and s[_NORM, j] > 0:
            s[_SCALE, j] = s[_DOT, j] / s[_NORM, j]


@_compiled
def _hand_over(
    r: int,
    j: int,
    n: int,
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
    for g in range(n // width):
        key, power = 0, 1
        for i in range(g * width, (g + 1) * width):
            key += chosen[i, j] * power
            power *= levels
        index[r, g] = 0 if silent else place[key]
    for g in range(n // 8):
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
