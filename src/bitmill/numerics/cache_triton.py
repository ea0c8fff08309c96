"""Products of queries with packed codes, and weighted sums of what they stand for, on a GPU: the loops of
:mod:`bitmill.numerics.cache_kernels` as Triton kernels. Nothing but packed codes is read from memory.

Imported only where there is Triton. Checked through its interpreter, compiled for sm_80 and sm_90; neither
timed on a GPU nor run on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill.core.caches import Direct, DirectAngles, DirectBlocks, Packed

_TOKENS = 64  # that one program decodes at a time
_SHARE = 512  # tokens whose weighted sum one program takes
_QUERIES = 16  # rows of a matrix product, at least

_STREAM, _CHANNELS, _BLOCKS, _WHOLE = 0, 1, 2, 3


def reads(direct: tuple[Packed, ...]) -> bool:
    """Whether there is a kernel for all of these."""
    return bool(direct) and not any(isinstance(part, DirectAngles) for part in direct)


def scores(direct: tuple[Packed, ...], fields: Mapping[str, Tensor], tokens: int, queries: Tensor) -> Tensor:
    """As :func:`bitmill.numerics.cache_kernels.scores`."""
    rows, n = queries.shape[0] * queries.shape[1], queries.shape[2]
    out = queries.new_zeros(rows, n, tokens)
    for part in direct:
        wanted = queries[..., part.first : part.first + part.width].reshape(rows, n, -1).contiguous()
        grid = (rows, triton.cdiv(tokens, _TOKENS))
        _scores[grid](wanted, out, tokens, n, *_arguments(part, fields, rows), **_sizes(part, fields, n))
    return out.reshape(*queries.shape[:3], tokens)


def sums(direct: tuple[Packed, ...], fields: Mapping[str, Tensor], weights: Tensor) -> Tensor:
    """As :func:`bitmill.numerics.cache_kernels.sums`."""
    rows, n, tokens = weights.shape[0] * weights.shape[1], weights.shape[2], weights.shape[3]
    flat = weights.reshape(rows, n, tokens).contiguous()
    found = []
    for part in direct:
        shares = triton.cdiv(tokens, _SHARE)
        out = weights.new_zeros(rows, shares, n, part.width)
        sizes = {"SHARE": _SHARE, **_sizes(part, fields, n)}
        _sums[(rows, shares)](flat, out, tokens, n, *_arguments(part, fields, rows), **sizes)
        found.append(out.sum(1))
    return torch.cat(found, -1).reshape(*weights.shape[:3], -1)


def _arguments(part: Packed, fields: Mapping[str, Tensor], rows: int) -> tuple[Any, ...]:
    """Codes, steps, smallest values and levels, then bytes of a token and of a row, and groups."""
    if isinstance(part, DirectAngles):
        raise ValueError("there is no kernel for angles")
    if isinstance(part, DirectBlocks):
        raw = fields[part.blocks]
        table = part.levels.to(raw.device) if len(part.levels) else torch.zeros(16, device=raw.device)
        return raw, raw, raw, table, raw.shape[3], raw.shape[2] * raw.shape[3], 1
    codes = fields[part.codes]
    first = codes[:1, :1, :1, :1].float()
    step = fields[part.step] if part.step else first
    low = fields[part.low] if part.low else fields[part.zero] if part.zero else first
    bytes_ = codes.shape[-1]
    row = codes.numel() // rows
    return codes, step, low, part.levels.to(codes.device), bytes_, row, step.numel() // rows


def _sizes(part: Packed, fields: Mapping[str, Tensor], n: int) -> dict[str, Any]:
    """What kernels are compiled for."""
    shared = {
        "W": part.width,
        "WIDE": max(triton.next_power_of_2(part.width), 16),
        "N": max(triton.next_power_of_2(n), _QUERIES),
        "T": _TOKENS,
    }
    if isinstance(part, DirectBlocks):
        kind = _BLOCKS if len(part.levels) else _WHOLE
        places = {"BITS": part.bytes_, "GROUP": part.codes, "RUN": part.low, "LOW": part.fifth}
        return {**shared, "KIND": kind, **places, "STEP": True}
    assert isinstance(part, Direct)
    low = 1 if part.low else 2 if part.zero else 0
    how = {"BITS": part.bits, "GROUP": part.group or part.width, "LOW": low, "STEP": bool(part.step)}
    if part.group:
        return {**shared, "KIND": _STREAM, "RUN": 1, **how}
    return {**shared, "KIND": _CHANNELS, "RUN": fields[part.codes].shape[3], **how}


@triton.jit
def _half(raw, at, there):
    """Half-precision numbers at these bytes."""
    low = tl.load(raw + at, mask=there, other=0).to(tl.uint16)
    high = tl.load(raw + at + 1, mask=there, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _blocks(
    raw,
    table,
    base,
    c,
    there,
    SIZE: tl.constexpr,
    CODES: tl.constexpr,
    LOW: tl.constexpr,
    FIFTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Coordinates ``c`` of llama.cpp's blocks that begin at ``base``."""
    at = base + c // 32 * SIZE
    j = c % 32
    scale = _half(raw, at, there)
    if WHOLE:
        whole = tl.load(raw + at + CODES + j, mask=there, other=0).to(tl.int8, bitcast=True)
        value = whole.to(tl.float32) * scale
    else:
        code = (tl.load(raw + at + CODES + j % 16, mask=there, other=0).to(tl.int32) >> (j // 16 * 4)) & 15
        if FIFTH >= 0:
            bit = (tl.load(raw + at + FIFTH + j // 8, mask=there, other=0).to(tl.int32) >> (j % 8)) & 1
            code = code | (bit << 4)
        value = tl.load(table + code) * scale
    if LOW >= 0:
        value += _half(raw, at + LOW, there)
    return value


@triton.jit
def _values(
    codes,
    step,
    low,
    table,
    bytes_,
    row_bytes,
    row_steps,
    row,
    token,
    c,
    there,
    W: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
):
    """``tokens width`` float32: coordinates ``c`` of ``token``, zero where they are not ``there``."""
    base = row * row_bytes + token * bytes_
    if KIND >= 2:
        value = _blocks(codes, table, base, c, there, BITS, GROUP, RUN, LOW, KIND == 3)
    else:
        first = c * BITS
        place, shift = first // 8, first % 8
        word = tl.load(codes + base + place, mask=there, other=0).to(tl.int32)
        more = there & (place + 1 < bytes_)
        word = word | (tl.load(codes + base + place + 1, mask=more, other=0).to(tl.int32) << 8)
        value = tl.load(table + ((word >> shift) & ((1 << BITS) - 1)))
        if KIND == 1:
            group = row * row_steps + token // RUN * W + c
        else:
            group = row * row_steps + token * (W // GROUP) + c // GROUP
        if LOW == 2:
            value -= tl.load(low + group, mask=there, other=0).to(tl.float32)
        if STEP:
            value *= tl.load(step + group, mask=there, other=0).to(tl.float32)
        if LOW == 1:
            value += tl.load(low + group, mask=there, other=0).to(tl.float32)
    return tl.where(there, value, 0.0)


@triton.jit
def _scores(
    queries,
    out,
    tokens,
    n,
    codes,
    step,
    low,
    table,
    bytes_,
    row_bytes,
    row_steps,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
):
    """``T`` tokens of one row: ``out += queries · values``."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * T + tl.arange(0, T)[:, None]
    c, q = tl.arange(0, WIDE)[None, :], tl.arange(0, N)[:, None]
    there = (token < tokens) & (c < W)
    value = _values(
        codes,
        step,
        low,
        table,
        bytes_,
        row_bytes,
        row_steps,
        row,
        token,
        c,
        there,
        W,
        KIND,
        BITS,
        GROUP,
        RUN,
        LOW,
        STEP,
    )
    asked = tl.load(queries + (row * n + q) * W + c, mask=(q < n) & (c < W), other=0.0)
    found = tl.dot(asked, tl.trans(value), input_precision="ieee")
    t = tl.program_id(1) * T + tl.arange(0, T)[None, :]
    place, inside = out + (row * n + q) * tokens + t, (q < n) & (t < tokens)
    tl.store(place, tl.load(place, mask=inside, other=0.0) + found, mask=inside)


@triton.jit
def _sums(
    weights,
    out,
    tokens,
    n,
    codes,
    step,
    low,
    table,
    bytes_,
    row_bytes,
    row_steps,
    SHARE: tl.constexpr,
    W: tl.constexpr,
    WIDE: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
):
    """A share of the tokens of one row: ``out[row, share] = weights · values``."""
    row, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, q = tl.arange(0, WIDE)[None, :], tl.arange(0, N)[:, None]
    total = tl.zeros((N, WIDE), tl.float32)
    for start in range(0, SHARE, T):
        token = share * SHARE + start + tl.arange(0, T)[:, None]
        there = (token < tokens) & (c < W)
        value = _values(
            codes,
            step,
            low,
            table,
            bytes_,
            row_bytes,
            row_steps,
            row,
            token,
            c,
            there,
            W,
            KIND,
            BITS,
            GROUP,
            RUN,
            LOW,
            STEP,
        )
        t = share * SHARE + start + tl.arange(0, T)[None, :]
        weight = tl.load(weights + (row * n + q) * tokens + t, mask=(q < n) & (t < tokens), other=0.0)
        total += tl.dot(weight, value, input_precision="ieee")
    place = out + ((row * tl.num_programs(1) + share) * n + q) * W + c
    tl.store(place, total, mask=(q < n) & (c < W))
