"""Distilled scales: what is stored beside the codes of a quantized model follows the original's next-token
distribution while the codes stay (the second stage of EfficientQAT, Chen et al., arXiv 2407.11062, with the
original in place of the text as in Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from bitmill.core.axes import Grid
from bitmill.core.types import Problem, Solution
from bitmill.numerics.distilling import Distilling
from bitmill.numerics.moving import moving


@final
@dataclass(frozen=True)
class Tune(Distilling):
    """Adam on everything that is stored beside the codes, by the divergence from the original model.

    It stands behind a solver, ``gptq + tune``; alone, behind plain rounding. A step moves each value by
    ``rate`` of itself. What is learned on is the second half of each calibration window, over the full
    vocabulary; what is kept is the step that fared best on text of another kind, be it none.

    Attributes:
        steps: of descent.
        batch: windows a step.
        rate: relative move of each scale in a step, at most; it falls to nothing over the run.
        norms: whether the weights of norms move, too.
        half: whether the model is computed in bfloat16 while it learns, where the processor has it and the
            recipe rounds no inputs; it is judged in float32 either way.
        seed: which windows come when.
    """

    steps: int = 100
    batch: int = 4
    rate: float = 1e-3
    norms: bool = True
    half: bool = True
    seed: int = 0

    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{self.steps} steps of {self.batch} windows teach nothing")
        if not 0 < self.rate <= 0.1:
            raise ValueError(f"rate is a part of a scale, above 0 and at most 0.1, not {self.rate}")

    def refuses(self, grid: Grid) -> str | None:
        """Grids whose scales are whole numbers, powers of two or none at all."""
        if moving(grid):
            return None
        return f"{grid} has no scale that can move a little while its codes stay"

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def weights(self) -> bool:
        """They stay."""
        return False

    @property
    def blocks_at_once(self) -> int:
        """Scales are few."""
        return 0

    @property
    def own_text(self) -> bool:
        """Any text does."""
        return False

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """Plain rounding: what a run starts from where no other solver is named.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        for grid in grids:
            if not moving(grid):
                raise ValueError(self.refuses(grid))
        return [Solution(g.round(p.weight, p.importance)) for p, g in zip(problems, grids, strict=True)]
