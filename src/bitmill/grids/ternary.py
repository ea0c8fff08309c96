"""-1, 0 and 1 times one scale for a whole weight: the mean of its magnitudes (Ma et al., "The Era of 1-bit
LLMs: All Large Language Models are in 1.58 Bits", arXiv 2402.17764, equations 1-3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import Affine, AffineGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.search import weights_of

_NAME, _WIDE = "ternary-tensor", "ternary-tensor-sf32"
_FACTORS = tuple(k / 16 for k in range(10, 33))


@final
@dataclass(frozen=True)
class Ternary(AffineGrid):
    """Values ``(code - 1) · scale`` for codes 0, 1, 2.

    Codes are uint8 ``out in``. Parameters: ``scale`` float32 ``1 1``. A weight that was not trained for this
    grid loses nearly all it knows: it is what ``bitmill train-ternary`` trains for.

    Attributes:
        wide: whether the scale is a number in single precision; else it is one of bfloat16, which half
            precision and llama.cpp's blocks hold as exactly.
    """

    wide: bool = False

    @property
    def block(self) -> tuple[int, int]:
        return (0, 0)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> Ternary | None:
        """``ternary-tensor``, or ``ternary-tensor-sf32``."""
        return {_NAME: cls(), _WIDE: cls(True)}.get(text)

    @classmethod
    def examples(cls) -> tuple[Ternary, ...]:
        return (cls(), cls(True))

    def __str__(self) -> str:
        return _WIDE if self.wide else _NAME

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None if len(shape) == 2 else f"{self} holds matrices, not a tensor of {len(shape)} dimensions"

    def storage_bits(self, shape: tuple[int, int]) -> int:
        """Two bits a code, as every layout has it."""
        return 2 * shape[0] * shape[1] + (32 if self.wide else 16)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The mean magnitude, or the one magnitude of a weight that is ternary already; with ``importance``,
        the best of 23 scales around it in weighted error."""
        w = w.to(torch.float32)
        size = w.abs()
        mean = size.amax() if bool(((size == 0) | (size == size.amax())).all()) else size.mean()
        mean = self.stored_scale("scale", mean.reshape(1, 1))
        if importance is None:
            return {"scale": mean}
        u = weights_of(importance, w)
        tried = [self.stored_scale("scale", mean * factor) for factor in _FACTORS]
        cost = [float((((self._rounded(w, s) * s - w) ** 2) * u).sum(dtype=torch.float64)) for s in tried]
        return {"scale": tried[cost.index(min(cost))]}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        return (self._rounded(w.to(torch.float32), params["scale"]) + 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        return (codes.to(torch.float32) - 1) * params["scale"]

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def scales(self) -> tuple[str, ...]:
        return ("scale",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        values = values.clamp_min(0)
        return values if self.wide else values.to(torch.bfloat16).to(torch.float32)

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        return params["scale"].expand(1, columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        return {"scale": self.stored_scale("scale", params["scale"] * factor)}

    def affine(self, params: Params, columns: Tensor) -> Affine:
        zero = torch.zeros_like(params["scale"])
        return Affine(params["scale"], zero + 1, zero, 0, 2)

    def with_zero(self, params: Params, zero: Tensor) -> Params | None:
        return None

    def _rounded(self, w: Tensor, scale: Tensor) -> Tensor:
        """-1, 0 and 1; all 0 where the scale is."""
        return torch.where(scale > 0, w / scale, 0.0).round().clamp(-1, 1)
