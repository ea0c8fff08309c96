"""Uniform integers whose groups run down the rows, with real zero points: HQQ's ``axis=0`` (Badri and Shaji,
"Half-Quadratic Quantization of Large Machine Learning Models", 2023)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import Affine, AffineGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.search import REAL_ZERO, real_zero_range, search_affine, stored, weights_of

_TEXT = re.compile(r"int([2-8])-r([1-9]\d{0,5})(?:-fz)?(?:-s(f16|bf16|f32))?")
_SCALES = {"auto": "f16", "f16": "f16", "bf16": "bf16", "f32": "f32"}


@final
@dataclass(frozen=True)
class IntegerDown(AffineGrid):
    """Values ``scale · (code - zero)`` for codes ``0 … 2**bits - 1``.

    A group is ``group`` weights of one column: rows ``r, r + n, r + 2n …`` where ``n`` is the number of rows
    over ``group``. All of them meet the same input, so that no single loud input decides a group's range, and
    outputs that differ in size share one, which a group along the row never does.

    Codes are uint8 ``out in``. Parameters: ``scale`` and ``zero`` float32 ``n in``, zeros real.

    Attributes:
        bits: 2 to 8.
        group: rows that share a scale.
        scale: what scales and zeros are stored in: ``f16 bf16 f32``; ``auto`` leaves it to the container
            and stands for ``f16`` until then.
    """

    bits: int = 4
    group: int = 64
    scale: str = "auto"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integer grids have 2 to 8 bits, not {self.bits}")
        if self.group < 1:
            raise ValueError(f"a group of {self.group} rows holds nothing")
        if self.scale not in _SCALES:
            raise ValueError(f"scale {self.scale!r} is not one of {', '.join(_SCALES)}")

    @property
    def block(self) -> tuple[int, int]:
        """Rows of a group are far apart, so a block is the whole column."""
        return (0, 1)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> IntegerDown | None:
        """``int4-r64-fz``, ``int2-r16-fz-sbf16``."""
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1]), int(found[2]), found[3] or "auto")

    @classmethod
    def examples(cls) -> tuple[IntegerDown, ...]:
        return (cls(4, 8), cls(3, 16), cls(2, 8, "bf16"), cls(8, 16, "f32"))

    def __str__(self) -> str:
        return f"int{self.bits}-r{self.group}-fz{'' if self.scale == 'auto' else f'-s{self.scale}'}"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        if shape[0] % self.group:
            return f"the rows of {shape[0]} × {shape[1]} are not a multiple of the group of {self.group}"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        values = shape[0] * shape[1]
        return values * self.bits + values // self.group * (64 if self.scale == "f32" else 32)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The range of each group: min and max, widened to at least half of the farther end; with
        ``importance``, the weighted search of :func:`~bitmill.numerics.search.search_affine` from there."""
        groups = self._groups(w.to(torch.float32))
        top, dtype = 2**self.bits - 1, _SCALES[self.scale]
        scale, zero = real_zero_range(groups.amin(0), groups.amax(0), top, dtype)
        if importance is not None:
            u = self._groups(weights_of(importance, w).expand_as(w).contiguous())
            found = search_affine(
                groups.flatten(1).T.contiguous(),
                u.flatten(1).T.contiguous(),
                scale.reshape(-1, 1),
                zero.reshape(-1, 1),
                bits=self.bits,
                kind=REAL_ZERO,
                floor=0,
                dtype=dtype,
            )
            scale, zero = (x.reshape(scale.shape) for x in found)
        return {"scale": scale, "zero": zero}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        scale, zero = self._columns(params, at, w.shape[1])
        codes = (self._groups(w.to(torch.float32)) / scale).add_(zero).round_().clamp_(0, 2**self.bits - 1)
        return codes.to(torch.uint8).reshape(w.shape)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        scale, zero = self._columns(params, at, codes.shape[1])
        return (self._groups(codes.to(torch.float32)) - zero).mul_(scale).reshape(codes.shape)

    def scales(self) -> tuple[str, ...]:
        """None: they are not in runs of rows."""
        return ()

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return stored(values, _SCALES[self.scale])

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        return self._columns(params, at, columns)[0].abs().repeat(self.group, 1)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        """The zero code keeps its place, so both ends of the range move in proportion."""
        return {**params, "scale": stored(params["scale"] * factor, _SCALES[self.scale])}

    def affine(self, params: Params, columns: Tensor) -> Affine:
        scale, zero = (params[name][:, columns].repeat(self.group, 1) for name in ("scale", "zero"))
        return Affine(scale, zero, scale.new_zeros(1, 1), 0, 2**self.bits - 1)

    def with_zero(self, params: Params, zero: Tensor) -> Params | None:
        return {**params, "zero": torch.where(zero == 0, 0.0, stored(zero, _SCALES[self.scale]))}

    def _groups(self, x: Tensor) -> Tensor:
        """``group n in``: the members of each group, then the groups of each column."""
        return x.reshape(self.group, -1, x.shape[1])

    def _columns(self, params: Params, at: int, columns: int) -> tuple[Tensor, Tensor]:
        return params["scale"][:, at : at + columns], params["zero"][:, at : at + columns]
