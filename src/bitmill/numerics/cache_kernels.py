"""Products of queries with packed codes, and weighted sums of what they stand for, in compiled loops. Nothing
is unpacked but the token that a loop is at: what limits long contexts is reading the cache, and packed it is
short. For few queries, on a processor; matrix products of unpacked pieces are faster for many."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from bitmill.core.caches import Direct
from bitmill.numerics.ggml_rows import in_threads

MOST_QUERIES = 16
"""Rows of queries a head that these loops are for."""

_BLOCK = 256  # tokens that one thread takes at a time
_TOGETHER = {1: 8, 2: 4, 3: 4, 4: 2}  # codes that are looked up at once
_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")
_inlined: Any = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
_summing: Any = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def scores(direct: tuple[Direct, ...], fields: Mapping[str, Tensor], tokens: int, queries: Tensor) -> Tensor:
    """``batch heads n tokens``: products of ``queries`` (``batch heads n width``, float32, in the stored
    basis) with the first ``tokens`` of ``fields`` (``batch heads room *shape``, contiguous)."""
    rows, n = queries.shape[0] * queries.shape[1], queries.shape[2]
    out = np.zeros((rows, n, tokens), np.float32)
    for part in direct:
        wanted = queries[..., part.first : part.first + part.width].reshape(rows, n, part.width).contiguous()
        blocks = -(-tokens // _BLOCK) * rows
        in_threads(scores_of, blocks, *_arrays(part, fields, rows), wanted.numpy(), out)
    return torch.from_numpy(out).reshape(*queries.shape[:3], tokens)


def sums(direct: tuple[Direct, ...], fields: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """``batch heads n width``: sums of the first tokens of ``fields``, weighted by ``weights`` (``batch heads
    n tokens``, float32), in the stored basis."""
    rows, n, tokens = weights.shape[0] * weights.shape[1], weights.shape[2], weights.shape[3]
    flat = weights.reshape(rows, n, tokens).contiguous().numpy()
    found = []
    for part in direct:
        blocks = -(-tokens // _BLOCK)
        out = np.zeros((rows, blocks, n, part.width), np.float32)
        in_threads(sums_of, blocks * rows, *_arrays(part, fields, rows), flat, out)
        found.append(torch.from_numpy(out.sum(1)))
    whole = found[0] if len(found) == 1 else torch.cat(found, -1)
    return whole.reshape(*weights.shape[:3], -1)


def _arrays(part: Direct, fields: Mapping[str, Tensor], rows: int) -> tuple[Any, ...]:
    """Codes, steps and smallest values as ``rows room …`` arrays, then what describes them."""
    codes = fields[part.codes]
    room = codes.shape[2]
    step = fields[part.step].to(torch.float32).reshape(rows, room, -1).numpy()
    if part.low:
        low = fields[part.low].to(torch.float32).reshape(step.shape).numpy()
    elif part.zero:
        low = fields[part.zero].to(torch.float32).reshape(step.shape).numpy() * -step
    else:
        low = np.zeros_like(step)
    return codes.reshape(rows, room, -1).numpy(), step, low, _table(part), part.bits, part.group


@lru_cache(maxsize=1024)
def _table(part: Direct) -> np.ndarray:
    """Levels of all codes that are looked up together, by the bits that they fill. Not to be written into."""
    together = _TOGETHER.get(part.bits, 1)
    levels = part.levels.to("cpu", torch.float32).numpy()
    words = np.arange(2 ** (part.bits * together))[:, None] >> (np.arange(together) * part.bits)
    return np.ascontiguousarray(levels[words & (2**part.bits - 1)])


@_inlined
def _decode(
    codes: Any, row: int, token: int, bits: int, table: Any, step: Any, low: Any, group: int, out: Any
) -> None:
    """One token. Codes that fill one byte, or four of three bits, are looked up together."""
    count = len(out)
    if bits == 4 and count % 2 == 0:
        for i in range(count // 2):
            v = codes[row, token, i]
            for j in range(2):
                out[2 * i + j] = table[v, j]
    elif bits == 2 and count % 4 == 0:
        for i in range(count // 4):
            v = codes[row, token, i]
            for j in range(4):
                out[4 * i + j] = table[v, j]
    elif bits == 1 and count % 8 == 0:
        for i in range(count // 8):
            v = codes[row, token, i]
            for j in range(8):
                out[8 * i + j] = table[v, j]
    elif bits == 3 and count % 8 == 0:
        for i in range(count // 8):
            a = np.int64(codes[row, token, 3 * i])
            b = np.int64(codes[row, token, 3 * i + 1])
            c = np.int64(codes[row, token, 3 * i + 2])
            first, second = a | (b & 15) << 8, b >> 4 | c << 4
            for j in range(4):
                out[8 * i + j] = table[first, j]
            for j in range(4):
                out[8 * i + 4 + j] = table[second, j]
    else:
        _decode_any(codes, row, token, bits, table, out)
    for part in range(step.shape[2]):
        scale, base = step[row, token, part], low[row, token, part]
        for i in range(part * group, min(part * group + group, count)):
            out[i] = out[i] * scale + base


@_inlined
def _decode_any(codes: Any, row: int, token: int, bits: int, table: Any, out: Any) -> None:
    """One token of any width: a code is in one byte or in two."""
    mask, last = (1 << bits) - 1, codes.shape[2] - 1
    for i in range(len(out)):
        place = i * bits // 8
        word = np.int64(codes[row, token, place]) | np.int64(codes[row, token, min(place + 1, last)]) << 8
        out[i] = table[word >> (i * bits - 8 * place) & mask, 0]


@_summing
def scores_of(
    first: int,
    last: int,
    codes: Any,
    step: Any,
    low: Any,
    table: Any,
    bits: int,
    group: int,
    queries: Any,
    out: Any,
) -> None:
    """Blocks ``first … last`` of ``out += queries · values``."""
    tokens = out.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    width = queries.shape[2]
    one = np.empty(width, np.float32)
    for block in range(first, last):
        row, start = block // blocks, block % blocks * _BLOCK
        for token in range(start, min(start + _BLOCK, tokens)):
            _decode(codes, row, token, bits, table, step, low, group, one)
            for n in range(queries.shape[1]):
                total = np.float32(0)
                for i in range(width):
                    total += queries[row, n, i] * one[i]
                out[row, n, token] += total


@_summing
def sums_of(
    first: int,
    last: int,
    codes: Any,
    step: Any,
    low: Any,
    table: Any,
    bits: int,
    group: int,
    weights: Any,
    out: Any,
) -> None:
    """Blocks ``first … last`` of ``out[row, block] = weights · values``."""
    tokens = weights.shape[2]
    blocks = (tokens + _BLOCK - 1) // _BLOCK
    width = out.shape[3]
    one = np.empty(width, np.float32)
    for block in range(first, last):
        row, place = block // blocks, block % blocks
        for token in range(place * _BLOCK, min(place * _BLOCK + _BLOCK, tokens)):
            _decode(codes, row, token, bits, table, step, low, group, one)
            for n in range(weights.shape[1]):
                weight = weights[row, n, token]
                for i in range(width):
                    out[row, place, n, i] += weight * one[i]
