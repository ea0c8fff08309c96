"""SmoothQuant: divide loud input channels and multiply their weights, so that both round well
(Xiao et al., arXiv 2211.10438)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, LinearMap, Seam, Transform
from bitmill.core.inputs import InputGrid
from bitmill.core.types import Moments, Problem
from bitmill.numerics.inputs import fixed_params, rounded
from bitmill.numerics.linear_maps import Diagonal

_SMALLEST = 1e-5  # of a channel's largest input or weight, as in the authors' code
_WIDEST = 1e4  # of a factor and its inverse: what a norm's weight in half precision can take
_TINY = 1e-30  # an output's square, at least
_FAR = 5  # steps between 0 and 1 that a search starts with


@final
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """The diagonal ``s = max|x|ᵅ / max|w|¹⁻ᵅ``, over all weights that read the channel.

    With ``alpha=auto`` each seam takes what has the least output error, "no scaling" among the candidates:
    that of a sample of its inputs, against some rows of its weights, both rounded as the recipe says, each
    token's error taken relative to its output. Besides the paper's extremes it tries what is usual in place
    of them, inputs taken relative to their token's size: a few tokens of a Llama-like model are a thousand
    times as loud as the rest, and would set every factor. Without ``input=`` in the recipe only weights are
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
        sample = moments.sample
        readings = [_Reading.of(self._sample(p.weight), p.inputs, grid, sample) for p, grid in readers]

        def error(scale: Tensor) -> float:
            return _error(scale, readings, moments)

        heavy = torch.stack([problem.weight.abs().amax(0) for problem, _ in readers]).amax(0)
        plain = error(torch.ones_like(heavy))
        if self.alpha != "auto":
            scale = smoothing(moments.absmax, heavy, float(self.alpha))
            return Diagonal(scale), error(scale) / max(plain, _TINY)
        usual = torch.cat([reading.weight for reading in readings]).square().mean(0).sqrt()
        relative = sample / sample.square().mean(1, True).sqrt().clamp_min(_TINY)
        sizes = [
            (moments.absmax, heavy),
            (relative.square().mean(0).sqrt(), usual),
            (relative.abs().amax(0), usual),
        ]
        best, scale = self._search(sizes, error)
        if best >= plain:
            return Diagonal(torch.ones_like(heavy)), 1.0
        return Diagonal(scale), best / max(plain, _TINY)

    def _search(
        self, sizes: Sequence[tuple[Tensor, Tensor]], error: Callable[[Tensor], float]
    ) -> tuple[float, Tensor]:
        """Least error and its factors: exponents far apart for all sizes, then those next to the best."""
        last, step = self.grid_points, max(1, self.grid_points // _FAR)

        def tried(loud: Tensor, heavy: Tensor, k: int) -> tuple[float, Tensor, int]:
            scale = smoothing(loud, heavy, k / last)
            return error(scale), scale, k

        found = [(*tried(*pair, k), pair) for pair in sizes for k in range(0, last + 1, step)]
        best, scale, near, pair = min(found, key=itemgetter(0))
        around = range(max(near - step + 1, 0), min(near + step, last + 1))
        finer = [tried(*pair, k) for k in around if k != near]
        return min([(best, scale), *((e, s) for e, s, _ in finer)], key=itemgetter(0))

    def _sample(self, weight: Tensor) -> Tensor:
        """Every n-th row, at most :attr:`rows` of them."""
        return weight[:: -(-weight.shape[0] // self.rows)].float().contiguous()


def smoothing(loud: Tensor, heavy: Tensor, alpha: float) -> Tensor:
    """The factors of the paper, from the largest input and weight of each channel (both ``in``)."""
    loud, heavy = loud.clamp_min(_SMALLEST), heavy.clamp_min(_SMALLEST)
    return (loud**alpha / heavy ** (1 - alpha)).clamp(1 / _WIDEST, _WIDEST)


@dataclass(frozen=True, eq=False)
class _Reading:
    """Some rows of a weight that reads the channels, and what they make of the sample.

    Attributes:
        weight: ``rows in``.
        inputs: how its inputs are rounded, if they are.
        grid: its own.
        wanted: its outputs, ``n rows``.
        size: their squares' sum for each token, ``n``.
    """

    weight: Tensor
    inputs: InputGrid | None
    grid: Grid
    wanted: Tensor
    size: Tensor

    @classmethod
    def of(cls, weight: Tensor, inputs: InputGrid | None, grid: Grid, sample: Tensor) -> _Reading:
        """``sample`` is ``n in``."""
        wanted = sample @ weight.T
        return cls(weight, inputs, grid, wanted, wanted.square().sum(1).clamp_min(_TINY))


def _error(scale: Tensor, readings: Sequence[_Reading], moments: Moments) -> float:
    """Squared error of the readers' outputs relative to their squares, over the sample, when both sides are
    scaled and rounded."""
    assert moments.sample is not None and moments.absmax is not None
    smooth, total = moments.sample / scale, 0.0
    peak = (moments.absmax / scale).max()
    for reading in readings:
        seen = smooth
        if reading.inputs is not None:
            fixed = fixed_params(reading.inputs, -peak, peak, torch.float32)
            seen = rounded(reading.inputs, smooth[:, None], fixed)[:, 0]
        error = seen @ reading.grid.round(reading.weight * scale).dense().T - reading.wanted
        total += float((error.square().sum(1) / reading.size).mean())
    return total if math.isfinite(total) else math.inf
