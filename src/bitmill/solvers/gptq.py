"""GPTQ: round column by column, and let the columns that follow make up for each error (Frantar et al.,
arXiv 2210.17323); on grids of vectors it is LDLQ (Chee et al., arXiv 2307.13304)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import AffineGrid, Grid, LevelGrid, Points, Solver, VectorGrid
from bitmill.core.errors import Refused
from bitmill.core.types import Moments, Note, Params, Problem, Quantized, Solution
from bitmill.numerics.descent import descend
from bitmill.numerics.factor import Factor, upper_inverse_factor
from bitmill.numerics.feedback import round_block
from bitmill.numerics.points import round_points


@final
@dataclass(frozen=True)
class Gptq(Solver):
    """Error feedback on any grid: one loop for scalars, sub-blocks and vectors.

    Parameters are fitted before the loop, from the weight as it is, so that the order of columns is free and
    leaves no trace in the file ("static groups"). Their squared errors are weighted by ``diag(H)``.
    (Weights ``1 / Uⱼⱼ²``, what an error costs once later columns have answered, look better on the
    calibration moments and are worse where it counts: on SmolLM2 at 4 bits, groups of 64, the output error on
    those moments falls by a tenth while the divergence on held-out text grows by more than that.)

    Attributes:
        damp: fraction of the mean of ``diag(H)`` added to it.
        act_order: whether columns go by falling ``diag(H)``, most important first.
        block: columns between two updates of all that follow.
        sweeps: coordinate descents over codes and scales that follow (:mod:`bitmill.numerics.descent`).
    """

    damp: float = 0.01
    act_order: bool = True
    block: int = 128
    sweeps: int = 0

    needs: ClassVar[str] = "gram"

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp is a fraction above 0 and up to 1, not {self.damp}")
        if self.block < 1:
            raise ValueError(f"block is a number of columns, not {self.block}")
        if self.sweeps < 0:
            raise ValueError(f"sweeps is a number of times, not {self.sweeps}")

    def refuses(self, grid: Grid) -> str | None:
        """Every grid will do."""
        return None

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def passes(self) -> int:
        """A sweep is a pass over all columns, and one inside each block of them."""
        return 1 + 2 * self.sweeps

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """One factorization for each width of vector serves all problems; they share their input.

        Raises:
            Refused: no Gram matrix. Unsolvable: one that cannot be factored.
        """
        bases: dict[int, _Basis] = {}
        solutions = []
        for problem, grid in zip(problems, grids, strict=True):
            width = grid.span[1]
            if width not in bases:
                bases[width] = _basis(_gram(problem), width, self.damp, self.act_order, problem.name)
            basis = bases[width]
            quantized = self._place(problem.weight.to(torch.float32), grid, basis)
            solutions.append(Solution(quantized, _notes(problem.name, basis.factor, self.damp)))
        return solutions

    def _place(self, w: Tensor, grid: Grid, basis: _Basis) -> Quantized:
        """The loop. ``ahead`` holds the columns in the order they are placed, compensated so far."""
        upper, order = basis.factor.upper, basis.order
        params = grid.fit(w, basis.importance)
        ahead = w.index_select(1, order)
        width = grid.span[1]
        block = -(-self.block // width) * width
        for first in range(0, w.shape[1], block):
            last = min(first + block, w.shape[1])
            now, columns = ahead[:, first:last].contiguous(), order[first:last]
            pivots = upper[first:last, first:last]
            errors = _round(now, pivots, grid, params, columns, w.shape[1])
            ahead[:, first:last] = now
            ahead[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
        values = ahead.index_select(1, order.argsort())
        del ahead  # as large as the weight
        if self.sweeps:
            values, params = descend(w, values, params, grid, basis.damped_gram(), self.sweeps)
        return Quantized(grid, grid.encode(values, params), params, (w.shape[0], w.shape[1]))


def _round(x: Tensor, upper: Tensor, grid: Grid, params: Params, columns: Tensor, whole: int) -> Tensor:
    """Put a block of the ``whole`` columns on the grid by the loop that suits it; see :func:`round_spans`."""
    if x.is_cuda:
        return round_spans(x, upper, grid, params, columns)
    if isinstance(grid, AffineGrid):
        return round_block(x, upper, grid.affine(params, columns))
    if isinstance(grid, LevelGrid):
        return round_block(x, upper, grid.levels_of(params, columns, len(x)))
    if isinstance(grid, VectorGrid):
        return round_points(x, upper, _points_of(grid, params, columns, whole))
    return round_spans(x, upper, grid, params, columns)


def _points_of(grid: VectorGrid, params: Params, columns: Tensor, whole: int) -> Points:
    """Points of columns whose spans come in any order."""
    spans = columns[:: grid.span[1]] // grid.span[1]
    points = grid.points_of(params, 0, whole)
    return replace(points, step=points.step[:, spans], shift=points.shift[:, spans])


def round_spans(x: Tensor, upper: Tensor, grid: Grid, params: Params, columns: Tensor) -> Tensor:
    """Put a block of columns on any grid, one span at a time; see
    :func:`bitmill.numerics.feedback.round_block`, which does the same for values it is told.

    Args:
        columns: place of each column of ``x`` in the tensor; those of a span are neighbours.
    """
    errors, width = torch.empty_like(x), grid.span[1]
    for first in range(0, x.shape[1], width):
        last, at = first + width, int(columns[first])
        now, pivot = x[:, first:last], upper[first:last, first:last]
        value = grid.decode(grid.encode(now, params, at), params, at)
        if width == 1:
            error = (now - value) / pivot[0, 0]
        else:
            error = torch.linalg.solve_triangular(pivot, now - value, upper=True, left=False)
        x[:, first:last] = value
        errors[:, first:last] = error
        for j in range(width):
            x[:, last:] -= error[:, j : j + 1] * upper[first + j, last:]
    return errors


@dataclass(frozen=True, eq=False)
class _Basis:
    """What all weights of one input share: the order of columns, the factor in that order, and the
    weight of each column's squared error in natural order."""

    order: Tensor
    factor: Factor
    importance: Tensor
    gram: Tensor

    def damped_gram(self) -> Tensor:
        """The matrix that the factor is of, in natural order; made on demand, since it is a second Gram."""
        damped = self.gram.clone()
        live = (~self.factor.dead).sum()
        damped.diagonal().add_(self.factor.damping * self.gram.diagonal().sum() / live)
        return damped


