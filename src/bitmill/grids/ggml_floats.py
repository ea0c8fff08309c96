"""llama.cpp's own MXFP4 and NVFP4: what its quantizer makes of a weight, to the byte.

``mxfp4`` and ``nvfp4`` are these types with less error: they choose a block's exponent by trying, and spread
a tensor over the range of its block scales. (OCP Microscaling specification v1.0; llama.cpp's ggml-quants.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from bitmill.core.axes import LevelGrid, Levels
from bitmill.core.types import Params, Quantized
from bitmill.numerics.float_layout import UE4M3
from bitmill.numerics.ggml_grid import BlockGrid
from bitmill.numerics.ggml_rows import check
from bitmill.numerics.search import spread

_NAMES = ("mxfp4-floor", "nvfp4-flat")
_RUN = {"mxfp4-floor": 32, "nvfp4-flat": 16}  # weights that share a scale
_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # doubled, so that they are whole numbers
_TOP = 6.0
_SATURATED = 256.0  # block scales from here on become the largest, 448
_LARGEST = 2.0**126


@final
@dataclass(frozen=True)
class GgmlFloat(BlockGrid, LevelGrid):
    """Values ``element · scale`` for four-bit E2M1 elements, by llama.cpp's plain rules.

    Importance changes nothing.

    Codes are uint8 ``out in``, the sign highest. Parameters:

    * ``mxfp4-floor``: ``exponent`` uint8 ``out in/32``; the scale is ``2**(exponent - 127)``, from the
      exponent of the largest magnitude, so that up to a quarter of that is cut off.
    * ``nvfp4-flat``: ``scale`` float32 ``out in/16``, E4M3 numbers, 0 for a block below their range.

    Attributes:
        type: the type and its rule.
    """

    type: str = "mxfp4-floor"

    types: ClassVar[tuple[str, ...]] = _NAMES
    small: ClassVar[str] = "mxfp4 and q4_0"

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """llama.cpp's scales.

        Raises:
            Refused: rows are not whole blocks.
            Unsolvable: a weight is not finite, or too large.
        """
        check(self, w, importance, _LARGEST)
        largest = w.to(torch.float32).reshape(w.shape[0], -1, _RUN[self.type]).abs().amax(-1)
        if self.type == "nvfp4-flat":
            return {"scale": torch.from_numpy(_half_up(largest.cpu().numpy())).to(w.device)}
        return {"exponent": torch.from_numpy(_floors(largest.cpu().numpy())).to(w.device)}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        """Nearest codes; halfway goes to the smaller magnitude."""
        unit = self._units(params, at, w.shape[1])
        size = w.to(torch.float32).abs()
        codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
        for low, high in pairwise(_VALUES):
            codes += size > unit * ((low + high) / 2)
        codes |= ((codes > 0) & (w < 0)).to(torch.uint8) << 3
        return torch.where(unit > 0, codes, 0).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        values = torch.tensor((*_VALUES, *(-v for v in _VALUES)), device=codes.device)
        return values[codes.long()] * self._units(params, at, codes.shape[1])

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def scales(self) -> tuple[str, ...]:
        """Neither exponents nor eight-bit floats move freely."""
        return ()

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        raise ValueError(f"{self} has no scale {name!r}")

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        """Spacing just below half of the largest value."""
        return (2 * self._units(params, at, columns)).expand(-1, columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        """Exponents move by whole powers of two."""
        if self.type == "nvfp4-flat":  # a block has four scales
            runs = params["scale"].shape[1]
            if factor.dim() and factor.shape[-1] not in (1, runs):
                factor = factor.repeat_interleave(runs // factor.shape[-1], -1)
            return {"scale": torch.from_numpy(_half_up((params["scale"] * factor * _TOP).cpu().numpy()))}
        moved = params["exponent"].to(torch.float32) + factor.log2()
        return {"exponent": moved.round().clamp(0, 254).to(torch.uint8)}

    def levels_of(self, params: Params, columns: Tensor, rows: int) -> Levels:
        values = torch.tensor((*(-v for v in _VALUES[:0:-1]), *_VALUES), device=columns.device)
        return Levels(values, self._units(params, 0, self._width(params))[:, columns])

    def _width(self, params: Params) -> int:
        return next(iter(params.values())).shape[1] * _RUN[self.type]

    def _units(self, params: Params, at: int, columns: int) -> Tensor:
        """Half of every column's scale, or one that broadcasts."""
        if self.type == "nvfp4-flat":
            return spread(params["scale"], 16, at, columns) / 2
        halves = torch.arange(-128, 128, device=params["exponent"].device).to(torch.float64).exp2()
        return halves.to(torch.float32)[spread(params["exponent"], 32, at, columns).long()]


def _floors(largest: np.ndarray) -> np.ndarray:
    """Exponent of the largest magnitude, by a logarithm in single precision: it rounds the numbers just below
    a power of two up to it. Below the range the byte wraps around, and every code of the block is 0."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32)) + 125
    return np.where(largest > 0, exponent, 0).astype(np.int32).astype(np.uint8)


def _half_up(largest: np.ndarray) -> np.ndarray:
    """A sixth of it as an unsigned E4M3 number: halfway goes up; from 256 on it is 448."""
    x = np.minimum(largest / np.float32(_TOP), np.float32(448))
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.int32)
    normal = (bits + (1 << 19) >> 20) - (120 << 3)
    tiny = np.minimum((x * np.float32(512) + np.float32(0.5)).astype(np.int32), 7)
    byte = np.where(x < np.float32(2.0**-6), tiny, np.where(x >= _SATURATED, 126, normal))
    return UE4M3[np.minimum(byte, 126)]
