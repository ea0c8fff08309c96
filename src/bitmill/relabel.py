"""The very same values on another grid: what decides whether a quantized file can change its container
without losing anything.

Everything here is exact or nothing: a relabelled weight decodes to the numbers of the one it came from, bit
for bit, or there is none. Evenly spaced grids are taken apart into a scale a block and whole levels, which is
what integers of GPTQ, AWQ and compressed-tensors and llama.cpp's symmetric blocks share; the small floats and
tables have pairs of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitmill.core.axes import Grid
from bitmill.core.types import Quantized
from bitmill.grids.biased import Biased
from bitmill.grids.ggml_floats import GgmlFloat
from bitmill.grids.integer import Integer
from bitmill.grids.kquant import KQuant
from bitmill.grids.minifloat import Minifloat
from bitmill.grids.table import Table
from bitmill.grids.ternary import Ternary

_HALF = {"q4_0": 8, "q5_0": 16, "q8_0": 0}
_REACH = {"q4_0": (-8, 7), "q5_0": (-16, 15), "q8_0": (-127, 127)}
"""Levels of llama.cpp's symmetric blocks; some kernels take absolute values of ``q8_0`` in eight bits, which
-128 has none of."""
_TERNARY = ("tq1_0", "tq2_0")
_RANGED = ("q4_1", "q5_1")
_BLOCK, _TERNARY_BLOCK = 32, 256
_NARROWER = (128, 64, 32)  # groups that readers know
_MOST_BITS = 8
_FURTHEST = 1 << 12  # a zero point beyond this is no offset of codes of eight bits
_SCALES = {"f16": torch.float16, "auto": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_ROWS = 1 << 24  # weights compared at a time


@dataclass(frozen=True, eq=False)
class _Steps:
    """Values ``scale · level``.

    Attributes:
        scale: float32 ``out blocks``.
        levels: int16 ``out in``, whole numbers around 0.
        zero: float32 ``out blocks``, where 0 stands among the codes as they are stored.
        width: columns of a block.
    """

    scale: Tensor
    levels: Tensor
    zero: Tensor
    width: int


def relabelled(quantized: Quantized, grid: Grid) -> Quantized | None:
    """The same values on ``grid``, or None where it does not hold them all."""
    if quantized.grid == grid:
        return quantized
    if grid.refuses(quantized.shape) is not None:
        return None
    if isinstance(grid, Integer | Biased | KQuant):
        ranged = _ranged(quantized, grid)
        if ranged is not None:
            return ranged
        steps = _steps(quantized)
        return None if steps is None else _stepped(steps, grid, quantized.shape)
    return _floats(quantized, grid) or _tables(quantized, grid)


def same_values(one: Quantized, other: Quantized) -> bool:
    """As :meth:`Quantized.same_values`, some rows at a time where rows are independent."""
    if one.shape != other.shape:
        return False
    out, columns = one.shape
    if not (_by_rows(one) and _by_rows(other)):
        return one.same_values(other)
    count = max(1, _ROWS // columns)
    parts = (torch.arange(at, min(at + count, out)) for at in range(0, out, count))
    return all(torch.equal(_part(one, index), _part(other, index)) for index in parts)


def equivalents(grid: Grid) -> Sequence[Grid]:
    """Grids that may hold the values of ``grid``; scales are for the container to settle."""
    halves, ranged = [KQuant(kind) for kind in _HALF], [KQuant(kind) for kind in _RANGED]
    if isinstance(grid, Integer):
        return (*_integers(grid.bits, grid.group), *halves)
    if isinstance(grid, Biased):
        return (*_integers(grid.bits, grid.group), *halves, *ranged)
    if str(grid) in _HALF:
        return (*_integers({"q4_0": 4, "q5_0": 5, "q8_0": 8}[str(grid)], _BLOCK), *halves)
    if isinstance(grid, Ternary):
        return (*Ternary.examples(), *_integers(2, -1), *(KQuant(kind) for kind in _TERNARY), *halves)
    if str(grid) in _TERNARY:
        return (*_integers(2, _TERNARY_BLOCK), *(KQuant(kind) for kind in _TERNARY), *halves)
    if str(grid) in _RANGED:
        return (*_integers(4 if str(grid) == "q4_1" else 5, _BLOCK), *ranged)
    if isinstance(grid, Minifloat | GgmlFloat):
        wide = [Minifloat(grid.element, "channel")] if str(grid).endswith("-tensor") else []  # type: ignore[union-attr]
        small = [Minifloat("e2m1", "mx"), Minifloat("e2m1", "nv"), *GgmlFloat.examples()]
        return (*wide, *(small if str(grid).startswith(("mxfp4", "nvfp4")) else ()))
    return (replace(grid, double=False),) if isinstance(grid, Table) and grid.double else ()


def _integers(bits: int, group: int) -> tuple[Grid, ...]:
    groups = [
        group,
        *([0] if group == -1 else []),
        *(g for g in _NARROWER if group <= 0 or (group % g == 0 and g < group)),
    ]
    widths = range(bits, _MOST_BITS + 1)
    whole = [Integer(wide, g, zero) for wide in widths for g in groups for zero in ("sym", "asym", "fz")]
    return (*whole, *(Biased(wide, g) for wide in widths for g in groups if g > 0))


def _by_rows(quantized: Quantized) -> bool:
    """Whether rows have nothing in common, so that some of them decode alone."""
    out = quantized.shape[0]
    return quantized.grid.block[0] == 1 and all(p.shape[:1] == (out,) for p in quantized.params.values())


def _part(quantized: Quantized, index: Tensor) -> Tensor:
    rows = quantized.rows(index)
    return replace(rows, shape=(len(index), quantized.shape[1])).dense()


def _steps(quantized: Quantized) -> _Steps | None:
    """A weight as scales and whole levels; None for grids, or parameters, that are not made of them."""
    grid, params, (out, columns) = quantized.grid, quantized.params, quantized.shape
    if isinstance(grid, Integer):
        if set(params) != ({"scale"} if grid.zero == "sym" else {"scale", "zero"}):
            return None
        scale = params["scale"].expand(out, -1)
        zero = params.get("zero", torch.full((1, 1), 2.0 ** (grid.bits - 1))).expand(scale.shape)
        if not torch.equal(zero, zero.round()) or float(zero.abs().max()) > _FURTHEST:
            return None
        width = columns // scale.shape[1]
    elif isinstance(grid, Biased) and set(params) == {"scale", "bias"}:
        scale, width = params["scale"], grid.group
        zero = torch.where(scale == 0, 0.0, -params["bias"] / scale).round()
        if not torch.equal(zero * scale, -params["bias"]) or float(zero.abs().max()) > _FURTHEST:
            return None
    elif isinstance(grid, Ternary):
        scale, width = params["scale"].expand(out, -1), columns
        zero = torch.ones_like(scale)
    elif isinstance(grid, KQuant) and set(params) == {"d"}:
        scale = params["d"]
        zero = torch.full_like(scale, float({**_HALF, **dict.fromkeys(_TERNARY, 1)}[str(grid)]))
        width = grid.block[1]
    else:
        return None
    offset = zero.to(torch.int16).repeat_interleave(width, 1)
    return _Steps(scale.to(torch.float32), quantized.codes.to(torch.int16) - offset, zero, width)


def _stepped(steps: _Steps, grid: Integer | Biased | KQuant, shape: tuple[int, int]) -> Quantized | None:
    """``steps`` on an evenly spaced grid, when its blocks, its scales and its codes all have room."""
    if isinstance(grid, Biased):
        width = grid.group
    elif isinstance(grid, Integer):
        width = {0: shape[1], -1: shape[1]}.get(grid.group, grid.group)
    elif str(grid) in (*_HALF, *_TERNARY):
        width = grid.block[1]
    else:
        return None
    scale, zero = (
        _regrouped(steps.scale, steps.width, width),
        _regrouped(steps.zero, steps.width, width, True),
    )
    if scale is None or zero is None:
        return None
    kept = torch.float16 if isinstance(grid, KQuant) else _SCALES[grid.scale]
    if not _are(scale, kept):
        return None
    blocks = steps.levels.reshape(shape[0], -1, width)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if isinstance(grid, KQuant):
        return _block_type(grid, steps.levels, scale, (int(low.min()), int(high.max())), shape)
    zero = _placed(zero, low, high, grid)
    if zero is None:
        return None
    if isinstance(grid, Integer) and grid.group == -1:
        if bool((scale != scale[0, 0]).any()) or bool((zero != zero[0, 0]).any()):
            return None
        scale, zero = scale[:1, :1], zero[:1, :1]
    codes = (blocks + zero.to(torch.int16)[..., None]).to(torch.uint8).reshape(shape)
    if isinstance(grid, Biased):
        bias = torch.where(zero == 0, 0.0, -zero * scale)
        params = {"scale": scale.contiguous(), "bias": bias.contiguous()}
        return Quantized(grid, codes, params, shape) if _are(bias, kept) else None
    params = {"scale": scale.contiguous(), "zero": zero.contiguous()}
    return Quantized(grid, codes, params if grid.zero != "sym" else {"scale": params["scale"]}, shape)


def _placed(zero: Tensor, low: Tensor, high: Tensor, grid: Integer | Biased) -> Tensor | None:
    """Where 0 stands among the codes: as near as can be to where it stood, with room for all levels."""
    top, floor = 2**grid.bits - 1, grid.zero_floor if isinstance(grid, Integer) else 0
    if isinstance(grid, Integer) and grid.zero == "sym":
        zero = torch.full_like(zero, 2.0 ** (grid.bits - 1))
    else:
        least, most = (-low).clamp(min=floor), (top - high).clamp(max=top)
        zero = torch.minimum(torch.maximum(zero, least.to(zero.dtype)), most.to(zero.dtype))
    fits = (zero >= -low) & (zero <= top - high) & (zero >= floor)
    return zero if bool(fits.all()) else None


def _block_type(
    grid: KQuant, levels: Tensor, scale: Tensor, reach: tuple[int, int], shape: tuple[int, int]
) -> Quantized | None:
    low, high = (-1, 1) if str(grid) in _TERNARY else _REACH[str(grid)]
    if reach[0] < low or reach[1] > high:
        return None
    half = 1 if str(grid) in _TERNARY else _HALF[str(grid)]
    codes = (levels + half).to(torch.int8 if str(grid) == "q8_0" else torch.uint8)
    return Quantized(grid, codes, {"d": scale.contiguous()}, shape)


def _regrouped(values: Tensor, width: int, wanted: int, loose: bool = False) -> Tensor | None:
    """Values a block of ``width`` columns for blocks of ``wanted``; None where joined blocks differ.

    ``loose`` takes the first of those, for zero points, which are fitted to the levels anyway.
    """
    if width % wanted == 0:
        return values.repeat_interleave(width // wanted, 1)
    if wanted % width or values.shape[1] % (wanted // width):
        return None
    parts = values.reshape(values.shape[0], -1, wanted // width)
    return parts[..., 0] if loose or bool((parts == parts[..., :1]).all()) else None


def _ranged(quantized: Quantized, grid: Grid) -> Quantized | None:
    """A scale and a base a block, ``scale · code + base``: MLX's integers, ``q4_1`` and ``q5_1``."""
    stored, params = quantized.grid, quantized.params
    if isinstance(stored, Biased) and set(params) == {"scale", "bias"}:
        scale, base = params["scale"], params["bias"]
    elif str(stored) in _RANGED and set(params) == {"d", "m"}:
        scale, base = params["d"], params["m"]
    else:
        return None
    if not (isinstance(grid, Biased) or str(grid) in _RANGED):
        return None
    width = grid.block[1]
    parts = [_regrouped(part, stored.block[1], width) for part in (scale, base)]
    top = 2**grid.bits - 1 if isinstance(grid, Biased) else {"q4_1": 15, "q5_1": 31}[str(grid)]
    kept = _SCALES[grid.scale] if isinstance(grid, Biased) else torch.float16
    if any(part is None or not _are(part, kept) for part in parts) or int(quantized.codes.max()) > top:
        return None
    names = ("scale", "bias") if isinstance(grid, Biased) else ("d", "m")
    held = {name: part.contiguous() for name, part in zip(names, parts, strict=True) if part is not None}
    made = replace(quantized, grid=grid, params=held)
    return made if same_values(made, quantized) else None


