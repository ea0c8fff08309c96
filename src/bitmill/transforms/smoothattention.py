"""SmoothAttention: divide loud channels of the keys and multiply those of the queries, so that a cache of few
bits holds the keys well (QServe, Lin et al., arXiv 2405.04532)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from bitmill.core.axes import Grid, LinearMap, Seam, Transform
from bitmill.core.types import Problem
from bitmill.numerics.linear_maps import Diagonal

_SMALLEST, _LARGEST = 1e-4, 1e4  # of a factor


@final
@dataclass(frozen=True)
class SmoothAttention(Transform):
    """The diagonal ``max|k|ᵅ`` of the keys behind their rotation by position, where the two channels that it
    turns into one another share a factor.

    The gain is expected of products with queries whose channels are of one size, keys rounded by the largest
    of a head.

    Attributes:
        alpha: how much moves from keys to queries, 0 to 1.
    """

    alpha: float = 0.5

    needs: ClassVar[str] = "diagonal"
    kind: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, float | int) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha {self.alpha!r} is not between 0 and 1")

    def seams(self) -> tuple[str, ...]:
        """Between keys and queries."""
        return ("key",)

    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """The factors of all heads, ``heads · width``; ``width`` is a head's, and the moments of the one
        reader are those of the keys."""
        moments = readers[0][0].moments
        if moments is None or moments.absmax is None:
            raise ValueError(f"no largest keys for {readers[0][0].name}")
        loud = moments.absmax.float().reshape(-1, 2, width // 2)
        pairs = loud.amax(1, keepdim=True).clamp_min(_SMALLEST)
        scale = pairs.pow(self.alpha).clamp(_SMALLEST, _LARGEST).expand_as(loud).flatten(1)
        heads = loud.flatten(1)
        before = heads.amax(-1).square().sum()
        after = ((heads / scale).amax(-1).square() * scale.square().mean(-1)).sum()
        return Diagonal(scale.flatten()), float(after / before.clamp_min(1e-30))
