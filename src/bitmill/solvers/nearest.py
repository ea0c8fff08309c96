"""Round to nearest: the grid's own fit, weighted by the mean square of each input channel when it is known.

With importance this is what llama.cpp calls an imatrix, and the expected output error of uncorrelated inputs is what it
minimizes. It is the baseline that every other solver has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from bitmill.core.axes import Grid, Solver
from bitmill.core.types import Problem, Solution


@final
@dataclass(frozen=True)
class Nearest(Solver):
    """Parameters by the grid's search, codes by rounding. Needs no calibration, and uses one when it is given."""

    needs: ClassVar[str] = "nothing"

    def refuses(self, grid: Grid) -> str | None:
        return None

    def prefers(self, text: str) -> str:
        return text

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        return [
            Solution(grid.round(p.weight, None if p.moments is None else p.moments.importance))
            for p, grid in zip(problems, grids, strict=True)
        ]
