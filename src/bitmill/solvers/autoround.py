"""AutoRound: learn where each weight rounds to, and how far each range reaches, from the error of the block's
output, by the sign of its gradient (Cheng et al., arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from bitmill.core.axes import Grid, ScalarGrid
from bitmill.core.learning import BlockSolver, BlockTask
from bitmill.core.types import Problem, Quantized, Solution
from bitmill.numerics.learned import Learned
from bitmill.numerics.lessons import CHECKS, JUDGES, Course

LEARNED = "learned rounding"


@final
@dataclass(frozen=True)
class AutoRound(BlockSolver):
    """Signed gradient descent on the rounding of a whole block at once.

    Every weight may be rounded half a step away from where it is, and each range may shrink at either end.
    What is kept is the state in which windows that did not teach fared best, be it the first: a block is
    never left worse than plain rounding makes it on those.

    Attributes:
        steps: of descent; 50 are a quick try, 1000 the authors' slow setting.
        batch: windows a step.
        rate: how far each offset moves in the first step, in steps of the grid; it falls to nothing over the
            run. 0 takes ``1 / steps``.
        ranges: whether ranges are learned, too.
        seed: which windows come when.
    """

    steps: int = 200
    batch: int = 8
    rate: float = 0.0
    ranges: bool = True
    seed: int = 0

    needs: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{self.steps} steps of {self.batch} windows teach nothing")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a part of a step from 0 to 1, not {self.rate}")

    def refuses(self, grid: Grid) -> str | None:
        """Only grids of scalars have steps to round by."""
        if isinstance(grid, ScalarGrid):
            return None
        return f"{grid} has no steps to learn the rounding of; use gptq"

    def prefers(self, text: str) -> str:
        """Names are taken as they are."""
        return text

    @property
    def passes(self) -> int:
        """Every step rounds the weight anew."""
        return self.steps

    @property
    def windows_run(self) -> int:
        """Taught, and judged."""
        return self.steps * self.batch + (CHECKS + 1) * JUDGES // 2

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """Each weight by itself, from the error of its own output: what its moments say of it.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        found = []
        for problem, grid in zip(problems, grids, strict=True):
            course = Course.of_layer(problem, grid)
            self._descend([problem], course)
            found.append(Solution(course.best[0], course.notes(problem.name, LEARNED)))
        return found

    def learn(self, task: BlockTask) -> list[Solution]:
        """All weights of a block together.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        course = Course.of_block(task, self.batch, self.seed)
        self._descend(task.problems, course)
        notes = course.notes(task.name, LEARNED)
        return [Solution(one, notes if not at else ()) for at, one in enumerate(course.best)]

    def _descend(self, problems: Sequence[Problem], course: Course) -> None:
        state = [self._start(p, q) for p, q in zip(problems, course.best, strict=True)]
        every = max(1, self.steps // CHECKS)
        for step in range(self.steps):
            quantized = [one.quantized(one.params()) for one in state]
            if step % every == 0 and step:
                course.offer(quantized)
            values = [q.dense() for q in quantized]
            gradients = course.gradients(values)
            if gradients is None:
                break  # what was best so far stays
            rate = (self.rate or 1 / self.steps) * (1 - step / self.steps)
            state = [
                one if g is None else one.moved(g, value.detach(), q.params, rate, self.ranges)
                for one, g, value, q in zip(state, gradients, values, quantized, strict=True)
            ]
        course.offer([one.quantized(one.params()) for one in state])

    def _start(self, problem: Problem, rounded: Quantized) -> Learned:
        if not isinstance(rounded.grid, ScalarGrid):
            raise ValueError(self.refuses(rounded.grid))
        return Learned.of(problem.weight.float(), rounded.grid, rounded.params)
