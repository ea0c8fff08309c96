"""Distilled scales: what is stored beside the codes of a quantized model follows the original's next-token
distribution while the codes stay (the second stage of EfficientQAT, Chen et al., arXiv 2407.11062, with the
original in place of the text as in Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid
from bitmill.core.learning import ModelSolver, ModelTask, Tuned
from bitmill.core.types import Problem, Solution
from bitmill.numerics.adam import Adam
from bitmill.numerics.moving import moving

CHECKS = 10  # times that progress is judged, and made safe
WARM = 0.05  # part of the steps in which the rate rises
RUNAWAY = 4.0  # times the first divergence: not worth going on


@final
@dataclass(frozen=True)
class Tune(ModelSolver):
    """Adam on everything that is stored beside the codes, by the divergence from the original model.

    It stands behind a solver, ``gptq + tune``; alone, behind plain rounding. A step moves each value by
    ``rate`` of itself. What is learned on is the second half of each calibration window, over the full
    vocabulary; what is kept is the step that fared best on text of another kind, be it none.

    Attributes:
        steps: of descent.
        batch: windows a step.
        rate: relative move of each scale in a step, at most; it falls to nothing over the run.
        norms: whether the weights of norms move, too.
        seed: which windows come when.
    """

    steps: int = 100
    batch: int = 4
    rate: float = 1e-3
    norms: bool = True
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
    def passes(self) -> int:
        """Every step decodes each weight anew."""
        return self.steps

    @property
    def at_once(self) -> int:
        """A batch."""
        return self.batch

    @property
    def judgements(self) -> int:
        """At the start, and after each part of the run."""
        return 1 + -(-self.steps // self._every)

    @property
    def _every(self) -> int:
        return max(1, self.steps // CHECKS)

    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """Plain rounding: what a run starts from where no other solver is named.

        Raises:
            ValueError: a grid that :meth:`refuses` names.
        """
        for grid in grids:
            if not moving(grid):
                raise ValueError(self.refuses(grid))
        told = [None if p.moments is None else p.moments.importance for p in problems]
        return [Solution(grid.round(p.weight, u)) for p, grid, u in zip(problems, grids, told, strict=True)]

    def tune(self, task: ModelTask) -> Tuned:
        """The best leaves that were met, judged by text of another kind."""
        moved, adam, best, facts = self._resumed(task)
        for step in range(task.step, self.steps):
            leaves = _at(task, moved)
            loss, gradients = task.lesson(leaves, self._windows(task.windows, step))
            if not (math.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in gradients.values())):
                facts["stopped"] = f"the loss was no longer a number at step {step}"
                break
            adam = adam.seen(gradients)
            rate = self._rate(step)
            moved = {name: value - rate * adam.direction(name) for name, value in moved.items()}
            task.tell(step + 1, f"divergence {loss:.4f}, on other text {facts['least']:.4f} at best")
            if (step + 1) % self._every and step + 1 < self.steps:
                continue
            judged = _number(task.judge(_at(task, moved)))
            facts["trace"] = [*facts["trace"], [step + 1, loss, judged if math.isfinite(judged) else None]]
            if judged < facts["least"]:
                best, facts["least"], facts["best_step"] = moved, judged, step + 1
            if judged > RUNAWAY * facts["first"]:
                facts["stopped"] = f"the divergence ran away: {judged:.4g} at step {step + 1}"
                break
            if step + 1 < self.steps:
                task.keep(step + 1, _state(moved, adam, best), facts)
        return Tuned(task.start if not facts["best_step"] else _at(task, best), facts)

    def _resumed(self, task: ModelTask) -> tuple[dict[str, Tensor], Adam, dict[str, Tensor], dict[str, Any]]:
        """Relative moves so far, the state of the descent, the best moves, what is known of them."""
        if task.step:
            parts = {part: _part(task.state, part) for part in ("moved", "mean", "square", "best")}
            adam = Adam(task.step, parts["mean"], parts["square"])
            return parts["moved"], adam, parts["best"], dict(task.record)
        still = {name: torch.zeros_like(value) for name, value in task.start.items()}
        first = task.judge(task.start)
        facts = {"first": first, "least": first, "best_step": 0, "trace": []}
        return still, Adam.of(still), still, facts

    def _windows(self, count: int, step: int) -> Tensor:
        """Which windows a step learns from: all once, in some order, then all again in another."""
        batch = min(self.batch, count)
        rounds, at = divmod(step, count // batch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed * 100_003 + rounds))
        return order[at * batch : (at + 1) * batch]

    def _rate(self, step: int) -> float:
        """Up over the first steps, then down along half a cosine."""
        warm = min(1.0, (step + 1) / max(1.0, WARM * self.steps))
        return self.rate * warm * (1 + math.cos(math.pi * step / self.steps)) / 2


def _at(task: ModelTask, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + task.units[name] * moved[name] for name, value in task.start.items()}


def _state(moved: Mapping[str, Tensor], adam: Adam, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {"moved": moved, "mean": adam.mean, "square": adam.square, "best": best}
    return {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}


def _part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{part}/")}


def _number(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
