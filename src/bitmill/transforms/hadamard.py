"""Random Hadamard rotations that spread outliers over all channels, in the places that SpinQuant numbers: R1
of the residual stream and R2 of every value head fold into the weights for nothing; R3 of queries and keys,
and R4 of the inputs of ``down``, stay for the runtime (QuaRot, Ashkboos et al., arXiv 2404.00456; SpinQuant,
Liu et al., arXiv 2405.16406)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from bitmill.core.axes import Grid, LinearMap, Seam
from bitmill.core.online import DOWN, OnlineTransform
from bitmill.core.types import Problem
from bitmill.numerics import hadamard
from bitmill.numerics.linear_maps import Hadamard


@final
@dataclass(frozen=True)
class HadamardRotation(OnlineTransform):
    """Random signs, then a Hadamard matrix: the largest that divides the width, on diagonal blocks of it.
    What a runtime applies has no signs, so that a fast transform serves.

    QuaRot mixes the heads of values among each other as well, while the model runs; no file asks for that.

    Attributes:
        seed: of the signs; each seam and layer draws its own.
        r1: the residual stream, from the embedding to the head.
        r2: the value heads.
        r3: queries and keys, by the runtime: for ``cache=``, which alone it changes.
        r4: the inputs of ``down``, by the runtime.
        block: the largest order for R1 and R4; 0 for no limit, 128 is usual where none is built.
    """

    seed: int = 0
    r1: bool = True
    r2: bool = True
    r3: bool = False
    r4: bool = False
    block: int = 0

    needs: ClassVar[str] = "nothing"
    kind: ClassVar[str] = "orthogonal"

    def __post_init__(self) -> None:
        if not (self.r1 or self.r2 or self.r3 or self.r4):
            raise ValueError("r1, r2, r3 and r4 are all false: nothing is rotated")
        if self.block < 0 or self.block == 1:
            raise ValueError(f"block={self.block} is no order; 0 is no limit, 128 is usual")

    def seams(self) -> tuple[str, ...]:
        """The residual stream, and every block's value heads."""
        return ("residual",) * self.r1 + ("value",) * self.r2

    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """The same map for the same seed, seam, layer and width, on every machine."""
        place = f"{self.seed}/{seam.name}/{layer}/{width}"
        generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
        signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        limit = self.block if seam.name == "residual" else 0
        return Hadamard(signs, hadamard.largest_factor(width, limit)), None

    def online(self, space: str, width: int) -> int:
        """R4 for the inputs of ``down``, R3 for keys."""
        if not (self.r4 if space == DOWN else self.r3):
            return 0
        return hadamard.largest_factor(width, self.block if space == DOWN else 0)