def _basis(moments: Moments, width: int, damp: float, act_order: bool, where: str) -> _Basis:
    gram = moments.gram
    assert gram is not None
    order = torch.arange(len(gram), device=gram.device)
    if act_order:
        weight = gram.diagonal().reshape(-1, width).sum(1)
        order = order.reshape(-1, width)[weight.argsort(descending=True, stable=True)].reshape(-1)
    factor = upper_inverse_factor(gram, damp, where, order)
    known = moments.importance
    quiet = factor.damping * known.sum() / (~factor.dead).sum()  # a dead channel counts as much as damping
    dead = torch.empty_like(factor.dead)
    dead[order] = factor.dead
    return _Basis(order, factor, torch.where(dead, quiet, known), gram)


def _gram(problem: Problem) -> Moments:
    moments = problem.moments
    if moments is None or moments.gram is None:
        raise Refused(
            "gptq needs the Gram matrix of the layer's input",
            where=problem.name,
            fix="calibrate, or use a solver that needs no calibration (nearest, hqq)",
        )
    return moments


def _notes(name: str, factor: Factor, damp: float) -> tuple[Note, ...]:
    notes = []
    if factor.damping > damp:
        text = f"the Gram matrix was not positive definite with damping {damp:g}"
        notes.append(Note("damping", name, text, factor.damping))
    dead = int(factor.dead.sum())
    if dead:
        notes.append(Note("dead-channels", name, "no calibration token excited these inputs", float(dead)))
    return tuple(notes)
