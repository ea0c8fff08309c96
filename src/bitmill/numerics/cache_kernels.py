"""Products of queries with packed codes, and weighted sums of what they stand for, in compiled loops. Nothing
is unpacked but the few tokens that a loop is at: what limits long contexts is reading the cache, and packed
it is short. For few queries, on a processor; matrix products of unpacked pieces are faster for many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bitmill.core.caches import Direct, DirectAngles, DirectBlocks, Packed
from bitmill.numerics import cache_decode as decode
from bitmill.numerics.cache_lanes import fused, total
from bitmill.numerics.lanes import load, spread, store

MOST_QUERIES = 16
"""Rows of queries a head that these loops are for."""

_BLOCK = 256  # tokens that one thread takes at a time
_TILE = 16  # tokens that are floats at a time: they stay in the first cache
_WORTH = 1 << 17  # numbers that are worth another thread
_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")
_inlined: Any = njit(nogil=True, error_model="numpy", forceinline=True)


def reads(direct: tuple[Packed, ...]) -> bool:
    """Whether these loops can read all of it."""
    return bool(direct)


def scores(direct: tuple[Packed, ...], fields: Mapping[str, Tensor], tokens: int, queries: Tensor) -> Tensor:
    """``batch heads n tokens``: products of ``queries`` (``batch heads n width``, float32, in the stored
    basis) with the first ``tokens`` of ``fields`` (``batch heads room *shape``, contiguous)."""
    rows, n = queries.shape[0] * queries.shape[1], queries.shape[2]
    out = np.zeros((rows, n, tokens), np.float32)
    for part in direct:
        order = _order(part)
        wanted = queries[..., part.first : part.first + part.width].reshape(rows, n, part.width)
        wanted = wanted if order is None else wanted[..., order]
        room = _padded(part.width)
        wanted = torch.nn.functional.pad(wanted, (0, room - part.width)).contiguous()
        kernel, arrays = _SCORES[type(part)], _ARRAYS[type(part)](part, fields, rows)
        _in_threads(
            kernel, -(-tokens // _BLOCK) * rows, rows * tokens * part.width, *arrays, wanted.numpy(), out
        )
    return torch.from_numpy(out).reshape(*queries.shape[:3], tokens)


def sums(direct: tuple[Packed, ...], fields: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """``batch heads n width``: sums of the first tokens of ``fields``, weighted by ``weights`` (``batch heads
    n tokens``, float32), in the stored basis."""
    rows, n, tokens = weights.shape[0] * weights.shape[1], weights.shape[2], weights.shape[3]
    flat = weights.reshape(rows, n, tokens).contiguous().numpy()
    found = []
    for part in direct:
        blocks = -(-tokens // _BLOCK)
        out = np.zeros((rows, blocks, n, _padded(part.width)), np.float32)
        kernel, arrays = _SUMS[type(part)], _ARRAYS[type(part)](part, fields, rows)
        _in_threads(kernel, blocks * rows, rows * tokens * part.width, *arrays, flat, out)
        summed, order = torch.from_numpy(out.sum(1))[..., : part.width], _order(part)
        found.append(summed if order is None else summed[..., order.argsort()])
    whole = found[0] if len(found) == 1 else torch.cat(found, -1)
    return whole.reshape(*weights.shape[:3], -1)


def _in_threads(kernel: Callable[..., None], count: int, numbers: int, *arrays: Any) -> None:
    """All ``count`` blocks, on torch's number of threads if there is work enough: one of them is this."""
    workers = max(1, min(torch.get_num_threads(), count, numbers // _WORTH))
    edges = [count * k // workers for k in range(workers + 1)]
    others = [
        _threads(workers - 1).submit(kernel, edges[k], edges[k + 1], *arrays) for k in range(1, workers)
    ]
    kernel(0, edges[1], *arrays)
    for done in others:
        done.result()


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "cache")


def _padded(width: int) -> int:
    return -(-width // 8) * 8


def _order(part: Packed) -> Tensor | None:
    """The order in which tokens are decoded, where it is not their own."""
    if not isinstance(part, DirectAngles):
        return None
    return torch.arange(part.width).reshape(-1, 8, 2).mT.flatten()


def _stream(part: Direct, fields: Mapping[str, Tensor], rows: int) -> tuple[Any, ...]:
    codes = fields[part.codes]
    room = codes.shape[2]
    flat = codes.reshape(rows, room, *codes.shape[3:]).numpy()
    if part.step:
        step = fields[part.step].to(torch.float32).reshape(rows, room, -1).numpy()
    else:
        step = np.ones((rows, room, 1), np.float32)
    if part.low:
        low = fields[part.low].to(torch.float32).reshape(step.shape).numpy()
    elif part.zero:
        low = fields[part.zero].to(torch.float32).reshape(step.shape).numpy() * -step
    else:
        low = np.zeros_like(step)
    table, even = _table(part)
    return flat, step, low, table, (part.bits, part.group, part.width, even)


def _blocks(part: DirectBlocks, fields: Mapping[str, Tensor], rows: int) -> tuple[Any, ...]:
    raw = fields[part.blocks]
    table, even = _table(part)
    how = (part.bytes_, part.low, part.fifth, part.codes, part.width, even, len(part.levels) == 0)
    return raw.reshape(rows, raw.shape[2], -1).numpy(), table, how


def _angles(part: DirectAngles, fields: Mapping[str, Tensor], rows: int) -> tuple[Any, ...]:
    room = fields[part.radius].shape[2]
    codes = (fields[name].reshape(rows, room, -1).numpy() for name in part.angles)
    radius = fields[part.radius].to(torch.float32).reshape(rows, room, -1).numpy()
    return *codes, radius, _turns(part), part.width


_ARRAYS: Mapping[type, Any] = {Direct: _stream, DirectBlocks: _blocks, DirectAngles: _angles}


@lru_cache(maxsize=1024)
def _table(part: Direct | DirectBlocks) -> tuple[np.ndarray, bool]:
    """The levels, 16 or more, and whether they are whole steps apart. Not to be written into."""
    levels = part.levels.to("cpu", torch.float32).numpy()
    even = len(levels) > 0 and bool((levels == levels[0] + np.arange(len(levels))).all())
    return np.pad(levels, (0, max(16 - len(levels), 0))), even


@lru_cache(maxsize=256)
def _turns(part: DirectAngles) -> tuple[np.ndarray, ...]:
    """Cosines and sines of the angles of pairs, and the factors of eight radii by the codes of one block, a
    table a level. Not to be written into."""
    found = [np.stack([part.levels[0].cos().numpy(), part.levels[0].sin().numpy()])]
    for level, codes in ((1, 4), (2, 2), (3, 1)):
        angle = part.levels[level].numpy()
        each = np.stack([np.cos(angle), np.sin(angle)], -1)
        words = np.arange(4**codes)[:, None] >> (2 * np.arange(codes)) & 3
        found.append(each[words].reshape(len(words), -1).repeat(4 // codes, 1).astype(np.float32))
    return tuple(np.ascontiguousarray(table) for table in found)


@_inlined
def _dot(tile: Any, count: int, queries: Any, row: int, at: int, out: Any) -> None:
    """``out[row, :, at …] += queries · tile``, four tokens at a time."""
    width = tile.shape[1]
    for n in range(queries.shape[1]):
        start = (row * queries.shape[1] + n) * width
        for t in range(0, count, 4):
            a = b = c = d = spread(np.float32(0))
            for i in range(0, width, 8):
                query, place = load(queries, start + i), t * width + i
                a = fused(query, load(tile, place), a)
                b = fused(query, load(tile, place + width), b)
                c = fused(query, load(tile, place + 2 * width), c)
                d = fused(query, load(tile, place + 3 * width), d)
            out[row, n, at + t] += total(a)
            if t + 1 < count:
                out[row, n, at + t + 1] += total(b)
            if t + 2 < count:
                out[row, n, at + t + 2] += total(c)
            if t + 3 < count:
                out[row, n, at + t + 3] += total(d)


@_inlined
def _weigh(tile: Any, count: int, weights: Any, row: int, at: int, out: Any, block: int) -> None:
    """``out[row, block] += weights · tile``, 32 coordinates at a time."""
    width = tile.shape[1]
    for n in range(weights.shape[1]):
        start = ((row * out.shape[1] + block) * out.shape[2] + n) * width
        for i in range(0, width - 31, 32):
            a, b = load(out, start + i), load(out, start + i + 8)
            c, d = load(out, start + i + 16), load(out, start + i + 24)
            for t in range(count):
                weight, place = spread(weights[row, n, at + t]), t * width + i
                a = fused(weight, load(tile, place), a)
                b = fused(weight, load(tile, place + 8), b)
                c = fused(weight, load(tile, place + 16), c)
                d = fused(weight, load(tile, place + 24), d)
            store(out, start + i, a)
            store(out, start + i + 8, b)
            store(out, start + i + 16, c)
            store(out, start + i + 24, d)
        for i in range(width & ~31, width, 8):
            a = load(out, start + i)
            for t in range(count):
                a = fused(spread(weights[row, n, at + t]), load(tile, t * width + i), a)
            store(out, start + i, a)


@_compiled
def scores_of_stream(
    first: int, last: int, codes: Any, step: Any, low: Any, table: Any, how: Any, queries: Any, out: Any
) -> None:
    """Blocks ``first … last`` of ``out += queries · values``; see :func:`cache_decode.stream`."""
    tokens = out.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    tile = np.zeros((_TILE, queries.shape[2]), np.float32)
    for block in range(first, last):
        row, start = block // blocks, block % blocks * _BLOCK
        for at in range(start, min(start + _BLOCK, tokens), _TILE):
            count = min(_TILE, tokens - at)
            if codes.ndim == 4:
                decode.channels(row, at, count, codes, step, low, table, how, tile)
            else:
                decode.stream(row, at, count, codes, step, low, table, how, tile)
            _dot(tile, count, queries, row, at, out)


@_compiled
def sums_of_stream(
    first: int, last: int, codes: Any, step: Any, low: Any, table: Any, how: Any, weights: Any, out: Any
) -> None:
    """Blocks ``first … last`` of ``out[row, block] = weights · values``."""
    tokens = weights.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    tile = np.zeros((_TILE, out.shape[3]), np.float32)
    for block in range(first, last):
        row, start = block // blocks, block % blocks * _BLOCK
        for at in range(start, min(start + _BLOCK, tokens), _TILE):
            count = min(_TILE, tokens - at)
            if codes.ndim == 4:
                decode.channels(row, at, count, codes, step, low, table, how, tile)
            else:
                decode.stream(row, at, count, codes, step, low, table, how, tile)
            _weigh(tile, count, weights, row, at, out, block % blocks)


@_compiled
def scores_of_blocks(first: int, last: int, raw: Any, table: Any, how: Any, queries: Any, out: Any) -> None:
    """The same of llama.cpp's blocks; see :func:`cache_decode.blocks`."""
    tokens = out.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    tile = np.zeros((_TILE, queries.shape[2]), np.float32)
    for block in range(first, last):
        row, start = block // blocks, block % blocks * _BLOCK
        for at in range(start, min(start + _BLOCK, tokens), _TILE):
            count = min(_TILE, tokens - at)
            decode.blocks(row, at, count, raw, table, how, tile)
            _dot(tile, count, queries, row, at, out)


@_compiled
def sums_of_blocks(first: int, last: int, raw: Any, table: Any, how: Any, weights: Any, out: Any) -> None:
    """The same of llama.cpp's blocks."""
    tokens = weights.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    tile = np.zeros((_TILE, out.shape[3]), np.float32)
    for block in range(first, last):
        row, start = block // blocks, block % blocks * _BLOCK
        for at in range(start, min(start + _BLOCK, tokens), _TILE):
            count = min(_TILE, tokens - at)
            decode.blocks(row, at, count, raw, table, how, tile)
            _weigh(tile, count, weights, row, at, out, block % blocks)


@_compiled
def scores_of_angles(
    first: int, last: int, pairs: Any, one: Any, two: Any, three: Any, radius: Any, tables: Any, width: int,
    queries: Any, out: Any,
) -> None:  # fmt: skip
    """The same of radii and angles; see :func:`cache_decode.angles`."""
    tokens = out.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    tile = np.zeros((_TILE, queries.shape[2]), np.float32)
    for block in range(first, last):
        row, start = block // blocks, block % blocks * _BLOCK
        for at in range(start, min(start + _BLOCK, tokens), _TILE):
            count = min(_TILE, tokens - at)
            decode.angles(row, at, count, pairs, one, two, three, radius, tables, width, tile)
            _dot(tile, count, queries, row, at, out)


@_compiled
def sums_of_angles(
    first: int, last: int, pairs: Any, one: Any, two: Any, three: Any, radius: Any, tables: Any, width: int,
    weights: Any, out: Any,
) -> None:  # fmt: skip
    """The same of radii and angles."""
    tokens = weights.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    tile = np.zeros((_TILE, out.shape[3]), np.float32)
    for block in range(first, last):
        row, start = block // blocks, block % blocks * _BLOCK
        for at in range(start, min(start + _BLOCK, tokens), _TILE):
            count = min(_TILE, tokens - at)
            decode.angles(row, at, count, pairs, one, two, three, radius, tables, width, tile)
            _weigh(tile, count, weights, row, at, out, block % blocks)


_SCORES: Mapping[type, Any] = {
    Direct: scores_of_stream,
    DirectBlocks: scores_of_blocks,
    DirectAngles: scores_of_angles,
}
_SUMS: Mapping[type, Any] = {
    Direct: sums_of_stream,
    DirectBlocks: sums_of_blocks,
    DirectAngles: sums_of_angles,
}
