"""Channels in the order of their size, so that groups of a weight's columns hold inputs that matter alike
(QServe, Lin et al., arXiv 2405.04532)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, LinearMap, Seam, Transform
from bitmill.core.types import Problem
from bitmill.numerics.linear_maps import Permutation

_ROWS = 256  # of each weight that the gain is taken on


@final
@dataclass(frozen=True)
class Reorder(Transform):
    """The inputs of ``down`` by their largest magnitude, loudest first. The rows of ``gate`` and ``up`` move
    with them, so that nothing is left for a runtime. The residual stream has one order for all its readers,
    and behind a rotation its channels are alike; groups of ``o`` would mix heads, which cannot move.

    The gain is that of plain rounding, on some rows, with channels taken as uncorrelated."""

    needs: ClassVar[str] = "diagonal"
    kind: ClassVar[str] = "permutation"

    def seams(self) -> tuple[str, ...]:
        """The inside of the gated MLP."""
        return ("mlp_order",)

    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """The permutation; ties keep their order."""
        moments = readers[0][0].moments
        if moments is None or moments.absmax is None:
            raise ValueError(f"no largest inputs for {readers[0][0].name}")
        map_ = Permutation(moments.absmax.argsort(descending=True, stable=True))
        plain = moved = 0.0
        for problem, grid in readers:
            few = problem.weight[:: -(-problem.weight.shape[0] // _ROWS)].float().contiguous()
            plain += _lost(few, grid, moments.importance)
            moved += _lost(map_.read(few), grid, map_.moments(moments).importance)
        return map_, moved / plain if plain > 0 else 1.0


def _lost(weight: Tensor, grid: Grid, importance: Tensor) -> float:
    error = grid.round(weight).dense() - weight
    return float(torch.einsum("oi,oi,i->", error, error, importance.to(error)).double())
