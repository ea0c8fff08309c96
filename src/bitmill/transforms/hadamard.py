"""Random Hadamard rotations of the residual stream and of the value heads: they spread outliers over all
channels, and fold into the weights for nothing (QuaRot, Ashkboos et al., arXiv 2404.00456)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from bitmill.core.axes import Grid, LinearMap, Seam, Transform
from bitmill.core.types import Problem
from bitmill.numerics import hadamard
from bitmill.numerics.linear_maps import Hadamard


@final
@dataclass(frozen=True)
class HadamardRotation(Transform):
    """Random signs, then the largest Hadamard matrix that divides the width, on its diagonal blocks.

    Attributes:
        seed: of the signs; each seam and layer draws its own.
        value: whether the value heads turn too.
    """

    seed: int = 0
    value: bool = True

    needs: ClassVar[str] = "nothing"
    kind: ClassVar[str] = "orthogonal"

    def seams(self) -> tuple[str, ...]:
        """The residual stream, and every block's value heads."""
        return ("residual", "value") if self.value else ("residual",)

    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """The same map for the same seed, seam, layer and width, on every machine."""
        place = f"{self.seed}/{seam.name}/{layer}/{width}"
        generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
        signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        return Hadamard(signs, hadamard.largest_factor(width)), None
