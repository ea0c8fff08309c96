"""Vectors as a length in half precision and a direction on fixed levels: what TurboQuant stores, and the
signs of a random sketch that QJL stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import pi, sqrt

import torch
from torch import Tensor

from bitmill.core.caches import Direct, Fields
from bitmill.numerics.bits import pack, packed_words, unpack
from bitmill.numerics.cache_bases import random_basis, sketch
from bitmill.numerics.lloyd_max import sphere_levels

_HALF_MAX = torch.finfo(torch.float16).max


def half(values: Tensor) -> Tensor:
    """In half precision; what is beyond its range takes its largest."""
    return values.clamp(-_HALF_MAX, _HALF_MAX).to(torch.float16)


@dataclass(frozen=True)
class Signs:
    """Signs of ``rows`` random projections of ``width`` numbers, and their length: products with any vector
    are unbiased (Zandieh et al., QJL, arXiv 2406.03482)."""

    rows: int
    width: int
    seed: int

    @property
    def fields(self) -> Fields:
        """What is stored of one vector."""
        return {
            "signs": (torch.uint8, (packed_words(self.rows, 1, 8),)),
            "size": (torch.float16, (1,)),
        }

    @property
    def basis(self) -> Tensor:
        """The projections, ``rows width`` float32."""
        return sketch(self.rows, self.width, self.seed)

    def pack(self, x: Tensor) -> dict[str, Tensor]:
        """Of ``… width`` float32."""
        signs = (x @ self.basis.to(x.device).mT) > 0
        return {"signs": pack(signs.to(torch.uint8), 1, 8), "size": half(x.norm(dim=-1, keepdim=True))}

    def unpack(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Coordinates in :attr:`basis`, ``… rows`` float32."""
        signs = unpack(fields["signs"], 1, self.rows).to(torch.float32).mul_(2).sub_(1)
        return signs * (fields["size"].to(torch.float32) * (sqrt(pi / 2) / self.rows))

    @property
    def direct(self) -> tuple[Direct, ...]:
        """The same for compiled loops."""
        levels = torch.tensor((-1.0, 1.0)) * (sqrt(pi / 2) / self.rows)
        return (Direct("signs", "size", "", 1, levels, self.rows, 0, self.rows),)


@dataclass(frozen=True)
class Sphere:
    """A vector of ``width`` numbers behind a random rotation: its length, and for each coordinate of its
    direction the nearest of the levels that are best for a coordinate of a random direction.

    Attributes:
        bits: of a coordinate; 0 stores nothing.
        corrected: store the length divided by that of the rounded direction, so that lengths are kept.
        residual: one of the bits is the sign of a random projection of what the others leave.
    """

    width: int
    bits: int
    seed: int
    corrected: bool = False
    residual: bool = False

    @property
    def _coarse(self) -> int:
        return self.bits - self.residual

    @property
    def _signs(self) -> Signs:
        return Signs(self.width, self.width, self.seed + 1)

    @property
    def fields(self) -> Fields:
        """What is stored of one vector."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self._coarse:
            found["codes"] = (torch.uint8, (packed_words(self.width, self._coarse, 8),))
            found["length"] = (torch.float16, (1,))
        return {**found, **self._signs.fields} if self.residual else found

    @property
    def basis(self) -> Tensor:
        """``coordinates width`` float32: the rotation, and the projections of a residual below it."""
        rotation = random_basis(self.width, self.seed)
        parts = [rotation] if self._coarse else []
        if self.residual:
            parts.append(self._signs.basis @ rotation)
        return torch.cat(parts)

    def _levels(self, device: torch.device) -> Tensor:
        return torch.from_numpy(sphere_levels(self.width, self._coarse)).to(device, torch.float32)

    def pack(self, x: Tensor) -> dict[str, Tensor]:
        """Of ``… width`` float32."""
        turned = x @ random_basis(self.width, self.seed).to(x.device).mT
        found: dict[str, Tensor] = {}
        if self._coarse:
            levels = self._levels(x.device)
            length = turned.norm(dim=-1, keepdim=True)
            unit = turned / length.clamp_min(torch.finfo(torch.float32).tiny)
            codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
            if self.corrected:
                length = length / levels[codes].norm(dim=-1, keepdim=True)
            found = {"codes": pack(codes.to(torch.uint8), self._coarse, 8), "length": half(length)}
            turned = turned - self._rounded(found)
        return {**found, **self._signs.pack(turned)} if self.residual else found

    def unpack(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Coordinates in :attr:`basis`, float32."""
        parts = [self._rounded(fields)] if self._coarse else []
        if self.residual:
            parts.append(self._signs.unpack(fields))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    @property
    def direct(self) -> tuple[Direct, ...]:
        """The same for compiled loops."""
        levels = self._levels(torch.device("cpu"))
        own = Direct("codes", "length", "", self._coarse, levels, self.width, 0, self.width)
        coarse = (own,) if self._coarse else ()
        if not self.residual:
            return coarse
        return (*coarse, *(replace(part, first=self.width * len(coarse)) for part in self._signs.direct))

    def _rounded(self, fields: Mapping[str, Tensor]) -> Tensor:
        codes = unpack(fields["codes"], self._coarse, self.width)
        levels = self._levels(codes.device)
        return levels[codes.to(torch.int32)] * fields["length"].to(torch.float32)
