"""AWQ: scale up the input channels that matter before rounding, and fold the inverse into whoever writes them
(Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, LinearMap, Seam, Transform
from bitmill.core.types import Moments, Problem
from bitmill.numerics.linear_maps import Diagonal

_WIDEST = 128.0
"""Largest factor, and inverse of the smallest: what a norm's weight in half precision can take."""

_FIRST_ROWS, _FINALISTS = 24, 3


@final
@dataclass(frozen=True)
class Awq(Transform):
    """Search of a diagonal ``s = x̄ʳ / w̄¹⁻ʳ`` (or ``x̄ʳ``) for the exponent with the least output error.

    The error is exact for the rows looked at: ``tr(E H Eᵀ)`` with the Gram matrix of the input and each
    reader's own grid, fitted as it will be. All candidates meet 24 rows a reader, the best three and "no
    scaling" then ``rows``; whatever wins, the gain is never above 1. Where the block as a whole, rounded to
    nearest, does not come closer to what it was, nothing is folded in it.

    Attributes:
        grid_points: exponents tried between 0 and 1.
        duo: whether candidates that also weigh the weights' own size are tried.
        rows: output rows of each reader in the final round.
        shared: whether values that several queries share are scaled too, by one factor for all of them
            (grouped-query attention). It lowers the output error of o, and raised the divergence of SmolLM2's
            first ten blocks, where queries share by threes.
    """

    grid_points: int = 20
    duo: bool = True
    rows: int = 128
    shared: bool = False

    needs: ClassVar[str] = "gram"
    kind: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if self.grid_points < 1 or self.rows < 1:
            raise ValueError(f"{self.grid_points} exponents on {self.rows} rows leave nothing to search")

    def seams(self) -> tuple[str, ...]:
        """Every place where a diagonal folds exactly."""
        return ("attn_in", "value", "mlp_in", "mlp_mid")

    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """The diagonal and its error relative to none, at most 1."""
        moments = readers[0][0].moments
        if moments is None or moments.gram is None:
            raise ValueError(f"no Gram matrix for {readers[0][0].name}")
        identity = torch.ones(width, device=moments.square.device)
        if seam.shared[1] > 1 and not self.shared:
            return Diagonal(identity), 1.0
        few = [_Reader.of(problem, grid, min(_FIRST_ROWS, self.rows)) for problem, grid in readers]
        many = [_Reader.of(problem, grid, self.rows) for problem, grid in readers]
        candidates = [s for s in self._candidates(seam, moments, many) if bool(torch.isfinite(s).all())]
        candidates.sort(key=lambda scale: _error(scale, few, moments))
        errors = [(_error(scale, many, moments), scale) for scale in candidates[:_FINALISTS]]
        plain = _error(identity, many, moments)
        best, scale = min(errors, key=lambda pair: pair[0], default=(plain, identity))
        if not best < plain:
            return Diagonal(identity), 1.0
        return Diagonal(scale), best / plain

    def _candidates(self, seam: Seam, moments: Moments, readers: Sequence[_Reader]) -> Iterator[Tensor]:
        if moments.magnitude is None:
            raise ValueError("awq needs the mean magnitude of every input channel")
        loud = seam.tied(moments.magnitude) / max(moments.tokens, 1)
        live = loud > 0
        loud = torch.where(live, loud, loud[live].min() if bool(live.any()) else 1.0)
        size = seam.tied(torch.cat([reader.relative_size() for reader in readers]).mean(0))
        for k in range(self.grid_points + 1):
            r = k / self.grid_points
            if k > 0:
                yield _level(loud**r)
            if self.duo:
                yield _level(loud**r / (size ** (1 - r) + 1e-4))


@dataclass(frozen=True, eq=False)
class _Reader:
    """Some rows of a reader's weight, and the grid they will be stored on."""

    weight: Tensor
    grid: Grid

    @classmethod
    def of(cls, problem: Problem, grid: Grid, rows: int) -> _Reader:
        """Every n-th row, at most ``rows`` of them."""
        stride = -(-problem.weight.shape[0] // rows)
        some = problem.weight[::stride]
        if grid.refuses(tuple(some.shape)) is not None:  # rows that share parameters go together
            some = problem.weight
        return cls(some.float().contiguous(), grid)

    def relative_size(self) -> Tensor:
        """|w| relative to the largest of its block, ``rows in``; 0 in a block of zeros."""
        size = self.weight.abs()
        block = self.grid.block[1] or size.shape[1]
        if size.shape[1] % block:
            block = size.shape[1]
        blocks = size.reshape(len(size), -1, block)
        return (blocks / (blocks.amax(-1, keepdim=True) + 1e-6)).reshape(size.shape)


def _level(scale: Tensor) -> Tensor:
    """Extremes at equal distance from 1, and none beyond what half precision takes."""
    scale = scale.clamp_min(1e-8)
    return (scale / (scale.max() * scale.min()).sqrt()).clamp(1 / _WIDEST, _WIDEST)


def _error(scale: Tensor, readers: Sequence[_Reader], moments: Moments) -> float:
    """Mean output error when the readers are scaled, rounded and scaled back; infinite when it overflows."""
    assert moments.gram is not None
    importance = moments.importance / scale.square()
    total = 0.0
    for reader in readers:
        scaled = reader.weight * scale
        params = reader.grid.fit(scaled, importance)
        value = reader.grid.decode(reader.grid.encode(scaled, params), params)
        error = value / scale - reader.weight
        total += float(((error @ moments.gram) * error).sum())
    return total if total == total else float("inf")
