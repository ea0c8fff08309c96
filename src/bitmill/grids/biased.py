"""Uniform integers with a scale and a bias a group: the affine grid of MLX (``mlx.core.quantize``).

It is a grid with real zero points whose file holds ``-scale · zero`` instead of ``zero``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import Affine, AffineGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.search import REAL_ZERO, search_affine, spread, stored, weights_of

_TEXT = re.compile(r"int([2-8])-g([1-9]\d{0,5})-bias(?:-s(f16|bf16|f32))?")
_SCALES = {"auto": "f16", "f16": "f16", "bf16": "bf16", "f32": "f32"}


@final
@dataclass(frozen=True)
class Biased(AffineGrid):
    """Values ``scale · code + bias`` for codes ``0 … 2**bits - 1``.

    Codes are uint8 ``out in``. Parameters ``scale`` and ``bias``, float32 ``out groups``. A scale may be
    negative: codes then count from the upper end of the range.

    Attributes:
        bits: 2 to 8.
        group: columns that share a scale and a bias.
        scale: what both are stored in: ``f16 bf16 f32``; ``auto`` leaves it to the container and stands for
            ``f16`` until then.
    """

    bits: int = 4
    group: int = 64
    scale: str = "auto"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integer grids have 2 to 8 bits, not {self.bits}")
        if self.group < 1:
            raise ValueError(f"group {self.group} is no number of columns")
        if self.scale not in _SCALES:
            raise ValueError(f"scale {self.scale!r} is not one of {', '.join(_SCALES)}")

    @property
    def block(self) -> tuple[int, int]:
        return (1, self.group)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> Biased | None:
        """``int4-g64-bias``, ``int6-g32-bias-sbf16``."""
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1]), int(found[2]), found[3] or "auto")

    @classmethod
    def examples(cls) -> tuple[Biased, ...]:
        return (cls(4, 64), cls(2, 32), cls(3, 64), cls(5, 128), cls(6, 64, "f32"), cls(8, 64, "bf16"))

    def __str__(self) -> str:
        return f"int{self.bits}-g{self.group}-bias{'' if self.scale == 'auto' else f'-s{self.scale}'}"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        if shape[1] % self.group:
            return f"{shape[1]} columns are not a multiple of the group of {self.group}"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        return out * columns * self.bits + 2 * (out * columns // self.group) * (
            32 if self.scale == "f32" else 16
        )

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The plain rule is MLX's: the end of the range that is farther from 0 is the bias, and the scale is
        such that 0 is a value too. With ``importance``, the better of that and of the weighted search of
        :func:`~bitmill.numerics.search.search_affine`, group by group."""
        w = w.to(torch.float32)
        plain = self._plain(w)
        if importance is None:
            return plain
        u, top = weights_of(importance, w), 2**self.bits - 1
        scale = plain["scale"].abs()
        low = torch.where(plain["scale"] < 0, plain["bias"] - top * scale, plain["bias"])
        found, zero = search_affine(
            w, u, scale, -low / scale, bits=self.bits, kind=REAL_ZERO, floor=0, dtype=_SCALES[self.scale]
        )
        searched = {"scale": found, "bias": self._bias(-zero * found)}
        better = self._error(w, u, searched) < self._error(w, u, plain)
        return {name: torch.where(better, searched[name], plain[name]) for name in plain}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        scale, bias = self._columns(params, at, w.shape[1])
        codes = (w.to(torch.float32) - bias).div_(scale).round_().clamp_(0, 2**self.bits - 1)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        scale, bias = self._columns(params, at, codes.shape[1])
        return codes.to(torch.float32).mul_(scale).add_(bias)

    def scales(self) -> tuple[str, ...]:
        return ("bias", "scale")

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return self._bias(values) if name == "bias" else stored(values, _SCALES[self.scale])

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        return spread(params["scale"], self.group, at, columns).abs().expand(-1, columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        """Both ends of the range move in proportion."""
        return {
            "scale": stored(params["scale"] * factor, _SCALES[self.scale]),
            "bias": self._bias(params["bias"] * factor),
        }

    def affine(self, params: Params, columns: Tensor) -> Affine:
        def of(name: str) -> Tensor:
            blocks = params[name]
            return blocks if blocks.shape[1] == 1 else blocks[:, columns // self.group]

        scale = of("scale")
        return Affine(scale, scale.new_zeros(1, 1), of("bias"), 0, 2**self.bits - 1)

    def with_zero(self, params: Params, zero: Tensor) -> Params | None:
        return {**params, "bias": self._bias(-zero * params["scale"])}

    def _columns(self, params: Params, at: int, columns: int) -> tuple[Tensor, Tensor]:
        return spread(params["scale"], self.group, at, columns), spread(
            params["bias"], self.group, at, columns
        )

    def _bias(self, values: Tensor) -> Tensor:
        return torch.where(values == 0, 0.0, stored(values, _SCALES[self.scale]))

    def _plain(self, w: Tensor) -> dict[str, Tensor]:
        """The range is widened to at least half of its farther end, so that a constant group has a step."""
        blocks = w.reshape(w.shape[0], -1, self.group)
        low, high = blocks.amin(-1), blocks.amax(-1)
        low, high = torch.minimum(low, high / 2), torch.maximum(high, low / 2)
        down = high >= -low  # codes count down from the upper end
        step = stored((high - low) / (2**self.bits - 1), _SCALES[self.scale])
        edge, scale = torch.where(down, high, low), torch.where(down, -step, step)
        places = (edge / scale).round()  # from 0 to the edge
        exact = stored(edge / torch.where(places == 0, 1.0, places), _SCALES[self.scale])
        return {
            "scale": torch.where(places == 0, scale, exact),
            "bias": torch.where(places == 0, 0.0, self._bias(edge)),
        }

    def _error(self, w: Tensor, u: Tensor, params: Params) -> Tensor:
        missed = (self.decode(self.encode(w, params), params) - w).square_().mul_(u)
        return missed.reshape(w.shape[0], -1, self.group).sum(-1)
