"""One grid for every linear weight of a block; embedding, head and norms stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from bitmill.core.axes import Allocation, Choice, Weight

LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down", "linear"})


@final
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same grid everywhere.

    Attributes:
        grid: its text.
        keep: roles that stay dense after all.
    """

    grid: str
    keep: tuple[str, ...] = ()

    def choose(self, weight: Weight) -> Choice | None:
        """The grid for a linear weight of a block; None outside the blocks and for what is kept."""
        linear = weight.role in LINEAR and weight.layer is not None
        return Choice(self.grid, "as the recipe says") if linear and weight.role not in self.keep else None
