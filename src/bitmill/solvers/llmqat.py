"""LLM-QAT: the weights themselves are trained, on text that the model has written, with weights, inputs and
the cache of keys and values rounded in every step, by the divergence from the original (Liu et al., arXiv
2305.17888)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from bitmill.core.axes import Grid, ScalarGrid
from bitmill.core.types import Problem, Solution
from bitmill.numerics.distilling import Distilling

PROBE = (32, 256)  # shape of a trial weight


@final
@dataclass(frozen=True)
class LlmQat(Distilling):
    """Adam on all weights, which are rounded to nearest in every step, their range as wide as they are then:
    nothing is clipped. Rounding is taken as the identity.

    What is rounded beside them is what the recipe says: ``input=int8-token``, ``cache=int8-token``. Without
    ``--calib`` it learns from what the model itself writes (``--calib self``). A weight's step is ``rate``
    steps of its grid; the divergence is that of the second half of each window, over the full vocabulary;
    what is kept is the step that fared best on text of another kind, be it none.

    Attributes:
        steps: of descent.
        batch: windows a step.
        rate: how far each weight moves in a step, in steps of the grid, at most; it falls to nothing over the
            run.
        norms: whether the weights of norms move, too.
        blocks: blocks that learn at once, each lot for ``steps`` steps, from the first to the last; 0 takes
            all where the machine's memory has room for that, and says how many where it has not.
        seed: which windows come when.
    """

    steps: int = 200
    batch: int = 4
    rate: float = 0.005
    norms: bool = True
    blocks: int = 0
    seed: int = 0

    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{self.steps} steps of {self.batch} windows teach nothing")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is a part of a step, above 0 and at most 1, not {self.rate}")
        if self.blocks < 0:
            raise ValueError(f"{self.blocks} blocks cannot learn")

    def refuses(self, grid: Grid) -> str | None:
        """Only grids of scalars have steps to train by, and layers must have all they need of their own."""
        if not isinstance(grid, ScalarGrid):
            return f"{grid} has no steps to train by; use gptq"
        if any(value.dim() == 0 for value in grid.fit(torch.ones(PROBE)).values()):
            return f"{grid} has a value that layers share, and each is rounded by itself; use efficientqat"
        return None

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def half(self) -> bool:
        """Steps are a small part of what bfloat16 leaves out."""
        return False

    @property
    def weights(self) -> bool:
        """They move."""
        return True

    @property
    def blocks_at_once(self) -> int:
        """As asked."""
        return self.blocks

    @property
    def own_text(self) -> bool:
        """Data-free."""
        return True

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """Plain rounding: what a run starts from.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        for grid in grids:
            reason = self.refuses(grid)
            if reason is not None:
                raise ValueError(reason)
        pairs = zip(problems, grids, strict=True)
        return [Solution(grid.round(p.weight.float(), p.importance)) for p, grid in pairs]
