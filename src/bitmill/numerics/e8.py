"""The E8P codebook of QuIP# (Tseng et al., arXiv 2402.04396): 65536 points of the shifted E8 lattice.

A point is a vector of half-integers with an even sum, moved by +1/4 or by -1/4 in all eight coordinates. The
magnitudes of the half-integers are one of 256 patterns: the 227 whose squared norm is at most 10, and 29 of
the 56 of squared norm 12 made of five 3/2 and three 1/2. A code has the pattern in the high byte and signs in
the low one; an odd number of ones in the low byte means the shift -1/4 and is undone in bit 0.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bitmill.numerics.search import Array, Real, by_rows

_POWERS = tuple(3**i for i in range(8))


@cache
def patterns() -> Tensor:
    """Magnitudes of the 256 patterns, ``256 8`` float32. Not to be written to.

    The 227 short ones come in lexicographic order. Of the 56 long ones, ordered by the positions of their
    1/2, every second and the last are taken: an even spread over the coordinates, chosen here.
    """
    short = [p for p in product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in p) <= 10]
    triples = list(combinations(range(8), 3))
    long = [tuple(0.5 if i in t else 1.5 for i in range(8)) for t in [*triples[::2], triples[-1]]]
    return torch.tensor([*short, *long])


def decode(codes: Tensor) -> Tensor:
    """Points of ``codes`` (``…``, any integer type), ``… 8`` float32."""
    return _book().to(codes.device)[codes.to(torch.int32)]


@cache
def _book() -> Tensor:
    """The whole codebook, ``65536 8`` float32."""
    codes = torch.arange(2**16)
    bits = (codes[:, None] >> torch.arange(8)) & 1
    shifted = bits.sum(1) & 1
    sizes = patterns()[codes >> 8]
    bits[:, 0] ^= shifted
    bits[:, 7] ^= sizes.sum(1).to(torch.int64) & 1
    return sizes * (1 - 2 * bits) + (0.25 - 0.5 * shifted[:, None])


def encode(points: Tensor) -> Tensor:
    """Codes of the codebook's points nearest to ``points`` (``n 8`` float32), ``n`` int32; exact.

    The short patterns are whole classes under permutation: in each class the largest coordinates of the point
    get the largest magnitudes, and where the signs of the point make the sum odd, the smallest coordinate,
    which always has a 1/2, is flipped. That leaves seven candidates and the 29 long patterns a shift.
    """
    x = points.contiguous().cpu().numpy()
    codes = np.empty(x.shape[0], np.int32)
    sizes = patterns().numpy()
    place = np.zeros(3**8, np.int32)
    place[(sizes.astype(np.int64) * np.array(_POWERS)).sum(1)] = np.arange(256)

    def work(first: int, last: int) -> None:
        _nearest(first, last, x, sizes, place, codes)

    by_rows(x.shape[0], work)
    return torch.from_numpy(codes).to(points.device)


@njit(nogil=True, cache=True)
def _short(size: Array, order: Array, uneven: int, place: Array) -> Any:
    """Best of the seven classes: ``(|y|² - distance², pattern)``."""
    dot, key = np.float32(0.0), 0
    for i in range(8):
        dot += np.float32(0.5) * size[i]
    weakest = size[order[7]]
    best, pattern = np.float32(2.0) * (dot - uneven * weakest) - np.float32(2.0), place[0]
    for k in range(1, 5):  # k coordinates are 3/2; their sum is 4 + k
        dot += size[order[k - 1]]
        key += _POWERS[order[k - 1]]
        score = np.float32(2.0) * (dot - ((uneven + k) & 1) * weakest) - np.float32(2.0 + 2.0 * k)
        if score > best:
            best, pattern = score, place[key]
    for k in range(2):  # one is 5/2, k are 3/2
        dot = np.float32(2.0) * size[order[0]] + (size[order[1]] if k else np.float32(0.0))
        for i in range(8):
            dot += np.float32(0.5) * size[i]
        score = np.float32(2.0) * (dot - ((uneven + k) & 1) * weakest) - np.float32(8.0 + 2.0 * k)
        if score > best:
            key = 2 * _POWERS[order[0]] + (_POWERS[order[1]] if k else 0)
            best, pattern = score, place[key]
    return best, pattern


@njit(nogil=True, cache=True)
def _long(size: Array, order: Array, uneven: int, sizes: Array, best: Real, pattern: int) -> Any:
    """Whether one of the 29 long patterns, whose sum is odd, is better than ``best``."""
    bound = np.float32(0.0)
    for i in range(8):
        bound += size[order[i]] * np.float32(1.5 if i < 5 else 0.5)
    if np.float32(2.0) * bound - np.float32(12.0) <= best:
        return best, pattern
    for p in range(227, 256):
        dot, least = np.float32(0.0), np.float32(np.inf)
        for i in range(8):
            term = size[i] * sizes[p, i]
            dot += term
            least = min(least, term)
        score = np.float32(2.0) * (dot - (1 - uneven) * np.float32(2.0) * least) - np.float32(12.0)
        if score > best:
            best, pattern = score, p
    return best, pattern


@njit(nogil=True, cache=True)
def _nearest(first: int, last: int, x: Array, sizes: Array, place: Array, codes: Array) -> None:
    size, order = np.empty(8, np.float32), np.empty(8, np.int64)
    for n in range(first, last):
        closest = np.inf
        codes[n] = 0
        for shifted in range(2):
            shift = np.float32(0.25 - 0.5 * shifted)
            signs, uneven, power = 0, 0, np.float32(0.0)
            for i in range(8):
                y = x[n, i] - shift
                power += y * y
                size[i] = abs(y)
                if y < 0:
                    signs |= 1 << i
                    uneven ^= 1
                k = i
                while k > 0 and size[order[k - 1]] < size[i]:
                    order[k] = order[k - 1]
                    k -= 1
                order[k] = i
            score, pattern = _short(size, order, uneven, place)
            score, pattern = _long(size, order, uneven, sizes, score, pattern)
            if power - score < closest:
                closest = power - score
                codes[n] = (pattern << 8) | (_signs(size, sizes[pattern], signs, uneven) ^ shifted)


@njit(nogil=True, cache=True)
def _signs(size: Array, magnitudes: Array, signs: int, uneven: int) -> Any:
    """The low byte before the shift: the point's signs, one flipped where the parity asks for it."""
    total, weakest = np.float32(0.0), 0
    for i in range(8):
        total += magnitudes[i]
        if size[i] * magnitudes[i] < size[weakest] * magnitudes[weakest]:
            weakest = i
    odd = int(total) & 1
    if odd != uneven:
        signs ^= 1 << weakest
    return signs ^ (odd << 7)
