"""SpQR: error feedback over small groups, each fitted around its outliers, whose error is zero (Dettmers et
al., arXiv 2306.03078)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import CalibratedSolver, Grid
from bitmill.core.errors import Refused
from bitmill.core.sparse import SparseGrid
from bitmill.core.types import Moments, Note, Params, Problem, Quantized, Solution
from bitmill.numerics.factor import Factor, upper_inverse_factor
from bitmill.numerics.outliers import largest, round_apart


@final
@dataclass(frozen=True)
class Spqr(CalibratedSolver):
    """Column by column as GPTQ, a group fitted when its first column comes up, around what is apart.

    The paper calls a weight an outlier when, with its group's range fitted without it, the group's error
    falls by more than a threshold, or when its own error over ``Uⱼⱼ`` squared exceeds that in the loop. Files
    whose size is known before any weight is read need a number instead, which the grid has. So the loop runs
    twice. The first is the paper's, with the threshold that the wanted number of weights exceed as they are
    at first. The second takes exactly the wanted number, those of the largest errors in the first, leaves
    them out of every fit and adds them in half precision: they pass no error on.

    Columns go by falling ``diag(H)`` where the grid stores their order (``-act``); else its groups go by
    their largest, and inside each its columns likewise, which leaves no trace.

    Attributes:
        damp: fraction of the mean of ``diag(H)`` added to it. The authors' own recipe is 1, which hardly lets
            errors be answered: on SmolLM2 with 16 windows of text it has 1.2 times the divergence of 0.01
            on text of that kind, and 1.1 times elsewhere.
        sequential: whether a block's later weights see the errors of its earlier ones ("true sequential"),
            where memory allows; if not, every weight sees the inputs of the block as it was.
    """

    damp: float = 0.01
    sequential: bool = True

    needs: ClassVar[str] = "gram"

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp is a fraction above 0 and up to 1, not {self.damp}")

    def refuses(self, grid: Grid) -> str | None:
        """Weights must be able to stand apart."""
        if isinstance(grid, SparseGrid):
            return None
        return f"{grid} keeps no weights apart: use spqr3-g16-o1, or gptq on this grid"

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def passes(self) -> int:
        """One that finds outliers, one that knows them."""
        return 2

    @property
    def cross(self) -> bool:
        """Never."""
        return False

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """One factorization for each order of columns serves all problems; they share their input.

        Raises:
            Refused: no Gram matrix. Unsolvable: one that cannot be factored.
            ValueError: a grid that :meth:`refuses` names.
        """
        factors: dict[int, tuple[Tensor, Factor]] = {}
        solutions = []
        for problem, grid in zip(problems, grids, strict=True):
            moments = problem.moments
            if not isinstance(grid, SparseGrid):
                raise ValueError(self.refuses(grid))
            if moments is None or moments.gram is None:
                raise Refused(
                    "spqr needs the Gram matrix of the layer's input",
                    where=problem.name,
                    fix="calibrate, or use a solver that needs no calibration (nearest)",
                )
            width = 1 if grid.ordered else grid.block[1]
            if width not in factors:
                order = _order(moments.square, width)
                factors[width] = order, upper_inverse_factor(moments.gram, self.damp, problem.name, order)
            order, factor = factors[width]
            w = problem.weight.to(torch.float32)
            quantized = _placed(w, grid, order, factor, moments)
            solutions.append(Solution(quantized, _notes(problem.name, factor, self.damp)))
        return solutions


def _order(power: Tensor, width: int) -> Tensor:
    """Columns by falling power, runs of ``width`` together by their largest."""
    order = power.argsort(descending=True, stable=True)
    rank = power.reshape(-1, width).amax(1).argsort(descending=True, stable=True).argsort()
    return order[rank[order // width].argsort(stable=True)]


def _placed(w: Tensor, grid: SparseGrid, order: Tensor, factor: Factor, moments: Moments) -> Quantized:
    """Both loops, in the order of the columns, on the processor's own memory."""
    device, shape = w.device, (w.shape[0], w.shape[1])
    x, upper = w.index_select(1, order).cpu(), factor.upper.cpu()
    known = moments.importance.index_select(0, order).cpu()
    quiet = factor.damping * known.sum() / (~factor.dead).sum()  # a dead channel counts as much as damping
    importance = torch.where(factor.dead.cpu(), quiet, known)
    cost = upper.diagonal().square().reciprocal()
    count, none = grid.apart(shape), torch.zeros(shape, dtype=torch.bool)
    apart = none
    if count:
        threshold = float(grid.sensitivity(x, cost[None]).reshape(-1).topk(count).values[-1])
        apart = largest(_Loop(grid, upper, importance, cost).run(x, none, threshold).scores, count)
    found = _Loop(grid, upper, importance, cost).run(x, apart, torch.inf)
    back = order.cpu().argsort()
    width = grid.block[1]
    groups = found.groups
    if not grid.ordered:
        groups = [groups[int(back[first]) // width] for first in range(0, shape[1], width)]
    added, values = found.added[:, back], found.values[:, back]
    params = grid.joined(groups, added, order.cpu() if grid.ordered else torch.arange(shape[1]))
    codes = grid.encode(values, params)
    return Quantized(grid, codes.to(device), {k: v.to(device) for k, v in params.items()}, shape)


@dataclass(frozen=True, eq=False)
class _Found:
    """What one loop leaves, in the order of the columns.

    Attributes:
        values: as stored.
        scores: squared errors over ``Uⱼⱼ²``, had no weight been apart.
        added: to the values of codes, where a weight is apart.
        groups: parameters, group after group.
    """

    values: Tensor
    scores: Tensor
    added: Tensor
    groups: list[Params]


@dataclass(frozen=True, eq=False)
class _Loop:
    """Error feedback over groups of columns.

    Attributes:
        upper: the factor of the inverse Hessian.
        importance: what a squared error of each column counts in a fit.
        cost: what it counts once the columns behind have answered, ``1 / Uⱼⱼ²``.
    """

    grid: SparseGrid
    upper: Tensor
    importance: Tensor
    cost: Tensor

    def run(self, x: Tensor, apart: Tensor, threshold: float) -> _Found:
        """Place all columns. Below a threshold without end this is the paper's loop: plain fits, around the
        weights whose sensitivity exceeds it, and apart is whatever misses by more. Else just those ``apart``
        are, and fits are searched."""
        ahead, scores, added = x.clone(), torch.empty_like(x), torch.empty_like(x)
        groups: list[Params] = []
        width, finding = self.grid.block[1], threshold < torch.inf
        for first in range(0, x.shape[1], width):
            here = slice(first, first + width)
            now, kept = ahead[:, here].contiguous(), apart[:, here]
            if finding:
                likely = self.grid.sensitivity(now, self.cost[None, here]) > threshold
                groups.append(self.grid.fit_group(now, likely))
            else:
                groups.append(self.grid.fit_group(now, kept, self.importance[None, here]))
            levels = self.grid.values_of(groups[-1])
            errors, scores[:, here], added[:, here] = round_apart(
                now, self.upper[here, here], levels, kept, threshold
            )
            ahead[:, here] = now
            ahead[:, here.stop :].addmm_(errors, self.upper[here, here.stop :], alpha=-1)
        return _Found(ahead, scores, added, groups)


def _notes(name: str, factor: Factor, damp: float) -> tuple[Note, ...]:
    notes = []
    if factor.damping > damp:
        text = f"the Gram matrix was not positive definite with damping {damp:g}"
        notes.append(Note("damping", name, text, factor.damping))
    dead = int(factor.dead.sum())
    if dead:
        notes.append(Note("dead-channels", name, "no calibration token excited these inputs", float(dead)))
    return tuple(notes)
