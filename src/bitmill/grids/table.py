"""Sixteen fixed levels times the largest magnitude of a block: NormalFloat and FP4 of bitsandbytes, with
8-bit block scales where asked (Dettmers et al., "QLoRA", arXiv 2305.14314)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import LevelGrid, Levels
from bitmill.core.types import Params, Quantized
from bitmill.numerics.floats import dynamic_map
from bitmill.numerics.search import search_scale, spread, weights_of

_TEXT = re.compile(r"(nf4|fp4|levels\(([-+.,e\d]+)\))-b([1-9]\d{0,5})(-dq)?")
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(sign * x / 12 for sign in (1.0, -1.0) for x in _FP4_TWELFTHS)
_NAMES = {_NF4: "nf4", _FP4: "fp4"}
_NESTED = 256
_TINY = 1e-38


@final
@dataclass(frozen=True)
class Table(LevelGrid):
    """Values ``levels[code] · absmax`` with one ``absmax`` a block of a row.

    Codes are uint8 ``out in``. Parameters: ``absmax`` float32 ``out in/width``; with double quantization
    ``absmax_code`` uint8 of that shape, ``absmax_scale`` float32 ``ceil(blocks/256)`` over the blocks in row
    order and ``absmax_offset`` float32 ``()``, so that absmax = map[code] · scale + offset, where map is
    :func:`~bitmill.numerics.floats.dynamic_map`. Those are shared by rows, so the block then has 0 rows.

    Attributes:
        levels: 16 values in code order, the largest magnitude 1: the two of bitsandbytes, or sorted ones.
        width: columns that share a block.
        double: whether block scales are themselves quantized.
    """

    levels: tuple[float, ...] = _NF4
    width: int = 64
    double: bool = False

    def __post_init__(self) -> None:
        if len(self.levels) != 16 or max(abs(x) for x in self.levels) != 1:
            raise ValueError("a table has 16 levels whose largest magnitude is 1")
        if self.levels not in _NAMES and any(b <= a for a, b in pairwise(self.levels)):
            raise ValueError("the levels of a table are sorted and differ")
        if self.width < 1:
            raise ValueError(f"a block of {self.width} columns holds nothing")

    @property
    def block(self) -> tuple[int, int]:
        return (0 if self.double else 1, self.width)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> Table | None:
        """``nf4-b64``, ``fp4-b128-dq``, ``levels(-1,-0.5,…,1)-b64``."""
        found = _TEXT.fullmatch(text)
        if found is None:
            return None
        width, double = int(found[3]), found[4] is not None
        if found[2] is None:
            return cls(_NF4 if found[1] == "nf4" else _FP4, width, double)
        try:
            return cls(tuple(float(x) for x in found[2].split(",")), width, double)
        except ValueError:
            return None

    @classmethod
    def examples(cls) -> tuple[Table, ...]:
        cubic = tuple(round(x / 2 + x**3 / 2, 2) for x in (k / 7.5 - 1 for k in range(16)))
        return (cls(_NF4), cls(_NF4, 64, True), cls(_FP4), cls(_FP4, 128, True), cls(cubic, 32))

    def __str__(self) -> str:
        name = _NAMES.get(self.levels) or f"levels({','.join(repr(x) for x in self.levels)})"
        return f"{name}-b{self.width}{'-dq' if self.double else ''}"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        if shape[1] % self.width:
            return f"{shape[1]} columns are not a multiple of {self.width}: a block would cross rows"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        values = shape[0] * shape[1]
        blocks = values // self.width
        return 4 * values + (8 * blocks + 32 * -(-blocks // _NESTED) + 32 if self.double else 32 * blocks)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The largest magnitude of each block; with ``importance``, the best of 33 scales around it (for
        double quantization: of the neighbouring codes) in weighted error."""
        w = w.to(torch.float32)
        plain = w.reshape(w.shape[0], -1, self.width).abs().amax(-1)
        if self.double:
            return self._nested(w, plain, importance)
        if importance is not None:
            factors = torch.cat((torch.ones(1), torch.linspace(0.6, 1.24, 33))).to(w.device)
            plain = self._best(w, importance, plain[..., None] * factors)[1]
        return {"absmax": plain}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        absmax = self._absmax(params, at, w.shape[1])
        levels, order = torch.tensor(self.levels, device=w.device).sort(stable=True)
        x = w.to(torch.float32) * (1.0 / _apart(absmax))
        place = torch.zeros(x.shape, dtype=torch.uint8, device=w.device)
        for middle in (levels[1:] + levels[:-1]) / 2:  # fifteen sweeps beat one binary search a value
            place.add_((x > middle).view(torch.uint8))
        return order.to(torch.uint8)[place.to(torch.int32)] if self.levels == _FP4 else place

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        levels = torch.tensor(self.levels, device=codes.device)
        return levels[codes.to(torch.int32)] * self._absmax(params, at, codes.shape[1])

    def scales(self) -> tuple[str, ...]:
        return () if self.double else ("absmax",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return values

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        """The widest gap between levels that touches the inner half of the range."""
        gaps = [b - a for a, b in pairwise(sorted(self.levels)) if a < 0.5 and b > -0.5]
        absmax = self._absmax(params, at, columns).abs()
        return (absmax * max(gaps)).expand(absmax.shape[0], columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        """With double quantization, the nearest of the scales its offset and outer scales can express."""
        if not self.double:
            return {"absmax": params["absmax"] * factor}
        codes = params["absmax_code"]
        wanted = self._nested_values(params, codes, 0) * factor
        outer = self._outer(params, codes.shape, 0, codes.shape[1])
        return {**params, "absmax_code": _nearest(wanted - params["absmax_offset"], outer)}

    def levels_of(self, params: Params, columns: Tensor, rows: int) -> Levels:
        absmax = self._nested_values(params, params["absmax_code"], 0) if self.double else params["absmax"]
        levels = torch.tensor(sorted(self.levels), device=columns.device)
        return Levels(levels, absmax[:, columns // self.width])

    def _absmax(self, params: Params, at: int, columns: int) -> Tensor:
        if not self.double:
            return spread(params["absmax"], self.width, at, columns)
        first, last = at // self.width, (at + columns - 1) // self.width + 1
        values = self._nested_values(params, params["absmax_code"][:, first:last], first)
        return spread(values, self.width, at - first * self.width, columns)

    def _nested_values(self, params: Params, codes: Tensor, first: int) -> Tensor:
        """Scales of the blocks in columns ``first …`` of blocks, which have ``codes``."""
        outer = self._outer(params, params["absmax_code"].shape, first, codes.shape[1])
        middle = dynamic_map().to(codes.device)[codes.to(torch.int32)]
        return middle * outer + params["absmax_offset"]

    def _outer(self, params: Params, shape: tuple[int, ...], first: int, blocks: int) -> Tensor:
        rows = torch.arange(shape[0], device=params["absmax_scale"].device)[:, None] * shape[1]
        columns = torch.arange(first, first + blocks, device=rows.device)
        return params["absmax_scale"][(rows + columns) // _NESTED]

    def _nested(self, w: Tensor, plain: Tensor, importance: Tensor | None) -> Params:
        flat = plain.reshape(-1)
        offset = flat.mean()
        runs = torch.nn.functional.pad(flat - offset, (0, -flat.numel() % _NESTED)).reshape(-1, _NESTED)
        params = {"absmax_scale": runs.abs().amax(1), "absmax_offset": offset}
        outer = self._outer(params, plain.shape, 0, plain.shape[1])
        code = _nearest(plain - offset, outer)
        if importance is not None:
            near = torch.tensor([0, *range(-12, 0), *range(1, 9)], device=w.device)
            codes = (code[..., None].to(torch.int64) + near).clamp(0, 255)
            values = dynamic_map().to(w.device)[codes] * outer[..., None] + offset
            best, _ = self._best(w, importance, values)
            code = codes.gather(-1, best[..., None]).squeeze(-1).to(torch.uint8)
        return {**params, "absmax_code": code}

    def _best(self, w: Tensor, importance: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        levels = torch.tensor(sorted(self.levels))
        best = search_scale(w, weights_of(importance, w), _apart(scales), levels)
        return best, scales.gather(-1, best[..., None]).squeeze(-1)


def _apart(scale: Tensor) -> Tensor:
    """``scale`` away from 0, so that it has a reciprocal. (A nested scale can come out negative.)"""
    return torch.where(scale.abs() < _TINY, _TINY, scale)


def _nearest(values: Tensor, outer: Tensor) -> Tensor:
    """Codes of the dynamic type nearest to ``values / outer``."""
    table = dynamic_map().to(values.device)
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(values * (1.0 / outer.clamp(min=_TINY)), middles).to(torch.uint8)
