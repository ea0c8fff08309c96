"""GPTQ: round column by column, and let the columns that follow make up for each error (Frantar et al.,
arXiv 2210.17323); on grids of vectors it is LDLQ (Chee et al., arXiv 2307.13304)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import AffineGrid, CalibratedSolver, Grid, LevelGrid, Points, VectorGrid
from bitmill.core.errors import Refused
from bitmill.core.types import Moments, Note, Params, Problem, Quantized, Solution
from bitmill.numerics.descent import descend
from bitmill.numerics.factor import Factor, upper_inverse_factor
from bitmill.numerics.feedback import round_block
from bitmill.numerics.points import round_points

PROBE = 3  # rows of a trial weight
ORDERS = ("act", "group", "natural")


@final
@dataclass(frozen=True)
class Gptq(CalibratedSolver):
    """Error feedback on any grid: one loop for scalars, sub-blocks and vectors.

    Parameters are fitted before the loop, from the weight as it is, so that the order of columns is free and
    leaves no trace in the file ("static groups"). Their squared errors are weighted by ``diag(H)``.
    (Weights ``1 / Uⱼⱼ²``, what an error costs once later columns have answered, look better on the
    calibration moments and are worse where it counts: on SmolLM2 at 4 bits, groups of 64, the output error on
    those moments falls by a tenth while the divergence on held-out text grows by more than that.)

    Attributes:
        damp: fraction of the mean of ``diag(H)`` added to it.
        order: how columns go. ``act``: by falling ``diag(H)``, most important first. ``group``: groups by
            their largest ``diag(H)``, and inside each its columns likewise, so that a group stays together
            ("group-aware"). ``natural``: as they are.
        refit: whether a group's parameters are fitted when its first column comes up, from the weight as the
            columns before have left it. Groups must stay together, hence not with ``act``: its groups would
            be scattered over the columns, and the file would need an index of them (``g_idx``).
        asymmetric: share of the difference between this input and the original model's that the weight makes
            up for, 0 to 1 (Li et al., "GPTAQ", arXiv 2504.02692, whose code takes 0.25). The original model
            runs along for it: twice the activations, and half as much time again. On SmolLM2's first ten
            blocks and 4,096 tokens it lowers the error of hidden states (at 4 bits by an eighth), and the
            divergence at 3 bits on text like the calibration's only: measure before you keep it.
        sequential: whether a block's later weights see the errors of its earlier ones ("true sequential"),
            where memory allows; if not, every weight sees the inputs of the block as it was.
        block: columns between two updates of all that follow.
        sweeps: coordinate descents over codes and scales that follow (:mod:`bitmill.numerics.descent`).
    """

    damp: float = 0.01
    order: str = "act"
    refit: bool = False
    asymmetric: float = 0.0
    sequential: bool = True
    block: int = 128
    sweeps: int = 0

    needs: ClassVar[str] = "gram"

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp is a fraction above 0 and up to 1, not {self.damp}")
        if self.order not in ORDERS:
            raise ValueError(f"order is {', '.join(ORDERS[:-1])} or {ORDERS[-1]}, not {self.order!r}")
        if self.refit and self.order == "act":
            raise ValueError("refit needs groups that stay together, not order=act: say order=group")
        if not 0 <= self.asymmetric <= 1:
            raise ValueError(f"asymmetric is a share from 0 to 1, not {self.asymmetric}")
        if self.block < 1:
            raise ValueError(f"block is a number of columns, not {self.block}")
        if self.sweeps < 0:
            raise ValueError(f"sweeps is a number of times, not {self.sweeps}")

    def refuses(self, grid: Grid) -> str | None:
        """Every grid will do; ``refit`` wants parameters that belong to single groups."""
        if self.refit and not _apart(grid):
            return f"{grid} has parameters that are not of one group in one row: refit=false"
        return None

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def passes(self) -> int:
        """A sweep is a pass over all columns, and one inside each block of them."""
        return 1 + 2 * self.sweeps

    @property
    def cross(self) -> bool:
        """For ``asymmetric``."""
        return self.asymmetric > 0

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """One factorization for each order of columns serves all problems; they share their input.

        Raises:
            Refused: no Gram matrix, or no cross moments. Unsolvable: one that cannot be factored.
            ValueError: a grid that :meth:`refuses` names.
        """
        bases: dict[tuple[int, int], _Basis] = {}
        solutions = []
        for problem, grid in zip(problems, grids, strict=True):
            if self.refuses(grid) is not None:
                raise ValueError(self.refuses(grid))
            moments = self._moments(problem)
            group = _group(grid, problem.weight.shape[1]) if self.order == "group" else 0
            key = (grid.span[1], group)
            if key not in bases:
                order = _order(moments.square, self.order, *key)
                bases[key] = _basis(moments, order, self.damp, problem.name)
            basis = bases[key]
            wanted = problem.weight.to(torch.float32)
            if self.cross:
                wanted = wanted + self.asymmetric * (wanted @ basis.drift(moments))
            quantized = self._place(wanted, grid, basis)
            solutions.append(Solution(quantized, _notes(problem.name, basis.factor, self.damp)))
        return solutions

    def _moments(self, problem: Problem) -> Moments:
        moments = problem.moments
        if moments is None or moments.gram is None:
            raise Refused(
                "gptq needs the Gram matrix of the layer's input",
                where=problem.name,
                fix="calibrate, or use a solver that needs no calibration (nearest, hqq)",
            )
        if self.cross and moments.cross is None:
            raise Refused(
                "gptq(asymmetric) needs to know the layer's input in the original model, too",
                where=problem.name,
                fix="calibrate with this recipe, or drop asymmetric",
            )
        return moments

    def _place(self, w: Tensor, grid: Grid, basis: _Basis) -> Quantized:
        """The loop. ``ahead`` holds the columns in the order they are placed, compensated so far."""
        upper, order = basis.factor.upper, basis.order
        params = grid.fit(w, basis.importance)
        ahead = w.index_select(1, order)
        width, columns = grid.span[1], w.shape[1]
        block = -(-self.block // width) * width
        group = _group(grid, columns) if self.refit else columns
        first = 0
        while first < columns:
            if self.refit and first % group == 0:
                params = _refitted(params, grid, ahead[:, first : first + group], basis, first)
            last = min(first + block, (first // group + 1) * group, columns)
            now, places = ahead[:, first:last].contiguous(), order[first:last]
            pivots = upper[first:last, first:last]
            errors = _round(now, pivots, grid, params, places, columns)
            ahead[:, first:last] = now
            ahead[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
            first = last
        values = ahead.index_select(1, order.argsort())
        del ahead  # as large as the weight
        if self.sweeps:
            values, params = descend(w, values, params, grid, basis.damped_gram(), self.sweeps)
        return Quantized(grid, grid.encode(values, params), params, (w.shape[0], columns))


def _order(power: Tensor, rule: str, width: int, group: int) -> Tensor:
    """Columns in the order they are placed; spans of ``width`` stay together, and groups if there are any."""
    natural = torch.arange(len(power), device=power.device)
    if rule == "natural":
        return natural
    inside = power.reshape(-1, width).sum(1).argsort(descending=True, stable=True)
    order = natural.reshape(-1, width)[inside].reshape(-1)
    if rule == "act":
        return order
    highest = power.reshape(-1, width).sum(1).reshape(-1, group // width).amax(1)
    rank = highest.argsort(descending=True, stable=True).argsort()
    return order[rank[order // group].argsort(stable=True)]


def _group(grid: Grid, columns: int) -> int:
    """Columns that share parameters; all of them where that is not a whole number of times."""
    group = grid.block[1] or columns
    return columns if columns % group else group


def _apart(grid: Grid) -> bool:
    """Whether each parameter belongs to one group of columns: those of two groups are those of each."""
    group = grid.block[1]
    if not group:
        return True
    if grid.refuses((PROBE, 2 * group)) is not None:  # rows that share parameters
        return False
    probe = torch.linspace(-1, 1, 2 * group * PROBE).reshape(PROBE, 2 * group)
    whole, half = grid.fit(probe), grid.fit(probe[:, :group].contiguous())
    return all(
        v.dim() == 2 and half[k].dim() == 2 and v.shape == (PROBE, 2 * half[k].shape[1])
        for k, v in whole.items()
    )


def _refitted(params: Params, grid: Grid, ahead: Tensor, basis: _Basis, first: int) -> Params:
    """Parameters with those of the group that comes next, fitted to the columns as they are now."""
    width = ahead.shape[1]
    places, back = basis.order[first : first + width].sort()
    at = int(places[0]) // width
    fresh = grid.fit(ahead.index_select(1, back), basis.importance[places])
    joined = {}
    for name, values in params.items():
        joined[name] = values.clone()
        each = fresh[name].shape[1]
        joined[name][:, at * each : (at + 1) * each] = fresh[name]
    return joined


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

    def drift(self, moments: Moments) -> Tensor:
        """``D``, ``in in``, of which ``W + W D`` makes up for inputs that are ``x`` and were ``x̃``.

        With the cross moment ``C = Σ (x̃ - x) xᵀ``, what column ``q`` misses is left to the columns ``F``
        placed after it: row ``q`` of ``D`` is ``C_qF H_FF⁻¹``. That depends on no code, so the paper's term
        inside the loop is one product before it.
        """
        assert moments.cross is not None
        cross = moments.cross.index_select(0, self.order).index_select(1, self.order) / self.factor.mean
        upper = self.factor.upper
        drift = (cross @ upper.T).triu(1) @ upper
        back = self.order.argsort()
        return drift.index_select(0, back).index_select(1, back)


def _basis(moments: Moments, order: Tensor, damp: float, where: str) -> _Basis:
    gram = moments.gram
    assert gram is not None
    factor = upper_inverse_factor(gram, damp, where, order)
    known = moments.importance
    quiet = factor.damping * known.sum() / (~factor.dead).sum()  # a dead channel counts as much as damping
    dead = torch.empty_like(factor.dead)
    dead[order] = factor.dead
    return _Basis(order, factor, torch.where(dead, quiet, known), gram)


def _notes(name: str, factor: Factor, damp: float) -> tuple[Note, ...]:
    notes = []
    if factor.damping > damp:
        text = f"the Gram matrix was not positive definite with damping {damp:g}"
        notes.append(Note("damping", name, text, factor.damping))
    dead = int(factor.dead.sum())
    if dead:
        notes.append(Note("dead-channels", name, "no calibration token excited these inputs", float(dead)))
    return tuple(notes)
