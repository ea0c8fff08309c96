"""Dense values: the identity grid of IEEE single, half and bfloat16 numbers, for what a recipe keeps."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, torch_dtype
from bitmill.core.types import Params, Quantized

_BITS = {"f32": 32, "f16": 16, "bf16": 16}


@final
@dataclass(frozen=True)
class Dense(Grid):
    """Every value of one floating-point type; tensors of any rank, no parameters.

    Attributes:
        dtype: ``f32``, ``f16`` or ``bf16``.
    """

    dtype: str = "f32"

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise ValueError(f"dense dtype {self.dtype!r} is not one of {', '.join(_BITS)}")

    @property
    def block(self) -> tuple[int, int]:
        return (1, 1)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> Dense | None:
        return cls(text) if text in _BITS else None

    @classmethod
    def examples(cls) -> tuple[Dense, ...]:
        return tuple(cls(name) for name in _BITS)

    def __str__(self) -> str:
        return self.dtype

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None

    def storage_bits(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * _BITS[self.dtype]

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        return {}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        """``w`` rounded to nearest even in ``dtype``; a finite value beyond its range becomes the largest
        finite one, because an infinity in a weight poisons every output it meets."""
        dtype = torch_dtype(self.dtype)
        codes = w.to(dtype)
        if dtype is torch.float32 or w.dtype == dtype:
            return codes
        largest = torch.finfo(dtype).max
        overflowed = codes.isinf() & w.isfinite()
        return torch.where(overflowed, torch.full_like(codes, largest).copysign(codes), codes)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        return codes.to(torch.float32)

    def scales(self) -> tuple[str, ...]:
        return ()

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        raise ValueError(f"{self} has no scale {name!r}")

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        shape = (w.shape[0], w.shape[1]) if w.dim() == 2 else tuple(w.shape)
        return Quantized(self, self.encode(w, {}), {}, shape)  # type: ignore[arg-type]
