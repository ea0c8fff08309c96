"""One grid for the linear weights of all blocks, single tensors apart; embedding, head and norms stay."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from bitmill.core.axes import Allocation, Choice, Weight

LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down", "linear"})
NAMED = LINEAR | {"embed", "head"}
"""Roles of the tensors that a pattern may choose; a router is asked for by its role."""


@final
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same grid everywhere.

    Attributes:
        grid: its text.
        keep: roles that stay dense after all.
        tensors: regular expressions searched in the stored name, each with a grid; the first that is found
            decides, for embedding and head, too.
    """

    grid: str
    keep: tuple[str, ...] = ()
    tensors: tuple[tuple[str, str], ...] = ()

    def choose(self, weight: Weight) -> Choice | None:
        """The grid for a linear weight of a block; None outside the blocks and for what is kept."""
        if weight.role in self.keep:
            return None
        for pattern, grid in self.tensors if weight.role in NAMED else ():
            if re.search(pattern, weight.stored or weight.name):
                return Choice(grid, f"/{pattern}/={grid}")
        linear = weight.role in LINEAR and weight.layer is not None
        return Choice(self.grid, "as the recipe says") if linear else None