def _are(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).to(torch.float32), values)


def _floats(quantized: Quantized, grid: Grid) -> Quantized | None:
    """Small floats of the same elements: another name, a scale for each row, MXFP4 inside NVFP4."""
    one, other, params = str(quantized.grid), str(grid), quantized.params
    out = quantized.shape[0]
    if {one, other} == {"mxfp4", "mxfp4-floor"}:
        return replace(quantized, grid=grid)
    if (one, other) == ("nvfp4-flat", "nvfp4") and set(params) == {"scale"}:
        return replace(quantized, grid=grid, params={**params, "gain": torch.ones(())})
    if (one, other) == ("nvfp4", "nvfp4-flat") and float(params["gain"]) == 1:
        return replace(quantized, grid=grid, params={"scale": params["scale"]})
    if (
        one.endswith("-tensor")
        and other == one.replace("-tensor", "-channel")
        and isinstance(grid, Minifloat)
    ):
        return replace(quantized, grid=grid, params={"scale": params["scale"].expand(out, 1).contiguous()})
    if one in ("mxfp4", "mxfp4-floor") and other == "nvfp4":
        return _inside_nvfp4(quantized, grid)
    return None


def _inside_nvfp4(quantized: Quantized, grid: Grid) -> Quantized | None:
    """Powers of two as E4M3 scales, which hold 18 of them, under one gain for the whole tensor."""
    exponent = quantized.params["exponent"].to(torch.float32) - 127
    used = (quantized.codes & 7).reshape(*exponent.shape, -1).amax(-1) > 0
    if not bool(used.any()):
        return None
    low, high = float(exponent[used].min()), float(exponent[used].max())
    if high - low > 17 or abs(high) > 100:
        return None
    scale = torch.exp2(exponent.clamp(low, high) + 8 - high).repeat_interleave(2, 1)
    return replace(quantized, grid=grid, params={"scale": scale, "gain": torch.tensor(2.0 ** (8 - high))})


def _tables(quantized: Quantized, grid: Grid) -> Quantized | None:
    """A table whose block scales are quantized as well, with the scales that these are."""
    stored = quantized.grid
    if not isinstance(stored, Table) or not isinstance(grid, Table) or replace(stored, double=False) != grid:
        return None
    if set(quantized.params) != {"absmax_code", "absmax_scale", "absmax_offset"}:
        return None
    first = torch.arange(0, quantized.shape[1], stored.width)
    scale = stored.levels_of(quantized.params, first, quantized.shape[0]).scale
    return replace(quantized, grid=grid, params={"absmax": scale.contiguous()})
