"""Uniform integers with a scale a group and an optional zero: the grid of GPTQ, AWQ, HQQ and
compressed-tensors (Frantar et al., arXiv 2210.17323; Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import Affine, AffineGrid, Grid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.search import (
    INTEGER_ZERO,
    REAL_ZERO,
    SYMMETRIC,
    real_zero_range,
    search_affine,
    spread,
    stored,
    weights_of,
)

_TEXT = re.compile(
    r"int([2-8])-(channel|tensor|g[1-9]\d{0,5})(?:-(sym|asym|fz))?(?:-s(f16|bf16|f32))?(?:-z([01]))?"
)
_KINDS = {"sym": SYMMETRIC, "asym": INTEGER_ZERO, "fz": REAL_ZERO}
_SCALES = {"auto": "f16", "f16": "f16", "bf16": "bf16", "f32": "f32"}


@final
@dataclass(frozen=True)
class Integer(AffineGrid):
    """Values ``scale · (code - zero)`` for codes ``0 … 2**bits - 1``.

    Codes are uint8 ``out in``. Parameters: ``scale`` float32 ``out groups`` (``1 1`` for a whole tensor)
    and, unless symmetric, ``zero`` of the same shape: whole numbers for ``asym``, real ones for ``fz``. A
    symmetric zero is ``2**(bits - 1)`` and not stored. Scales are positive by the plain rule; the weighted
    fit may make a symmetric one of up to 5 bits negative, which puts the extra level on the positive side.

    Attributes:
        bits: 2 to 8.
        group: columns that share a scale; 0 is a whole row, -1 the whole tensor.
        zero: ``sym``, ``asym`` (integer zero points, 0 is always a value) or ``fz`` (real zero points).
        scale: what scales, and real zeros, are stored in: ``f16 bf16 f32``; ``auto`` leaves it to the
            container and stands for ``f16`` until then.
        zero_floor: smallest integer zero point: 1 for files that store the zero minus one.
    """

    bits: int = 4
    group: int = 128
    zero: str = "sym"
    scale: str = "auto"
    zero_floor: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integer grids have 2 to 8 bits, not {self.bits}")
        if self.group < -1:
            raise ValueError(f"group {self.group} is neither a width, 0 (row) nor -1 (tensor)")
        if self.zero not in _KINDS:
            raise ValueError(f"zero {self.zero!r} is not one of {', '.join(_KINDS)}")
        if self.scale not in _SCALES:
            raise ValueError(f"scale {self.scale!r} is not one of {', '.join(_SCALES)}")
        if self.zero_floor not in (0, 1) or (self.zero_floor and self.zero != "asym"):
            raise ValueError("zero_floor is 0 or 1, and 1 only for asym")

    @property
    def block(self) -> tuple[int, int]:
        return (0, 0) if self.group == -1 else (1, self.group)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> Integer | None:
        """``int4-g64-asym``, ``int8-channel-sym-sf32``, ``int4-g128-asym-z1``; ``sym`` when left open."""
        found = _TEXT.fullmatch(text)
        if found is None:
            return None
        bits, width, zero, scale, floor = found.groups()
        group = {"channel": 0, "tensor": -1}.get(width) if width[0] != "g" else int(width[1:])
        if group is None or (floor == "1" and zero != "asym"):
            return None
        return cls(int(bits), group, zero or "sym", scale or "auto", int(floor or 0))

    @classmethod
    def examples(cls) -> tuple[Integer, ...]:
        return (
            cls(4, 128, "sym"),
            cls(4, 64, "asym"),
            cls(4, 32, "asym", "bf16", 1),
            cls(4, 64, "fz"),
            cls(3, 64, "asym"),
            cls(2, 32, "sym"),
            cls(8, 0, "sym", "f32"),
            cls(8, -1, "asym"),
            cls(5, 64, "fz", "bf16"),
        )

    def __str__(self) -> str:
        width = {0: "channel", -1: "tensor"}.get(self.group, f"g{self.group}")
        scale = "" if self.scale == "auto" else f"-s{self.scale}"
        return f"int{self.bits}-{width}-{self.zero}{scale}{'-z1' if self.zero_floor else ''}"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        if self.group > 0 and shape[1] % self.group:
            return f"{shape[1]} columns are not a multiple of the group of {self.group}"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        blocks = {-1: 1, 0: out}.get(self.group, out * columns // max(self.group, 1))
        scale_bits = 32 if self.scale == "f32" else 16
        zero_bits = {"sym": 0, "asym": self.bits, "fz": scale_bits}[self.zero]
        return out * columns * self.bits + blocks * (scale_bits + zero_bits)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The range of each group. The plain rule is min/max, widened to hold 0 (for ``fz``: to at least half
        of its farther end, so that a constant group has a step); with ``importance``, the weighted search of
        :func:`~bitmill.numerics.search.search_affine` starting there."""
        w = w.to(torch.float32)
        scale, zero = self._plain(w)
        if importance is not None:
            u = weights_of(importance, w)
            if self.group == -1:
                u, w = u.expand_as(w).reshape(1, -1), w.reshape(1, -1)
            scale, zero = search_affine(
                w,
                u,
                scale,
                zero,
                bits=self.bits,
                kind=_KINDS[self.zero],
                floor=self.zero_floor,
                dtype=_SCALES[self.scale],
            )
        return {"scale": scale} if self.zero == "sym" else {"scale": scale, "zero": zero}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        blocks, scale, zero = self._blockwise(w.to(torch.float32), params, at)
        codes = (blocks / scale).add_(zero).round_().clamp_(0, 2**self.bits - 1)
        return codes.to(torch.uint8).reshape(w.shape)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        blocks, scale, zero = self._blockwise(codes.to(torch.float32), params, at)
        return (blocks - zero).mul_(scale).reshape(codes.shape)

    def scales(self) -> tuple[str, ...]:
        return ("scale",) if self.zero == "sym" else ("zero", "scale")

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        if name == "zero" and self.zero == "asym":
            return values.round().clamp(self.zero_floor, 2**self.bits - 1)
        return stored(values, _SCALES[self.scale])

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        scale = params["scale"]
        rows = scale.shape[0]
        return spread(scale, self.group, at, columns).abs().expand(rows, columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        """The zero code keeps its place, so both ends of the range move in proportion."""
        return {**params, "scale": stored(params["scale"] * factor, _SCALES[self.scale])}

    def affine(self, params: Params, columns: Tensor) -> Affine:
        def of(name: str) -> Tensor:
            blocks = params[name]
            return blocks if blocks.shape[1] == 1 else blocks[:, columns // self.group]

        scale = of("scale")
        zero = scale.new_full((1, 1), 2.0 ** (self.bits - 1)) if self.zero == "sym" else of("zero")
        return Affine(scale, zero, scale.new_zeros(1, 1), 0, 2**self.bits - 1)

    def with_zero(self, params: Params, zero: Tensor) -> Params | None:
        if self.zero == "sym":
            return None
        if self.zero == "fz":
            return {**params, "zero": torch.where(zero == 0, 0.0, stored(zero, _SCALES[self.scale]))}
        return {**params, "zero": zero.round().clamp(self.zero_floor, 2**self.bits - 1)}

    def _blockwise(self, x: Tensor, params: Params, at: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """``x`` with scale and zero that broadcast to it; whole rows go by blocks, so that neither is ever
        spread to the size of the weight."""
        if self.group <= 0 or at or x.shape[1] != params["scale"].shape[1] * self.group:
            return x, *self._columns(params, at, x.shape[1])
        zero = params["zero"][..., None] if self.zero != "sym" else float(2 ** (self.bits - 1))
        return x.reshape(len(x), -1, self.group), params["scale"][..., None], zero

    def _columns(self, params: Params, at: int, columns: int) -> tuple[Tensor, Tensor | float]:
        scale = spread(params["scale"], self.group, at, columns)
        if self.zero == "sym":
            return scale, float(2 ** (self.bits - 1))
        return scale, spread(params["zero"], self.group, at, columns)

    def _plain(self, w: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self._blocks(w)
        top, dtype = 2**self.bits - 1, _SCALES[self.scale]
        low, high = blocks.amin(-1), blocks.amax(-1)
        if self.zero == "sym":
            scale = stored(torch.maximum(-low, high) / (top / 2), dtype)
            return scale, torch.full_like(scale, float(2 ** (self.bits - 1)))
        if self.zero == "fz":
            return real_zero_range(low, high, top, dtype)
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.zero_floor:
            low = torch.minimum(low, -high / (top - 1))
        scale = stored((high - low) / top, dtype)
        return scale, (-low / scale).round().clamp(self.zero_floor, top)

    def _blocks(self, w: Tensor) -> Tensor:
        if self.group == -1:
            return w.reshape(1, 1, -1)
        return w.reshape(w.shape[0], -1, self.group or w.shape[1])


def bits_and_group(grid: Grid) -> tuple[int, int] | None:
    """Of an integer grid; None for any other."""
    return (grid.bits, grid.group) if isinstance(grid, Integer) else None


def integers(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: str) -> Quantized:
    """The weight of these codes (uint8 ``out in``) and of the scales and zero points of a file (float32 ``out
    groups``): symmetric where every zero point is the middle."""
    columns, groups = codes.shape[1], scale.shape[1]
    group, shape = (0 if groups == 1 else columns // groups), (codes.shape[0], columns)
    if bool((zero == 2 ** (bits - 1)).all()):
        return Quantized(Integer(bits, group, "sym", dtype), codes, {"scale": scale}, shape)
    grid = Integer(bits, group, "asym", dtype, int(bool(zero.min() >= 1)))
    return Quantized(grid, codes, {"scale": scale, "zero": zero}, shape)
