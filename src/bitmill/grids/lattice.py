"""Vectors of eight weights on the E8 lattice, two bits a weight: the E8P codebook of QuIP# (Tseng et al.,
arXiv 2402.04396). Made for weights that an incoherence transform has turned Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import Grid
from bitmill.core.types import Params, Quantized
from bitmill.numerics import e8
from bitmill.numerics.search import weights_of

_NAMES = ("e8p",)
_FACTORS = (0.97, 0.8, 0.88, 1.06, 1.16, 1.3, 1.5, 1.8)


@final
@dataclass(frozen=True)
class Lattice(Grid):
    """Values ``scale · point`` with one scale a row and one 16-bit point for eight neighbouring columns.

    Codes are int32 ``out in/8`` in ``0 … 65535``. Parameters: ``scale`` float32 ``out 1``; 0 for a row of
    zeros, which the lattice itself does not hold. Which 29 of the longest points complete the codebook is
    this package's own choice (:func:`bitmill.numerics.e8.patterns`), so that codes, unlike values, mean
    nothing to other readers.

    Attributes:
        codebook: ``e8p``.
    """

    codebook: str = "e8p"

    def __post_init__(self) -> None:
        if self.codebook not in _NAMES:
            raise ValueError(f"codebook {self.codebook!r} is not one of {', '.join(_NAMES)}")

    @property
    def block(self) -> tuple[int, int]:
        return (1, 0)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 8)

    @classmethod
    def parse(cls, text: str) -> Lattice | None:
        return cls(text) if text in _NAMES else None

    @classmethod
    def examples(cls) -> tuple[Lattice, ...]:
        return tuple(cls(name) for name in _NAMES)

    def __str__(self) -> str:
        return self.codebook

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        if shape[1] % 8:
            return f"{shape[1]} columns are not a multiple of 8, the length of a point of {self}"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        return 2 * shape[0] * shape[1] + 32 * shape[0]

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The scale of each row with the least squared error among eight around its root mean square; with
        ``importance``, of weighted error, followed by least squares for the codes it gives."""
        w = w.to(torch.float32)
        u = torch.ones(1, 1, device=w.device) if importance is None else weights_of(importance, w)
        start = w.square().mean(1, keepdim=True).sqrt()
        best, least = start, torch.full_like(start, torch.inf)
        for factor in _FACTORS:
            scale = start * factor
            error = (u * (self._points(w, scale) * scale - w).square()).sum(1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        if importance is None:
            return {"scale": best}
        for _ in range(3):
            points = self._points(w, best)
            power = (u * points.square()).sum(1, keepdim=True)
            scale = torch.where(power > 0, (u * points * w).sum(1, keepdim=True) / power, best)
            error = (u * (self._points(w, scale) * scale - w).square()).sum(1, keepdim=True)
            better = (error < least) & (scale > 0)
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return {"scale": best}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        """``at`` and the width of ``w`` are multiples of 8."""
        scale = params["scale"]
        x = torch.where(scale > 0, w.to(torch.float32) / scale, 0.0)
        return e8.encode(x.reshape(-1, 8)).reshape(w.shape[0], w.shape[1] // 8)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        return e8.decode(codes).reshape(codes.shape[0], -1) * params["scale"]

    def scales(self) -> tuple[str, ...]:
        return ("scale",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return values

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def _points(self, w: Tensor, scale: Tensor) -> Tensor:
        return e8.decode(self.encode(w, {"scale": scale})).reshape(w.shape)
