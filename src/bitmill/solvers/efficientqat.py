"""EfficientQAT's first stage, Block-AP: train the weights of a block, and the ends of their ranges, for the
block on its grid to put out what the original's does (Chen et al., arXiv 2407.11062); next comes ``tune``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, ScalarGrid
from bitmill.core.learning import BlockSolver, BlockTask
from bitmill.core.types import Problem, Quantized, Solution
from bitmill.numerics.adam import Adam
from bitmill.numerics.learned import STEEPEST, Learned
from bitmill.numerics.lessons import CHECKS, JUDGES, Course

FLOOR = 0.05  # the rate ends at this part of where it starts
TRAINED = "trained block"


@final
@dataclass(frozen=True)
class EfficientQat(BlockSolver):
    """Adam on all weights of a block, rounded in every step, with rounding taken as the identity.

    Unlike :class:`AutoRound <bitmill.solvers.autoround.AutoRound>` a weight may go as far as the gradient
    takes it, and ranges may grow. What is kept is the state in which windows that did not teach fared best,
    be it the first.

    Attributes:
        steps: of descent; the authors take 4096.
        batch: windows a step.
        rate: how far each weight moves in the first step, in steps of the grid, at most; it falls along half
            a cosine. 0 takes ``3 / steps``, but at most 0.02.
        ranges: whether ranges (scales and zero points) are trained, too.
        amplitude: of the wave whose derivative stands for that of rounding (StableQAT, arXiv 2601.19320; its
            authors take 0.21); 0 takes rounding as the identity.
        seed: which windows come when.
    """

    steps: int = 400
    batch: int = 4
    rate: float = 0.0
    ranges: bool = True
    amplitude: float = 0.0
    seed: int = 0

    needs: ClassVar[str] = "diagonal"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{self.steps} steps of {self.batch} windows teach nothing")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a part of a step from 0 to 1, not {self.rate}")
        if not 0 <= self.amplitude <= STEEPEST:
            raise ValueError(f"amplitude is from 0 to {STEEPEST:.4f}, not {self.amplitude}")

    def refuses(self, grid: Grid) -> str | None:
        """Only grids of scalars have steps to train by."""
        if isinstance(grid, ScalarGrid):
            return None
        return f"{grid} has no steps to train by; use gptq"

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
            self._train([problem], course)
            found.append(Solution(course.best[0], course.notes(problem.name, TRAINED)))
        return found

    def learn(self, task: BlockTask) -> list[Solution]:
        """All weights of a block together.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        course = Course.of_block(task, self.batch, self.seed)
        self._train(task.problems, course)
        notes = course.notes(task.name, TRAINED)
        return [Solution(one, notes if not at else ()) for at, one in enumerate(course.best)]

    def _train(self, problems: Sequence[Problem], course: Course) -> None:
        state = [self._start(p, q) for p, q in zip(problems, course.best, strict=True)]
        adam = Adam.of({key: v for at, one in enumerate(state) for key, v in _trained(at, one).items()})
        every = max(1, self.steps // CHECKS)
        for step in range(self.steps):
            quantized = [one.quantized(one.params()) for one in state]
            if step % every == 0 and step:
                course.offer(quantized)
            values = [q.dense() for q in quantized]
            gradients = course.gradients(values)
            if gradients is None:
                break  # what was best so far stays
            slopes: dict[str, Tensor] = {}
            for at, (one, g, value, q) in enumerate(zip(state, gradients, values, quantized, strict=True)):
                if g is not None:
                    keys = _trained(at, one)
                    by = one.slopes(g, value.detach(), q.params, self.amplitude)
                    slopes |= dict(zip(keys, by, strict=True))
            adam = adam.seen(slopes)
            state = [
                self._moved(at, one, q, adam, step)
                for at, (one, q) in enumerate(zip(state, quantized, strict=True))
            ]
        course.offer([one.quantized(one.params()) for one in state])

    def _moved(self, at: int, one: Learned, now: Quantized, adam: Adam, step: int) -> Learned:
        weight, high, low = (adam.direction(key) for key in _trained(at, one))
        if not self.ranges:
            high, low = torch.zeros_like(high), torch.zeros_like(low)
        start = self.rate or min(3 / self.steps, 0.02)
        rate = start * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / self.steps)) / 2)
        return one.trained(weight, high, low, now.params, rate)

    def _start(self, problem: Problem, rounded: Quantized) -> Learned:
        if not isinstance(rounded.grid, ScalarGrid):
            raise ValueError(self.refuses(rounded.grid))
        return Learned.of(problem.weight.float(), rounded.grid, rounded.params)


def _trained(at: int, one: Learned) -> dict[str, Tensor]:
    """What is trained of one weight, by name."""
    return {f"{at}.weight": one.weight, f"{at}.high": one.high, f"{at}.low": one.low}
