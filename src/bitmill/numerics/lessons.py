"""What a weight, or a block of them, is taught by and judged by, and the best state that was met."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor

from bitmill.core.axes import Grid
from bitmill.core.learning import BlockTask
from bitmill.core.types import Note, Problem, Quantized
from bitmill.numerics.half import products_in_half
from bitmill.numerics.portions import Portions

CHECKS = 10  # times that progress is judged
JUDGES = 8  # windows, at most, that do not teach and judge instead

Loss = Callable[[Sequence[Tensor], int], Iterator[Tensor]]
"""A loss at these values in parts that add up to it, of so many windows at most."""


class Course:
    """Lessons without end, and the best quantized weights so far by a judge that does not teach.

    Attributes:
        best: those weights; plain rounding at first.
        first, least: the judge's loss of plain rounding, and of ``best``.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        grids: Sequence[Grid],
        lessons: Iterator[Loss],
        judge: Loss,
        windows: int,
    ) -> None:
        self._lessons, self._judge, self._windows = lessons, judge, windows
        self._portions = Portions(windows, "windows")
        self.best = [g.round(p.weight.float(), p.importance) for p, g in zip(problems, grids, strict=True)]
        self.first = self.least = self._judged(self.best)

    @classmethod
    def of_block(cls, task: BlockTask, batch: int, seed: int, half: bool) -> Course:
        """Taught by windows of a block, ``batch`` at a time, and judged by the last of them; ``half`` teaches
        in bfloat16 where the processor has it; with AVX-512 that is two and a half times as fast."""
        held = min(JUDGES, max(1, task.windows // 8)) if task.windows > 1 else 0
        judges = torch.arange(task.windows - held, task.windows) if held else torch.arange(task.windows)
        taught = torch.arange(max(task.windows - held, 1))
        generator = torch.Generator().manual_seed(seed)

        def loss(windows: Tensor, half: bool) -> Loss:
            def parts(values: Sequence[Tensor], size: int) -> Iterator[Tensor]:
                for some in windows.split(size):
                    with products_in_half(values[0].device, half):
                        made = task.outputs(values, some)
                    error = made.float() - task.wanted(some)
                    yield error.square().mean() * (len(some) / len(windows))

            return parts

        def lessons() -> Iterator[Loss]:
            while True:
                yield loss(taught[torch.randperm(len(taught), generator=generator)[:batch]], half)

        most = max(min(batch, len(taught)), len(judges))
        return cls(task.problems, task.grids, lessons(), loss(judges, half=False), most)

    @classmethod
    def of_layer(cls, problem: Problem, grid: Grid) -> Course:
        """Taught and judged by the error of one weight's own output, where its moments tell; of the weight,
        where there are none."""
        loss = _own_loss(problem)
        return cls([problem], [grid], repeat(loss), loss, 1)

    def gradients(self, values: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Of the next lesson's loss by these values; None where it is no number."""
        leaves = [value.requires_grad_() for value in values]
        lesson = next(self._lessons)

        def summed(size: int) -> list[Tensor | None] | None:
            sums: list[Tensor | None] = [None for _ in leaves]
            with torch.enable_grad():
                for part in lesson(leaves, size):
                    if not torch.isfinite(part):
                        return None
                    found = torch.autograd.grad(part, leaves, allow_unused=True)
                    sums = [
                        g if s is None else s if g is None else s + g
                        for s, g in zip(sums, found, strict=True)
                    ]
            return sums

        return self._portions.through(summed, self._windows)

    def offer(self, quantized: list[Quantized]) -> None:
        """Keep these where the judge prefers them."""
        loss = self._judged(quantized)
        if loss < self.least:
            self.best, self.least = quantized, loss

    def notes(self, name: str, what: str) -> tuple[Note, ...]:
        """How far it came."""
        ratio = self.least / self.first if self.first > 0 else 1.0
        text = f"{what}: the error of the output is x {ratio:.3f} of plain rounding's"
        return (Note("learned", name, text, ratio), *self._portions.notes(name))

    @torch.no_grad()
    def _judged(self, quantized: Sequence[Quantized]) -> float:
        values = [q.dense() for q in quantized]
        loss = self._portions.through(lambda n: sum(map(float, self._judge(values, n))), self._windows)
        return loss if math.isfinite(loss) else math.inf


def _own_loss(problem: Problem) -> Loss:
    w, moments = problem.weight.float(), problem.moments
    if moments is not None and moments.gram is not None:
        gram = moments.gram / max(moments.tokens, 1)
        return lambda values, _: iter([((values[0] - w) @ gram * (values[0] - w)).sum()])
    importance = torch.ones(w.shape[1]) if moments is None else moments.importance
    return lambda values, _: iter([((values[0] - w).square() * importance.to(w)).sum()])
