"""SmoothQuant: divide loud input channels and multiply their weights, so that both round well
(Xiao et al., arXiv 2211.10438)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, LinearMap, Seam, Transform
from bitmill.core.types import Moments, Problem
from bitmill.numerics.inputs import fixed_params, rounded
from bitmill.numerics.linear_maps import Diagonal

_SMALLEST = 1e-5  # of a channel's largest input or weight, as in the authors' code
_WIDEST = 1e4  # of a factor and its inverse: what a norm's weight in half precision can take
_TINY = 1e-30  # an output's square, at least


@final
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """The diagonal ``s = max|x|ᵅ / max|w|¹⁻ᵅ``, over all weights that read the channel.

    With ``alpha=auto`` each seam takes the exponent with the least output error, "no scaling" among the
    candidates: that of a sample of its inputs, against some rows of its weights, both rounded as the recipe
    says, each token's error taken relative to its output. Without ``input=`` in the recipe only weights are
    rounded, and scaling has little to win.

    Attributes:
        alpha: how much moves from inputs to weights, 0 to 1 (the paper has 0.5), or ``auto``.
        inner: also where the norms do not write: the inputs of o and down (as QServe smooths outputs); the
            paper leaves these.
        norms: where the norms write; without, ``inner`` alone, for a stream that is rotated already.
        grid_points: steps between 0 and 1 that ``auto`` tries.
        rows: of each weight that the error is taken on.
    """

    alpha: float | str = "auto"
    inner: bool = True
    grid_points: int = 20
    rows: int = 64
    norms: bool = True

    needs: ClassVar[str] = "diagonal"
    kind: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if not (self.norms or self.inner):
            raise ValueError("norms=false and inner=false leave nothing")
        if self.alpha != "auto" and not (isinstance(self.alpha, float | int) and 0 <= self.alpha <= 1):
            raise ValueError(f"alpha {self.alpha!r} is neither between 0 and 1 nor auto")
        if self.grid_points < 1 or self.rows < 1:
            raise ValueError(f"{self.grid_points} exponents on {self.rows} rows leave nothing to search")

    def seams(self) -> tuple[str, ...]:
        """Behind the norms; with ``inner``, wherever a diagonal folds exactly."""
        wanted = (
            ("attn_in", self.norms),
            ("value", self.inner),
            ("mlp_in", self.norms),
            ("mlp_mid", self.inner),
        )
        return tuple(name for name, asked in wanted if asked)

    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """The diagonal and the error with it relative to that with none; at most 1 with ``auto``."""
        moments = readers[0][0].moments
        if moments is None or moments.absmax is None or moments.sample is None:
            raise ValueError(f"no inputs of {readers[0][0].name} to go by")
        loud = moments.absmax
        heavy = torch.stack([problem.weight.abs().amax(0) for problem, _ in readers]).amax(0)
        few = [(Problem(p.name, p.role, self._sample(p.weight), moments, p.inputs), g) for p, g in readers]
        plain = _error(torch.ones_like(loud), few, moments)
        if self.alpha != "auto":
            scale = smoothing(loud, heavy, float(self.alpha))
            return Diagonal(scale), _error(scale, few, moments) / max(plain, _TINY)
        best, scale = plain, torch.ones_like(loud)
        for k in range(self.grid_points + 1):
            candidate = smoothing(loud, heavy, k / self.grid_points)
            error = _error(candidate, few, moments)
            if error < best:
                best, scale = error, candidate
        return Diagonal(scale), best / max(plain, _TINY)

    def _sample(self, weight: Tensor) -> Tensor:
        """Every n-th row, at most :attr:`rows` of them."""
        return weight[:: -(-weight.shape[0] // self.rows)].float().contiguous()


def smoothing(loud: Tensor, heavy: Tensor, alpha: float) -> Tensor:
    """The factors of the paper, from the largest input and weight of each channel (both ``in``)."""
    loud, heavy = loud.clamp_min(_SMALLEST), heavy.clamp_min(_SMALLEST)
    return (loud**alpha / heavy ** (1 - alpha)).clamp(1 / _WIDEST, _WIDEST)


def _error(scale: Tensor, readers: Sequence[tuple[Problem, Grid]], moments: Moments) -> float:
    """Squared error of the readers' outputs relative to their squares, over the sample, when both sides are
    scaled and rounded."""
    assert moments.sample is not None and moments.absmax is not None
    x, total = moments.sample, 0.0
    peak = (moments.absmax / scale).max()
    for problem, grid in readers:
        inputs, smooth = problem.inputs, x / scale
        if inputs is not None:
            fixed = fixed_params(inputs, -peak, peak, torch.float32)
            smooth = rounded(inputs, smooth[:, None], fixed)[:, 0]
        wanted = x @ problem.weight.T
        error = smooth @ grid.round(problem.weight * scale).dense().T - wanted
        total += float((error.square().sum(1) / wanted.square().sum(1).clamp_min(_TINY)).mean())
    return total if math.isfinite(total) else math.inf
