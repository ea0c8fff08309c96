"""Learning of weights on their way to their grids: one course for the weights of a block, or one for each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bitmill.core.axes import Grid, ScalarGrid
from bitmill.core.learning import BlockSolver, BlockTask
from bitmill.core.types import Problem, Quantized, Solution
from bitmill.numerics.learned import Learned
from bitmill.numerics.lessons import CHECKS, JUDGES, Course


@dataclass(frozen=True)
class Rounded:
    """A weight in the midst of its course.

    Attributes:
        learned: where it is.
        quantized: what it is on its grid.
        value: of that, [rows, columns].
        gradient: the loss's by these values; None where the loss does not depend on them.
    """

    learned: Learned
    quantized: Quantized
    value: Tensor
    gradient: Tensor | None


Move = Callable[[int, Sequence[Rounded]], list[Learned]]
"""Where weights go in a step, which has a number."""


class Taught(BlockSolver):
    """A solver that moves weights step by step, by gradients of what their rounding costs.

    Attributes:
        steps: of descent.
        batch: windows a step.
        half: whether lessons may be in bfloat16.
        seed: which windows come when.
        lesson: what notes call it.
    """

    steps: int
    batch: int
    half: bool
    seed: int
    lesson: ClassVar[str]

    @abstractmethod
    def mover(self, start: Sequence[Learned]) -> Move:
        """How to go on in a course that begins with these weights."""

    def refuses(self, grid: Grid) -> str | None:
        """Only grids of scalars have steps to learn by."""
        return None if isinstance(grid, ScalarGrid) else f"{grid} has no steps to learn by; use gptq"

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
            self._go_through(course, [problem])
            found.append(Solution(course.best[0], course.notes(problem.name, self.lesson)))
        return found

    def learn(self, task: BlockTask) -> list[Solution]:
        """All weights of a block together.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        course = Course.of_block(task, self.batch, self.seed, self.half)
        self._go_through(course, task.problems)
        notes = course.notes(task.name, self.lesson)
        return [Solution(one, notes if not at else ()) for at, one in enumerate(course.best)]

    def _go_through(self, course: Course, problems: Sequence[Problem]) -> None:
        state = [self._start(p, q) for p, q in zip(problems, course.best, strict=True)]
        move = self.mover(state)
        every = max(1, self.steps // CHECKS)
        for step in range(self.steps):
            quantized = [one.quantized(one.params()) for one in state]
            if step % every == 0 and step:
                course.offer(quantized)
            values = [q.dense() for q in quantized]
            gradients = course.gradients(values)
            if gradients is None:
                break  # what was best so far stays
            rounded = zip(state, quantized, values, gradients, strict=True)
            state = move(step, [Rounded(one, q, value.detach(), g) for one, q, value, g in rounded])
        course.offer([one.quantized(one.params()) for one in state])

    def _start(self, problem: Problem, rounded: Quantized) -> Learned:
        if not isinstance(rounded.grid, ScalarGrid):
            raise ValueError(self.refuses(rounded.grid))
        return Learned.of(problem.weight.float(), rounded.grid, rounded.params)
