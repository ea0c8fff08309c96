"""Clipping: a narrower range than the extremes ask for, block by block, where the finer step is worth it (the
second half of AWQ, Lin et al., arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitmill.core.axes import Grid, ScalarGrid, Solver
from bitmill.core.types import Params, Problem, Quantized, Solution


@final
@dataclass(frozen=True)
class Clip(Solver):
    """The range factor of each block with the least error of the block's own part of the output.

    That error is ``e H e`` with the block's part of the Gram matrix where it is known; with the mean squares
    of the inputs alone, squared errors are weighted by those, and without anything they count alike. The
    search starts from the grid's own fit, so that no block gets worse in this measure.

    Attributes:
        shrink: the narrowest range tried, relative to the fitted one.
        points: ranges tried below the fitted one.
        qk: whether the weights of queries and keys, which meet in a product, are narrowed too; the paper's
            own code leaves them.
    """

    shrink: float = 0.5
    points: int = 10
    qk: bool = True

    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        if not 0 < self.shrink < 1 or self.points < 1:
            raise ValueError(f"no range between {self.shrink} and 1 in {self.points} steps")

    def refuses(self, grid: Grid) -> str | None:
        """Only grids of scalars have a range to narrow."""
        if isinstance(grid, ScalarGrid):
            return None
        return f"{grid} has no range to narrow; use nearest or gptq"

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def passes(self) -> int:
        """One for every range that is tried."""
        return 1 + self.points

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """Each weight by itself.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        return [Solution(self._narrowed(p, grid)) for p, grid in zip(problems, grids, strict=True)]

    def _narrowed(self, problem: Problem, grid: Grid) -> Quantized:
        if not isinstance(grid, ScalarGrid):
            raise ValueError(self.refuses(grid))
        w = problem.weight.to(torch.float32)
        start = grid.fit(w, problem.importance)
        price = _price(problem, grid.block)

        def error(params: Params) -> Tensor:
            return price(grid.decode(grid.encode(w, params), params) - w)

        least = error(start)
        factor = torch.ones_like(least)
        for k in range(1, self.points + 1):
            tried = 1 - (1 - self.shrink) * k / self.points
            cost = error(grid.scaled(start, torch.full_like(factor, tried)))
            factor = torch.where(cost < least, tried, factor)
            least = torch.minimum(cost, least)
        if not self.qk:
            factor = torch.where(_of_scores(problem, len(factor))[:, None], 1.0, factor)
        params = grid.scaled(start, factor)
        return Quantized(grid, grid.encode(w, params), params, (w.shape[0], w.shape[1]))


def _of_scores(problem: Problem, blocks: int) -> Tensor:
    """Which rows of blocks make queries or keys."""
    runs = problem.runs or ((problem.role, problem.weight.shape[0]),)
    rows = torch.cat([torch.full((height,), role in ("q", "k")) for role, height in runs])
    return rows[:: -(-len(rows) // blocks)].to(problem.weight.device)


def _price(problem: Problem, block: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The function from errors, ``out in``, to what each block of them costs, ``blocks blocks``."""
    out, columns = problem.weight.shape
    rows, width = block[0] or out, block[1] or columns
    moments = problem.moments
    short = -columns % width
    if moments is not None and moments.gram is not None:
        gram = pad(moments.gram / max(moments.tokens, 1), (0, short, 0, short))
        parts = torch.stack([gram[a : a + width, a : a + width] for a in range(0, columns, width)])
    weights = torch.ones(columns) if moments is None else moments.importance

    def price(error: Tensor) -> Tensor:
        if moments is None or moments.gram is None:
            cost = pad(error.square() * weights.to(error), (0, short)).reshape(out, -1, width).sum(-1)
        else:
            pieces = pad(error, (0, short)).reshape(out, -1, width).transpose(0, 1)
            cost = ((pieces @ parts) * pieces).sum(-1).T
        return pad(cost, (0, 0, 0, -out % rows)).reshape(-1, rows, cost.shape[1]).sum(1)

    return price
