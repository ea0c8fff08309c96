"""Adam on what moves of a whole model, by the divergence from the original, as far as a judge likes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitmill.core.learning import ModelSolver, ModelTask, Tuned
from bitmill.numerics.adam import Adam

CHECKS = 10  # times that progress is judged, and made safe
WARM = 0.05  # part of the steps in which the rate rises
RUNAWAY = 4.0  # times the first divergence: not worth going on


class Distilling(ModelSolver):
    """A solver that learns so.

    Attributes:
        steps: of descent.
        batch: windows a step.
        rate: relative move of each leaf in a step, at most; it falls to nothing over the run.
        seed: which windows come when.
    """

    steps: int
    batch: int
    rate: float
    seed: int

    @property
    def passes(self) -> int:
        """Every step makes each weight anew."""
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

    def tune(self, task: ModelTask) -> Tuned:
        """The best leaves that were met, judged by text of another kind."""
        school = task.schooling
        moved, adam, best, facts = _resumed(task)
        for step in range(school.step, self.steps):
            windows = windows_of(school.windows, self.batch, step, self.seed)
            loss, gradients = school.lesson(_at(task, moved), windows)
            if not (math.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in gradients.values())):
                facts["stopped"] = f"the loss was no longer a number at step {step}"
                break
            adam = adam.seen(gradients)
            rate = self._rate(step)
            moved = {name: value - rate * adam.direction(name) for name, value in moved.items()}
            school.tell(step + 1, f"divergence {loss:.4f}, on other text {facts['least']:.4f} at best")
            if (step + 1) % self._every and step + 1 < self.steps:
                continue
            judged = _number(school.judge(_at(task, moved)))
            facts["trace"] = [*facts["trace"], [step + 1, loss, judged if math.isfinite(judged) else None]]
            if judged < facts["least"]:
                best, facts["least"], facts["best_step"] = moved, judged, step + 1
            if judged > RUNAWAY * facts["first"]:
                facts["stopped"] = f"the divergence ran away: {judged:.4g} at step {step + 1}"
                break
            if step + 1 < self.steps:
                school.keep(step + 1, _state(moved, adam, best), facts)
        return Tuned(task.start if not facts["best_step"] else _at(task, best), facts)

    def _rate(self, step: int) -> float:
        """Up over the first steps, then down along half a cosine."""
        warm = min(1.0, (step + 1) / max(1.0, WARM * self.steps))
        return self.rate * warm * (1 + math.cos(math.pi * step / self.steps)) / 2


def windows_of(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Which of ``count`` windows a step learns from: all once, in some order, then all again in another."""
    batch = min(batch, count)
    rounds, at = divmod(step, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + rounds))
    return order[at * batch : (at + 1) * batch]


def _resumed(task: ModelTask) -> tuple[dict[str, Tensor], Adam, dict[str, Tensor], dict[str, Any]]:
    """Relative moves so far, the state of the descent, the best moves, what is known of them."""
    school = task.schooling
    if school.step:
        parts = {part: _part(school.state, part) for part in ("moved", "mean", "square", "best")}
        adam = Adam(school.step, parts["mean"], parts["square"])
        return parts["moved"], adam, parts["best"], dict(school.record)
    still = {name: torch.zeros_like(value) for name, value in task.start.items()}
    first = school.judge(task.start)
    facts = {"first": first, "least": first, "best_step": 0, "trace": []}
    return still, Adam.of(still), still, facts


def _at(task: ModelTask, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + task.units[name] * moved[name] for name, value in task.start.items()}


def _state(moved: Mapping[str, Tensor], adam: Adam, best: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = {"moved": moved, "mean": adam.mean, "square": adam.square, "best": best}
    return {f"{part}/{name}": value for part, named in parts.items() for name, value in named.items()}


def _part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{part}/")}


def _number(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
