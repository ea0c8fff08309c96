"""The last step of a run that learns with the whole model: scales and norms, after the walk.

The walk's output is read back as any reader would, and what a :class:`~bitmill.core.learning.ModelSolver` has
found is written over it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitmill.account import Report
from bitmill.calibrate.stream import Stream
from bitmill.core.errors import Refused
from bitmill.core.learning import ModelSolver, ModelTask, Tuned
from bitmill.core.schooling import Schooling
from bitmill.core.types import Note
from bitmill.distilled import Distilled
from bitmill.held_out import HeldOut, held_out
from bitmill.journal import Workspace
from bitmill.moved import Leaves
from bitmill.run.memory import available_bytes
from bitmill.walk import Progress, Walk

UNIT = "tune"
LAST = ": found"
WRITTEN = ": written"


@dataclass
class BesideWalk:
    """What has a walk do its part of a run.

    Attributes:
        walk: that solves, and writes.
    """

    walk: Walk

    @property
    def space(self) -> Workspace:
        """What all fill."""
        return self.walk.space

    @property
    def tell(self) -> Progress:
        """Who hears of progress."""
        return self.walk.tell

    def verify_sample(self) -> None:
        """See :meth:`Placing.verify_sample`."""
        self.walk.verify_sample()


@dataclass
class Tuning(BesideWalk):
    """A walk, and after it the step with the whole model.

    Attributes:
        solver: that learns afterwards.
    """

    solver: ModelSolver

    def run(self, identity: Mapping[str, Any], done: Sequence[Mapping[str, Any]], started: float) -> Report:
        """Every unit that is not done yet; the report of all of them."""
        walked = [unit for unit in done if not unit["unit"].startswith(UNIT)]
        report = self.walk.run(identity, walked, started)
        facts = self._finish(list(done[len(walked) :]))
        return replace(
            report,
            notes=(*report.notes, *_notes(facts, str(self.walk.plan.recipe.tune))),
            tuning=facts,
            seconds=time.monotonic() - started,
            resumed=len(done),
        )

    def _finish(self, done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Every part of the model, one after the other; facts of all."""
        held = held_out(self.walk.calibration, self.walk.source)
        parts = _parts(len(list(_layers(self.walk))), self.solver.blocks_at_once)
        found: list[Mapping[str, Any]] = []
        for part in parts:
            called = UNIT if len(parts) == 1 else f"{UNIT} blocks {part[0]} to {part[-1]}"
            mine = [unit for unit in done if unit["unit"].startswith(called)]
            found.append(self._finish_part(part, called, held, mine))
        return _joined(found)

    def _finish_part(
        self, part: range, called: str, held: HeldOut, done: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        if done and done[-1]["unit"] == f"{called}{WRITTEN}":
            return done[-1]["tuning"]
        model = Distilled(self.walk, self.solver, part)
        if done and done[-1]["unit"] == f"{called}{LAST}":
            leaves: Leaves = self._live(done[-1])
            facts = dict(done[-1]["tuning"])
        else:
            began = time.monotonic()
            tuned = self._tuned(model, called, held, done[-1] if done else None)
            leaves, facts = tuned.leaves, _account(tuned, model, held, time.monotonic() - began)
            self.space.finish_unit(f"{called}{LAST}", {"tuning": facts, "rewrites": True}, _cpu(leaves))
        if facts["best_step"]:
            model.write(leaves)
        self.space.finish_unit(f"{called}{WRITTEN}", {"tuning": facts})
        return facts

    def _tuned(self, model: Distilled, called: str, held: HeldOut, kept: Mapping[str, Any] | None) -> Tuned:
        """Learn, or go on learning from what an interrupted run has kept; leaves as they are stored."""
        steps, which = self.solver.passes, called.removeprefix(UNIT).strip()
        taught, judges = model.wanted(held.taught), model.wanted(held.judges)
        original = Stream(self.walk.source, self.walk.device).head()
        start, units = model.start()

        def keep(step: int, state: Leaves, record: Mapping[str, Any]) -> None:
            self.space.finish_unit(f"{called} {step}", {"step": step, "record": record}, _cpu(state))

        def lesson(leaves: Leaves, windows: Tensor) -> tuple[float, Mapping[str, Tensor]]:
            wanted = taught[windows.to(taught.device)]
            return model.lesson(held.taught[windows], wanted, original, model.stored(leaves))

        def judge(leaves: Leaves) -> float:
            return model.judge(held.judges, judges, original, model.stored(leaves))

        school = Schooling(
            len(held.taught),
            lesson,
            judge,
            0 if kept is None else int(kept["step"]),
            {} if kept is None else self._live(kept),
            {} if kept is None else kept["record"],
            keep,
            lambda step, text: self.tell("tune", step, steps, f"{which}: {text}" if which else text),
        )
        self.tell("tune", school.step, steps, which)
        tuned = self.solver.tune(ModelTask(start, units, school))
        return replace(tuned, leaves=model.stored(tuned.leaves))

    def _live(self, unit: Mapping[str, Any]) -> dict[str, Tensor]:
        device = torch.device(self.walk.device)
        return {name: value.to(device) for name, value in self.space.load_live(unit["live"]).items()}


def with_tuning(walk: Walk) -> Walk | Tuning:
    """The walk, and what its recipe says comes after it.

    Raises:
        Refused: there is not the memory for that.
    """
    solver, name = walk.plan.recipe.make_tune(), walk.plan.recipe.tune
    if solver is None or name is None:
        return walk
    free = available_bytes()
    fewer = f"fewer blocks at once, {name.name}(blocks=1); " if solver.weights else ""
    if walk.plan.peak_bytes > free:
        raise Refused(
            f"{name} keeps every code of the model in memory, and what it learns about them: about "
            f"{_gib(walk.plan.peak_bytes)} in all, and {_gib(free)} are free",
            fix=f"{fewer}fewer windows a step, {name.name}(batch=1); shorter windows; a machine with more "
            "memory; or the recipe without it",
        )
    return Tuning(walk, solver)


def _layers(walk: Walk) -> set[int]:
    return {row.layer for row in walk.plan.rows if row.layer is not None}


def _parts(blocks: int, at_once: int) -> list[range]:
    """Runs of blocks that learn together."""
    at_once = at_once or blocks
    return [range(a, min(a + at_once, blocks)) for a in range(0, blocks, at_once)]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the report says, where parts of the model learned one after the other."""
    if len(parts) == 1:
        return dict(parts[0])
    stopped = [part["stopped"] for part in parts if "stopped" in part]
    return {
        "first": parts[0]["first"],
        "least": parts[-1]["least"],
        "best_step": max(part["best_step"] for part in parts),
        "judge": parts[0]["judge"],
        "seconds": sum(part["seconds"] for part in parts),
        "memory": parts[-1]["memory"],
        "parts": list(parts),
        **({"stopped": "; ".join(stopped)} if stopped else {}),
    }


def _account(tuned: Tuned, model: Distilled, held: HeldOut, seconds: float) -> dict[str, Any]:
    """What the report says of it."""
    start, units = model.start()
    norms = [name for name in start if name in model.norms]
    others = [name for name in start if name not in model.norms]
    moved = [float(((tuned.leaves[n] - start[n]).abs() / units[n].clamp_min(1e-30)).mean()) for n in others]
    scales = all(":" in name for name in others)
    return {
        **tuned.facts,
        "scales" if scales else "weights": sum(start[n].numel() for n in others),
        "norms": len(norms),
        "mean_relative_change" if scales else "mean_change_in_steps": sum(moved) / max(len(moved), 1),
        "taught_windows": len(held.taught),
        "judge": held.facts,
        "seconds": seconds,
        "memory": [vars(note) for note in model.portions.notes("the model as a whole")],
    }


def _notes(facts: Mapping[str, Any], name: str) -> tuple[Note, ...]:
    """One sentence, and one more where it did not go well."""
    first, least, at = facts["first"], facts["least"], facts["best_step"]
    ratio = least / first if first > 0 and math.isfinite(first) else 1.0
    said = f"divergence on {facts['judge']['text']} {first:.4f} -> {least:.4f} nats a token at step {at}; "
    said += "errors of weights in this report are those before it"
    if not at:
        said = f"no step was better on {facts['judge']['text']}: everything stays as it was"
    notes = [Note("tuned", name, said, ratio), *(Note(**note) for note in facts.get("memory", ()))]
    if "stopped" in facts:
        text = f"stopped: {facts['stopped']}; kept is step {at}"
        notes.append(Note("tune-stopped", name, text))
    return tuple(notes)


def _cpu(tensors: Leaves) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _gib(bytes_: int) -> str:
    return f"{bytes_ / 2**30:.1f} GiB"
