"""LLM.int8()'s weights: 8-bit integers, symmetric about 0, times the largest magnitude of their row (Dettmers
et al., arXiv 2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import ScalarGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.llm_int8 import LEVELS, decode, encode
from bitmill.numerics.search import weights_of

_NAME = "llm-int8"
_FACTORS = (1.0, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8)
_CHUNK = 1 << 18  # weights at a time


@final
@dataclass(frozen=True)
class LlmInt8(ScalarGrid):
    """Values ``code · absmax / 127`` for codes ``-127 … 127``.

    Codes are int8 ``out in``. Parameters: ``absmax`` float32 ``out 1``. Unlike ``int8-channel-sym``, whose
    256 codes reach one step further below 0 than above, both ends are values, and a row's scale is stored in
    single precision. Only weights: the runtime rounds the activations, and keeps loud ones out of it
    (:func:`bitmill.numerics.llm_int8.matmul`). Its owner decodes by two products, code by magnitude by 1/127,
    which no single step reproduces to the last bit: hence no :class:`AffineGrid`.
    """

    @property
    def block(self) -> tuple[int, int]:
        return (1, 0)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> LlmInt8 | None:
        """``llm-int8``."""
        return cls() if text == _NAME else None

    @classmethod
    def examples(cls) -> tuple[LlmInt8, ...]:
        return (cls(),)

    def __str__(self) -> str:
        return _NAME

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None if len(shape) == 2 else f"{self} holds matrices, not a tensor of {len(shape)} dimensions"

    def storage_bits(self, shape: tuple[int, int]) -> int:
        return shape[0] * (8 * shape[1] + 32)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The largest magnitude of each row; with ``importance``, the best of ten down to 0.8 of it in
        weighted error."""
        w = w.to(torch.float32)
        absmax = w.abs().amax(1, keepdim=True)
        if importance is None:
            return {"absmax": absmax}
        u = weights_of(importance, w)
        rows = max(1, _CHUNK // w.shape[1])
        spans = [slice(a, a + rows) for a in range(0, len(w), rows)]
        return {"absmax": torch.cat([_best(w[s], u[s] if len(u) > 1 else u, absmax[s]) for s in spans])}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        return encode(w.to(torch.float32), params["absmax"])

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        return decode(codes, params["absmax"])

    def scales(self) -> tuple[str, ...]:
        return ("absmax",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return values.clamp(min=0)

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        return (params["absmax"] / LEVELS).expand(-1, columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        return {"absmax": params["absmax"] * factor}


def _best(w: Tensor, u: Tensor, absmax: Tensor) -> Tensor:
    least = torch.full_like(absmax, torch.inf)
    best = absmax
    for factor in _FACTORS:
        tried = absmax * factor
        cost = decode(encode(w, tried), tried).sub_(w).square_().mul_(u).sum(1, keepdim=True)
        best, least = torch.where(cost < least, tried, best), torch.minimum(cost, least)
    return best
