"""Rounding to nearest: the plain rule, weighted by the mean square of the inputs when moments are there (what
llama.cpp calls an importance matrix)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from bitmill.core.axes import Grid, Solver
from bitmill.core.types import Problem, Solution


@final
@dataclass(frozen=True)
class Nearest(Solver):
    """Every weight by itself; the grid's own search finds the parameters."""

    needs: ClassVar[str] = "nothing"

    def refuses(self, grid: Grid) -> str | None:
        """Every grid will do."""
        return None

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def passes(self) -> int:
        """One."""
        return 1

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """The grid's own rounding of each weight."""
        return [Solution(g.round(p.weight, p.importance)) for p, g in zip(problems, grids, strict=True)]
