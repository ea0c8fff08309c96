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
from bitmill.core.inputs import InputGrid
from bitmill.core.types import Moments, Problem
from bitmill.numerics.floats import ELEMENTS
from bitmill.numerics.linear_maps import Diagonal

_SMALLEST = 1e-5  # of a channel's largest input or weight, as in the authors' code
_WIDEST = 1e4  # of a factor and its inverse: what a norm's weight in half precision can take
_EIGHTH = 105  # mean of the eighth power of a standard normal number
_RELATIVE = 0.045  # mean of (rounding error / value)² for a float without mantissa bits; 4 times less a bit


@final
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """The diagonal ``s = max|x|ᵅ / max|w|¹⁻ᵅ``, over all weights that read the channel.

    With ``alpha=auto`` each seam takes the exponent with the least expected output error, "no scaling" among
    the candidates. The expectation is a model, from each channel's mean square and largest value alone: the
    weights' part is that of plain rounding, on some rows, with channels taken as uncorrelated; the inputs'
    part takes rounding errors as uniform and independent, and as a token's largest value the eighth root of
    the sum of all channels' eighth powers, were they Gaussian. Without ``input=`` in the recipe the inputs'
    part is nothing, and scaling has little to win.

    Attributes:
        alpha: how much moves from inputs to weights, 0 to 1, or ``auto``.
        inner: also where the norms do not write: the inputs of o and down (as QServe smooths outputs).
        norms: where the norms write; without, ``inner`` alone, for a stream that is rotated already.
        grid_points: steps between 0 and 1 that ``auto`` tries.
        rows: of each weight that the expected error is taken on.
    """

    alpha: float | str = 0.5
    inner: bool = False
    grid_points: int = 20
    rows: int = 64
    norms: bool = True

    needs: ClassVar[str] = "diagonal"
    kind: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if not (self.norms or self.inner):
            raise ValueError("norms=false leaves nothing but inner=true")
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
        """The diagonal and its expected error relative to none; at most 1 with ``auto``."""
        moments = readers[0][0].moments
        if moments is None or moments.absmax is None:
            raise ValueError(f"no largest inputs for {readers[0][0].name}")
        loud = moments.absmax
        heavy = torch.stack([problem.weight.abs().amax(0) for problem, _ in readers]).amax(0)
        few = [(Problem(p.name, p.role, self._sample(p.weight), moments, p.inputs), g) for p, g in readers]
        plain = _expected(torch.ones_like(loud), few, moments)
        if self.alpha != "auto":
            scale = smoothing(loud, heavy, float(self.alpha))
            return Diagonal(scale), _expected(scale, few, moments) / max(plain, 1e-30)
        best, scale = plain, torch.ones_like(loud)
        for k in range(self.grid_points + 1):
            candidate = smoothing(loud, heavy, k / self.grid_points)
            error = _expected(candidate, few, moments)
            if error < best:
                best, scale = error, candidate
        return Diagonal(scale), best / max(plain, 1e-30)

    def _sample(self, weight: Tensor) -> Tensor:
        """Every n-th row, at most :attr:`rows` of them."""
        return weight[:: -(-weight.shape[0] // self.rows)].float().contiguous()


def smoothing(loud: Tensor, heavy: Tensor, alpha: float) -> Tensor:
    """The factors of the paper, from the largest input and weight of each channel (both ``in``)."""
    loud, heavy = loud.clamp_min(_SMALLEST), heavy.clamp_min(_SMALLEST)
    return (loud**alpha / heavy ** (1 - alpha)).clamp(1 / _WIDEST, _WIDEST)


def _expected(scale: Tensor, readers: Sequence[tuple[Problem, Grid]], moments: Moments) -> float:
    """Expected squared error of the readers' outputs, a token, when both sides are scaled and rounded."""
    square = moments.importance / scale.square()
    total = 0.0
    for problem, grid in readers:
        scaled = problem.weight * scale
        value = grid.round(scaled).dense()
        total += float(((value - scaled).square() @ square).sum())
        if problem.inputs is not None and moments.absmax is not None:
            total += float((value.square() @ _noise(problem.inputs, square, moments.absmax / scale)).sum())
    return total if math.isfinite(total) else math.inf


def _noise(inputs: InputGrid, square: Tensor, absmax: Tensor) -> Tensor:
    """Expected squared rounding error of each input channel (``in``), from its mean square and its largest
    value. No error exceeds the value itself: what is far below a step becomes 0."""
    if inputs.extent == "tensor":
        peak = absmax.max()
    else:
        groups = square.reshape(-1, inputs.group or len(square)).double()
        largest = (_EIGHTH * groups.pow(4).sum(1, keepdim=True)) ** 0.125
        peak = largest.float().expand_as(groups).reshape(-1)
    if inputs.element == "int":
        step = peak / ((2**inputs.bits - 1) / 2)
        return torch.minimum(step.square() / 12, square)
    element = ELEMENTS[inputs.element]
    step = peak / element.largest * 2.0 ** (element.lowest - element.mantissa)
    return torch.minimum(torch.maximum(square * _RELATIVE / 4**element.mantissa, step.square() / 12), square)
