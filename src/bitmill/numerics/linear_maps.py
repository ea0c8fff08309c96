"""Changes of basis at a seam: the hidden row vector ``h`` becomes ``h R``, readers and writers follow.

A reader's ``W`` (``y = h Wᵀ``) becomes ``W R⁻ᵀ``, a writer's ``Rᵀ W`` (rows are its outputs). A map narrower
than the space acts on consecutive chunks of it, one a head. Rotations are computed in float64: a fold and its
inverse then cancel to float32 precision, whatever the width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import LinearMap
from bitmill.core.types import Moments
from bitmill.numerics import hadamard


@final
@dataclass(frozen=True, eq=False)
class Diagonal(LinearMap):
    """``h / scale``, channel by channel: what AWQ and SmoothQuant fold.

    Attributes:
        scale: ``width`` finite factors, none of them 0.
    """

    kind: ClassVar[str] = "diagonal"
    scale: Tensor

    def __post_init__(self) -> None:
        if self.scale.dim() != 1 or not bool(torch.isfinite(self.scale).all() and (self.scale != 0).all()):
            raise ValueError("a diagonal map needs a vector of finite factors other than 0")

    def read(self, weight: Tensor) -> Tensor:
        return weight.float() * self._over(weight.shape[-1])

    def write(self, weight: Tensor) -> Tensor:
        scale = self._over(weight.shape[0])
        return weight.float() / (scale if weight.dim() == 1 else scale[:, None])

    def undo(self, weight: Tensor) -> Tensor:
        return weight.float() / self._over(weight.shape[-1])

    def moments(self, moments: Moments) -> Moments:
        """Exact."""
        scale = self._over(moments.square.shape[0])
        size = scale.abs()
        gram, cross = (
            None if m is None else m / scale / scale[:, None] for m in (moments.gram, moments.cross)
        )
        square = moments.square / scale.square() if gram is None else gram.diagonal().clone()
        magnitude, absmax = (None if v is None else v / size for v in (moments.magnitude, moments.absmax))
        low, high = (None if v is None else v / scale for v in (moments.low, moments.high))
        if low is not None and high is not None:
            low, high = torch.minimum(low, high), torch.maximum(low, high)
        sample = None if moments.sample is None else moments.sample / scale
        return Moments(moments.tokens, square, magnitude, absmax, gram, low, high, cross, sample)

    def _over(self, width: int) -> Tensor:
        return self.scale.repeat(_chunks(width, self.scale.shape[0]))


@final
@dataclass(frozen=True, eq=False)
class SharedDiagonal(LinearMap):
    """A diagonal whose writers have one head where the readers see the same one several times in a row.

    Attributes:
        scale: the writers' factors, ``heads · head``.
        head: channels of a head.
        times: how often the readers see each.
    """

    kind: ClassVar[str] = "diagonal"
    scale: Tensor
    head: int
    times: int

    @classmethod
    def of(cls, scale: Tensor, head: int, times: int) -> SharedDiagonal:
        """From the readers' positive factors; the geometric mean of those that are one factor of a writer."""
        return cls(scale.log().reshape(-1, times, head).mean(1).exp().reshape(-1), head, times)

    def read(self, weight: Tensor) -> Tensor:
        return self._wide.read(weight)

    def write(self, weight: Tensor) -> Tensor:
        return Diagonal(self.scale).write(weight)

    def undo(self, weight: Tensor) -> Tensor:
        return self._wide.undo(weight)

    def moments(self, moments: Moments) -> Moments:
        """Exact."""
        return self._wide.moments(moments)

    @property
    def _wide(self) -> Diagonal:
        heads = self.scale.reshape(-1, 1, self.head)
        return Diagonal(heads.expand(-1, self.times, -1).reshape(-1))


@final
@dataclass(frozen=True, eq=False)
class Permutation(LinearMap):
    """``h[index]``: channel ``i`` of the new vector is channel ``index[i]`` of the old one.

    Attributes:
        index: ``width`` integers, each of ``0 … width - 1`` once.
    """

    kind: ClassVar[str] = "permutation"
    index: Tensor

    def __post_init__(self) -> None:
        if not torch.equal(self.index.sort().values, torch.arange(len(self.index), device=self.index.device)):
            raise ValueError("the index is not a permutation")

    def read(self, weight: Tensor) -> Tensor:
        return weight.float()[..., self._over(weight.shape[-1])]

    def write(self, weight: Tensor) -> Tensor:
        return weight.float()[self._over(weight.shape[0])]

    def undo(self, weight: Tensor) -> Tensor:
        return weight.float()[..., self._over(weight.shape[-1]).argsort()]

    def moments(self, moments: Moments) -> Moments:
        """Exact."""
        index = self._over(moments.square.shape[0])
        gram, cross = (None if m is None else m[index][:, index] for m in (moments.gram, moments.cross))
        known = (moments.magnitude, moments.absmax, moments.low, moments.high)
        magnitude, absmax, low, high = (None if v is None else v[index] for v in known)
        sample = None if moments.sample is None else moments.sample[:, index]
        square = moments.square[index]
        return Moments(moments.tokens, square, magnitude, absmax, gram, low, high, cross, sample)

    def _over(self, width: int) -> Tensor:
        one = len(self.index)
        starts = torch.arange(0, width, one, device=self.index.device).repeat_interleave(one)
        return starts + self.index.repeat(_chunks(width, one))


