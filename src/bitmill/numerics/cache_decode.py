"""Some tokens of a packed cache to floats, in compiled loops, eight coordinates at a time.

Each writes ``count`` tokens of one row, from ``first`` on, to the rows of ``out`` (float32, contiguous).
Offsets are into arrays as if they were flat.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from bitmill.numerics.cache_lanes import (
    floats,
    fused,
    half_at,
    load_byte,
    load_codes,
    load_signed,
    load_word,
    long_codes,
    looked_up,
    lower_half,
    of_sixteen,
    short_codes,
    upper_half,
    with_fifth,
)
from bitmill.numerics.lanes import load, spread, store, times

_inlined: Any = njit(nogil=True, error_model="numpy", forceinline=True)


@_inlined
def _word(array: Any, at: int) -> Any:
    """Eight bytes from there on; nothing behind the end of the array."""
    if at + 8 <= array.size:
        return load_word(array, at)
    word = np.int64(0)
    for i in range(max(array.size - at, 0)):
        word |= load_byte(array, at + i) << (8 * i)
    return word


@_inlined
def _values(codes: Any, at: int, bits: int, even: bool, table: Any, low: Any, high: Any) -> Any:
    """What eight codes stand for; themselves, where levels are ``even``."""
    word = _word(codes, at)
    if bits <= 4:
        short = short_codes(word, bits)
        return floats(short) if even else of_sixteen(low, high, table, short)
    long = long_codes(word, bits)
    return floats(long) if even else looked_up(table, long)


@_inlined
def stream(
    row: int, first: int, count: int, codes: Any, step: Any, low: Any, table: Any, how: Any, out: Any
) -> None:
    """Codes ``rows room bytes``, a step and a smallest value a group. ``how``: ``bits group width even``."""
    bits, group, width, even = how
    room, bytes_, groups, wide = codes.shape[1], codes.shape[2], step.shape[2], out.shape[1]
    if width % 8 or group % 8:
        _plain(row, first, count, codes, step, low, table, how, out)
        return
    below, above, origin = load(table, 0), load(table, 8), table[0]
    for t in range(count):
        at = ((row * room) + first + t) * bytes_
        for g in range(groups):
            scale, base = step[row, first + t, g], low[row, first + t, g]
            if even:
                base += origin * scale
            wide_scale, wide_base = spread(scale), spread(base)
            for c in range(g * group, g * group + group, 8):
                value = _values(codes, at + (c >> 3) * bits, bits, even, table, below, above)
                store(out, t * wide + c, fused(value, wide_scale, wide_base))


@_inlined
def _plain(
    row: int, first: int, count: int, codes: Any, step: Any, low: Any, table: Any, how: Any, out: Any
) -> None:
    """The same for any width and any group, code by code: each is in one byte or in two."""
    bits, group, width, _ = how
    mask, last = (1 << bits) - 1, codes.shape[2] - 1
    for t in range(count):
        for i in range(width):
            place = i * bits // 8
            here, behind = codes[row, first + t, place], codes[row, first + t, min(place + 1, last)]
            word = np.int64(here) | np.int64(behind) << 8
            value = table[word >> (i * bits - 8 * place) & mask]
            out[t, i] = value * step[row, first + t, i // group] + low[row, first + t, i // group]


@_inlined
def channels(
    row: int, first: int, count: int, codes: Any, step: Any, low: Any, table: Any, how: Any, out: Any
) -> None:
    """Codes ``rows runs run bytes``, a step and a smallest value for each coordinate of a run."""
    bits, _, width, _ = how
    runs, run, bytes_, wide = codes.shape[1], codes.shape[2], codes.shape[3], out.shape[1]
    mask = (1 << bits) - 1
    for t in range(count):
        block, at = (first + t) // run, (row * runs * run + first + t) * bytes_
        steps = (row * runs + block) * width
        for c in range(0, width - 7, 8):
            value = _values(codes, at + (c >> 3) * bits, bits, True, table, spread(0), spread(0))
            store(out, t * wide + c, fused(value, load(step, steps + c), load(low, steps + c)))
        for c in range(width & ~7, width):
            word = _word(codes, at + c * bits // 8)
            code = word >> (c * bits % 8) & mask
            out[t, c] = code * step[row, block, c] + low[row, block, c]


@_inlined
def blocks(row: int, first: int, count: int, raw: Any, table: Any, how: Any, out: Any) -> None:
    """llama.cpp's blocks, ``rows room bytes``. ``how`` is ``bytes low fifth codes width even whole``:
    where things are in a block, and whether its codes are int8."""
    size, low, fifth, codes, width, even, whole = how
    wide = out.shape[1]
    below, above, origin = load(table, 0), load(table, 8), table[0]
    for t in range(count):
        at = (row * raw.shape[1] + first + t) * raw.shape[2]
        for c in range(0, width, 32):
            scale, base = half_at(raw, at), np.float32(0)
            if low >= 0:
                base += half_at(raw, at + low)
            if even:
                base += origin * scale
            wide_scale, wide_base, to = spread(scale), spread(base), t * wide + c
            if whole:
                for k in range(0, 32, 8):
                    store(out, to + k, times(load_signed(raw, at + codes + k), wide_scale))
            else:
                for k in range(0, 16, 8):
                    both = load_codes(raw, at + codes + k)
                    one, two = lower_half(both), upper_half(both)
                    if fifth >= 0:
                        bits = load_word(raw, at + fifth)
                        one = with_fifth(one, short_codes(bits >> k, 1))
                        two = with_fifth(two, short_codes(bits >> (16 + k), 1))
                    if even:
                        first_, second = floats(one), floats(two)
                    else:
                        first_, second = (
                            of_sixteen(below, above, table, one),
                            of_sixteen(below, above, table, two),
                        )
                    store(out, to + k, fused(first_, wide_scale, wide_base))
                    store(out, to + k + 16, fused(second, wide_scale, wide_base))
            at += size


@_inlined
def angles(
    row: int, first: int, count: int, pairs: Any, one: Any, two: Any, three: Any, radius: Any,
    tables: Any, width: int, out: Any,
) -> None:  # fmt: skip
    """A radius and fifteen angles for sixteen coordinates, of which the even ones come first. ``tables`` are
    cosines and sines of the angles of pairs, and what eight radii are multiplied by for the codes of the
    other levels."""
    turns, ones, twos, threes = tables
    cos0, cos1, sin0, sin1 = load(turns, 0), load(turns, 8), load(turns, 16), load(turns, 24)
    sines, wide = turns[1], out.shape[1]
    for t in range(count):
        token = first + t
        at = (row * pairs.shape[1] + token) * pairs.shape[2]
        for block in range(width >> 4):
            second = two[row, token, block >> 1] >> (4 * (block & 1)) & 15
            third = three[row, token, block >> 2] >> (2 * (block & 3)) & 3
            size = times(spread(radius[row, token, block]), load(ones, 8 * np.int64(one[row, token, block])))
            size = times(size, times(load(twos, 8 * np.int64(second)), load(threes, 8 * np.int64(third))))
            codes = short_codes(_word(pairs, at + 4 * block), 4)
            to = t * wide + 16 * block
            store(out, to, times(size, of_sixteen(cos0, cos1, turns, codes)))
            store(out, to + 8, times(size, of_sixteen(sin0, sin1, sines, codes)))
