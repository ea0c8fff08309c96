"""One grid for every linear weight of the blocks; embeddings, head, norms and routers stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bitmill.core.axes import Allocation, Choice, Weight

PLACED = frozenset({"q", "k", "v", "o", "gate", "up", "down", "linear"})
"""Roles that take the grid. A router decides which experts run: it is small and never quantized."""


@final
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same grid everywhere.

    Attributes:
        grid: its text.
    """

    grid: str = "int4-g128-sym"

    def choose(self, weight: Weight) -> Choice | None:
        return Choice(self.grid, "uniform") if weight.role in PLACED else None