class _Rotation(LinearMap):
    """An orthogonal map: ``R⁻¹ = Rᵀ``, so readers and writers turn alike."""

    @abstractmethod
    def turn(self, rows: Tensor) -> Tensor:
        """``rows R`` in float64, ``… width``."""

    @abstractmethod
    def turn_back(self, rows: Tensor) -> Tensor:
        """``rows Rᵀ`` in float64, ``… width``."""

    def read(self, weight: Tensor) -> Tensor:
        return self.turn(weight.double()).float()

    def write(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return self.turn(weight.double()).float()
        return self.turn(weight.double().T).T.float().contiguous()

    def undo(self, weight: Tensor) -> Tensor:
        return self.turn_back(weight.double()).float()

    def moments(self, moments: Moments) -> Moments:
        """Gram, squares and sample are exact (without a Gram, squares hold for uncorrelated channels). A
        rotated channel mixes many: its magnitude and largest value are those of a Gaussian of that size."""
        gram = moments.square.diag() if moments.gram is None else moments.gram
        turned = self.turn(self.turn(gram.double()).T)
        turned = ((turned + turned.T) / 2).float()
        square = turned.diagonal().clone().clamp_min(0)
        tokens = max(moments.tokens, 1)
        deviation = (square / tokens).sqrt()
        known = Moments(
            moments.tokens,
            square,
            deviation * (tokens * math.sqrt(2 / math.pi)),
            deviation * math.sqrt(2 * math.log(tokens) + 1),
            sample=None if moments.sample is None else self.turn(moments.sample.double()).float(),
        )
        if moments.gram is None:
            return known
        cross = moments.cross
        if cross is not None:
            cross = self.turn(self.turn(cross.double()).T).T.float()
        return replace(known, gram=turned, cross=cross)


@final
@dataclass(frozen=True, eq=False)
class Hadamard(_Rotation):
    """Random signs, then a Hadamard matrix of ``order`` on each run of ``order`` channels: ``h S (I ⊗ H)``.

    Attributes:
        signs: ``width`` values ±1.
        order: divides ``width``; see :func:`bitmill.numerics.hadamard.largest_factor`.
    """

    kind: ClassVar[str] = "orthogonal"
    signs: Tensor
    order: int

    @classmethod
    def plain(cls, order: int) -> Hadamard:
        """Without signs: what a runtime applies."""
        return cls(torch.ones(order), order)

    def __post_init__(self) -> None:
        if self.signs.dim() != 1 or not bool((self.signs.abs() == 1).all()):
            raise ValueError("signs are a vector of ±1")
        if len(self.signs) % self.order or hadamard.factors(self.order) is None:
            raise ValueError(f"no Hadamard matrix of order {self.order} acts on {len(self.signs)} channels")

    def turn(self, rows: Tensor) -> Tensor:
        return hadamard.apply(rows * self._over(rows), self.order)

    def turn_back(self, rows: Tensor) -> Tensor:
        return hadamard.apply(rows, self.order, transposed=True) * self._over(rows)

    def _over(self, rows: Tensor) -> Tensor:
        return self.signs.to(rows).repeat(_chunks(rows.shape[-1], len(self.signs)))


@final
@dataclass(frozen=True, eq=False)
class Orthogonal(_Rotation):
    """Any rotation: ``h R``.

    Attributes:
        matrix: ``width width`` with orthonormal columns, best in float64.
    """

    kind: ClassVar[str] = "orthogonal"
    matrix: Tensor

    def __post_init__(self) -> None:
        wide = self.matrix.double()
        unit = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        if wide.shape != unit.shape or float((wide.T @ wide - unit).abs().max()) > 1e-4:
            raise ValueError("the matrix is not orthogonal")

    def turn(self, rows: Tensor) -> Tensor:
        return self._times(rows, self.matrix)

    def turn_back(self, rows: Tensor) -> Tensor:
        return self._times(rows, self.matrix.T)

    def _times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        width = len(matrix)
        _chunks(rows.shape[-1], width)
        return (rows.reshape(-1, width) @ matrix.to(rows)).reshape(rows.shape)


def _chunks(space: int, width: int) -> int:
    if space % width:
        raise ValueError(f"a map of width {width} does not act on a space of {space}")
    return space // width
