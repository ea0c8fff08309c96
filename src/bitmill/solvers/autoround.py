"""AutoRound: learn where each weight rounds to, and how far each range reaches, from the error of the block's
output, by the sign of its gradient (Cheng et al., arXiv 2309.05516)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, ScalarGrid
from bitmill.core.learning import BlockSolver, BlockTask
from bitmill.core.types import Note, Problem, Quantized, Solution
from bitmill.numerics.learned import Learned

CHECKS = 10  # times that progress is judged
JUDGES = 8  # windows, at most, that do not teach and judge instead

Loss = Callable[[Sequence[Tensor]], Tensor]


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
            loss = _own_loss(problem)
            [quantized], first, least = self._descend([problem], [grid], repeat(loss), loss)
            found.append(Solution(quantized, _notes(problem.name, first, least)))
        return found

    def learn(self, task: BlockTask) -> list[Solution]:
        """All weights of a block together.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        held = min(JUDGES, max(1, task.windows // 8)) if task.windows > 1 else 0
        judges = torch.arange(task.windows - held, task.windows) if held else torch.arange(task.windows)
        taught = torch.arange(max(task.windows - held, 1))
        generator = torch.Generator().manual_seed(self.seed)

        def loss(windows: Tensor) -> Loss:
            wanted = task.wanted(windows)
            return lambda values: (task.outputs(values, windows) - wanted).square().mean()

        def lessons() -> Iterator[Loss]:
            while True:
                picked = torch.randperm(len(taught), generator=generator)[: self.batch]
                yield loss(taught[picked])

        quantized, first, least = self._descend(task.problems, task.grids, lessons(), loss(judges))
        notes = _notes(task.name, first, least)
        return [Solution(one, notes if not at else ()) for at, one in enumerate(quantized)]

    def _descend(
        self,
        problems: Sequence[Problem],
        grids: Sequence[Grid],
        lessons: Iterator[Loss],
        judge: Loss,
    ) -> tuple[list[Quantized], float, float]:
        """The best quantized weights, and the judges' loss at the start and with those."""
        best = [
            grid.round(p.weight.float(), None if p.moments is None else p.moments.importance)
            for p, grid in zip(problems, grids, strict=True)
        ]
        state = [self._start(p, q) for p, q in zip(problems, best, strict=True)]
        first = least = _judged(judge, best)
        every = max(1, self.steps // CHECKS)
        for step in range(self.steps):
            quantized = [one.quantized(one.params()) for one in state]
            if step % every == 0 and step:
                best, least = _better(judge, quantized, best, least)
            leaves = [q.dense().requires_grad_() for q in quantized]
            with torch.enable_grad():
                loss = next(lessons)(leaves)
            if not torch.isfinite(loss):
                break  # what was best so far stays
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            rate = (self.rate or 1 / self.steps) * (1 - step / self.steps)
            state = [
                one if g is None else one.moved(g, leaf.detach(), q.params, rate, self.ranges)
                for one, g, leaf, q in zip(state, gradients, leaves, quantized, strict=True)
            ]
        best, least = _better(judge, [one.quantized(one.params()) for one in state], best, least)
        return best, first, least

    def _start(self, problem: Problem, rounded: Quantized) -> Learned:
        if not isinstance(rounded.grid, ScalarGrid):
            raise ValueError(self.refuses(rounded.grid))
        return Learned.of(problem.weight.float(), rounded.grid, rounded.params)


@torch.no_grad()
def _judged(judge: Loss, quantized: Sequence[Quantized]) -> float:
    loss = float(judge([q.dense() for q in quantized]))
    return loss if math.isfinite(loss) else math.inf


def _better(
    judge: Loss, quantized: list[Quantized], best: list[Quantized], least: float
) -> tuple[list[Quantized], float]:
    loss = _judged(judge, quantized)
    return (quantized, loss) if loss < least else (best, least)


def _own_loss(problem: Problem) -> Loss:
    """Squared error of a layer's output where its moments tell, of its weights where there are none."""
    w, moments = problem.weight.float(), problem.moments
    if moments is not None and moments.gram is not None:
        gram = moments.gram / max(moments.tokens, 1)
        return lambda values: ((values[0] - w) @ gram * (values[0] - w)).sum()
    importance = torch.ones(w.shape[1]) if moments is None else moments.importance
    return lambda values: ((values[0] - w).square() * importance.to(w)).sum()


def _notes(name: str, first: float, least: float) -> tuple[Note, ...]:
    ratio = least / first if first > 0 else 1.0
    text = f"learned rounding: the error of the output is x {ratio:.3f} of plain rounding's"
    return (Note("learned", name, text, ratio),)
