"""The loop of every training: judged by examples that do not teach, kept at its best step, resumable to the
same bytes, stopped where it diverges."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmill.account import Report
from bitmill.core.errors import Unsolvable
from bitmill.core.types import Note
from bitmill.journal import Workspace
from bitmill.training.lessons import Lessons
from bitmill.training.optimizers import optimizer_for, restore, state_of
from bitmill.training.pupil import Pupil
from bitmill.training.settings import Settings
from bitmill.walk import Progress

CHECKS = 10  # times that what is learned is judged, and kept
LOST = 1.5  # times the least loss, and one nat more: what is judged so has diverged


@dataclass
class _State:
    """Where learning stands.

    Attributes:
        step: steps done.
        trace: step, loss on what teaches since the last one, loss on what judges.
        best_step, least: the best judged step.
        stopped: why it ended early; empty otherwise.
    """

    step: int
    trace: list[tuple[int, float, float]]
    best_step: int
    least: float
    stopped: str = ""

    @property
    def first(self) -> float:
        """What judges said before the first step."""
        return self.trace[0][2]


@dataclass(frozen=True)
class Learned:
    """What came of it: the tensors to write, facts for the report, and what its reader must know."""

    values: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Course:
    """Lessons, how they are taught, and where what is learned is kept.

    Attributes:
        steps: of the optimizer.
        event: what progress is told as.
    """

    lessons: Lessons
    settings: Settings
    steps: int
    space: Workspace
    tell: Progress
    event: str

    def report(
        self,
        finished: str,
        learn: Callable[[Mapping[str, Any] | None], tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]],
        plan: Mapping[str, Any],
        identity: Mapping[str, Any],
        done: Sequence[Mapping[str, Any]],
        started: float,
    ) -> Report:
        """The report of a run.

        Args:
            finished: the unit of the journal behind which nothing is left to learn.
            learn: facts and notes, going on from the last unit that is ``done``, if any.
        """
        if done and done[-1]["unit"] == finished:
            facts, notes = done[-1]["tuning"], done[-1]["notes"]
        else:
            facts, notes = learn(done[-1] if done else None)
        return Report(
            path=str(self.space.out),
            plan=plan,
            calibration=self.lessons.facts,
            notes=tuple(Note(**note) for note in notes),
            tensors={},
            blocks={},
            seconds=time.monotonic() - started,
            resumed=len(done),
            identity=identity,
            tuning=facts,
        )

    def learn(self, pupil: Pupil, kept: Mapping[str, Any] | None) -> Learned:
        """Every step, or those that are left behind what an interrupted run has ``kept``.

        Raises:
            Unsolvable: it diverged before anything was learned.
        """
        began = time.monotonic()
        optimizer, called = optimizer_for(pupil.parameters, self.settings.optimizer, self.settings.lr)
        if kept is None:
            self.tell(self.event, 0, self.steps, "judging the start")
            loss = pupil.judged(self.lessons.judges)
            state, best = _State(0, [(0, loss, loss)], 0, loss), pupil.now()
        else:
            live = self.space.load_live(kept["live"])
            state, best = _State(**kept["state"]), _part(live, "best")
            pupil.put(_part(live, "now"))
            restore(optimizer, live)
        best = self._steps(pupil, optimizer, state, best)
        if state.stopped and state.best_step == 0:
            raise Unsolvable(
                f"learning {state.stopped} at step {state.step}; no step before was better than the start",
                where=f"loss {state.first:.4f} at the start; seen: {_seen(state)}",
                fix=f"a smaller rate, --lr {self.settings.lr / 4:.1g}; or look at the data",
            )
        last = state.stopped == "" and self.settings.keep == "last"
        written, at = (pupil.now(), state.step) if last else (best, state.best_step)
        facts = {
            "first": state.first,
            "least": state.least,
            "best_step": state.best_step,
            "written_step": at,
            "steps": state.step,
            "trace": state.trace,
            "optimizer": called,
            "learning_seconds": time.monotonic() - began,
            **({"stopped": state.stopped} if state.stopped else {}),
        }
        where = str(self.space.out)
        return Learned(written, facts, (*_notes(state, at, where), *pupil.portions.notes(where)))

    def _steps(
        self, pupil: Pupil, optimizer: torch.optim.Optimizer, state: _State, best: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every step that is left; what was learned at its best."""
        every, losses = max(1, self.steps // CHECKS), []
        while state.step < self.steps and not state.stopped:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.rate(state.step, self.steps)
            batch = self.lessons.batch(state.step, self.settings.batch, self.settings.seed)
            loss, norm = pupil.lesson(batch, self.settings.seed + state.step)
            if not math.isfinite(loss) or not math.isfinite(norm):
                state.stopped = "met a loss or gradient that is not a finite number"
                break
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            losses.append(loss)
            said = f"loss {loss:.3f}, held out {state.trace[-1][2]:.3f}"
            if state.step % every == 0 or state.step == self.steps:
                held = pupil.judged(self.lessons.judges)
                state.trace.append((state.step, sum(losses) / len(losses), held))
                losses, said = [], f"loss {state.trace[-1][1]:.3f}, held out {held:.3f}"
                if not math.isfinite(held) or held > LOST * state.least + 1:
                    state.stopped = "diverged"
                elif held < state.least:
                    state.best_step, state.least, best = state.step, held, pupil.now()
                self._keep(pupil, optimizer, state, best)
            self.tell(self.event, state.step, self.steps, said)
        return best

    def _keep(
        self, pupil: Pupil, optimizer: torch.optim.Optimizer, state: _State, best: Mapping[str, Tensor]
    ) -> None:
        live = {f"now/{name}": value for name, value in pupil.now().items()}
        live |= {f"best/{name}": value for name, value in best.items()}
        self.space.finish_unit(f"step {state.step}", {"state": vars(state)}, {**live, **state_of(optimizer)})


def _part(live: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{head}/"): value for n, value in live.items() if n.startswith(f"{head}/")}


def _seen(state: _State) -> str:
    return ", ".join(f"step {step}: {held:.3f}" for step, _, held in state.trace[-3:])


def _notes(state: _State, at: int, where: str) -> list[Note]:
    notes = []
    if state.stopped:
        text = f"learning {state.stopped} at step {state.step}; written is step {at}, the best before"
        notes.append(Note("stopped", where, text, float(at)))
    elif state.best_step == 0:
        text = "no step was better on the held-out examples than the start"
        text += "; what is written is the start" if at == 0 else f"; written is step {at} all the same"
        notes.append(Note("not-better", where, f"{text}: a smaller --lr, or more examples"))
    elif at != state.step:
        text = f"written is step {at} of {state.step}: later ones were worse on the held-out examples"
        notes.append(Note("best-step", where, text, float(at)))
    return notes
