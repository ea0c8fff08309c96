"""One call from a model, or from a shape alone, to a file of ternary weights (BitNet b1.58, Ma et al., arXiv
2402.17764)."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.account import Report
from bitmill.calibrate.skeleton import find_layers
from bitmill.checkpoint.tokenizer import load_tokenizer
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused, Unsolvable
from bitmill.core.types import Quantized, Row
from bitmill.forecast import BASE_BYTES
from bitmill.grids.ternary import Ternary
from bitmill.journal import Boundary, Workspace
from bitmill.mill import carry_out
from bitmill.planning import Plan, plan
from bitmill.recipe import parse
from bitmill.source import open_source
from bitmill.ternary.model import Trained, refuse_experts, reshaped, ternary_model
from bitmill.training.course import Course
from bitmill.training.lessons import Lessons, read_lessons
from bitmill.training.pupil import Pupil
from bitmill.training.settings import Settings
from bitmill.walk import Progress

RECIPE = "nearest : ternary-tensor > bitnet"
SETTINGS = Settings(lr=1e-3, batch=16, context=256, clip=1.0, falls=True)
STATE_BYTES = 20  # of a trained weight: itself, its gradient, two means and what is kept
FINISHED = "weights"


@dataclass(frozen=True, eq=False)
class TernaryPlan:
    """What training would do: the plan of what is written, and the examples.

    Attributes:
        model: whose weights the plan is of; they are there once it is trained.
        scratch: whether it starts from random weights.
        plan: of the file.
        device: where it is trained.
    """

    source: Checkpoint
    model: Trained
    scratch: bool
    plan: Plan
    lessons: Lessons
    settings: Settings
    steps: int
    device: torch.device

    @property
    def peak_bytes(self) -> int:
        """Modelled peak: weights with their optimizer, activations, logits."""
        config = self.model.config
        width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        middle = int(config.get("intermediate_size") or 4 * width)
        tokens = max(self.settings.micro_tokens, self.settings.context)
        activations = 4 * tokens * (width * layers + 12 * width + 6 * middle)
        return (
            BASE_BYTES + STATE_BYTES * self.plan.parameters + activations + 3072 * int(config["vocab_size"])
        )

    def identity(self) -> dict[str, Any]:
        """The fields a resumed run must agree on."""
        return {**self.plan.identity(), "device": str(self.device)}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.plan.to_json(),
            "from": "random weights" if self.scratch else "the source's weights",
            "shape": {k: v for k, v in self.model.config.items() if isinstance(v, int)},
            "steps": self.steps,
            "settings": vars(self.settings),
            "peak_bytes": {"value": self.peak_bytes, "evidence": "modelled"},
        }

    @property
    def headline(self) -> tuple[str, ...]:
        """What matters first."""
        facts = self.lessons.facts
        ternary = sum(math.prod(row.shape) for row in self.plan.rows if row.solved)
        start = "random weights" if self.scratch else f"the weights of {self.model.path}"
        return (
            f"{self.plan.parameters:,} weights, {ternary:,} of them ternary, from {start}",
            f"{self.plan.recipe}: {self.plan.bytes_:,} bytes",
            f"data: {facts['examples']} examples of at most {facts['context']} tokens teach "
            f"({facts['answer_tokens']:,} count), {facts['held_out']} judge",
            f"{self.steps} steps of {self.settings.batch} examples; about {self.peak_bytes / 2**30:.1f} GiB "
            "of memory (modelled)",
        )


def plan_ternary(
    source: Checkpoint,
    data: Path,
    settings: Settings = SETTINGS,
    *,
    recipe: str = RECIPE,
    scratch: bool = False,
    shape: str = "",
    held_out: Path | None = None,
    device: str = "cpu",
    out: Path | None = None,
) -> TernaryPlan:
    """What :func:`train_ternary` would do; reads headers and the examples.

    Raises:
        Refused: with what, where, why, and what would work.
    """
    if shape and not scratch:
        raise Refused("another shape has no weights to start from", fix="add --scratch")
    config = reshaped(source.config, shape)
    refuse_experts(source.tensors)
    lessons = read_lessons(data, load_tokenizer(source), settings.context, settings.seed, held_out)
    steps = settings.steps or math.ceil(len(lessons.taught) / settings.batch)
    told = {
        "source": source.digest,
        "data": [lessons.facts["sha256"], lessons.facts.get("held_out_sha256")],
        "settings": {**vars(settings), "steps": steps},
        "scratch": scratch,
        "shape": shape,
        "version": version("bitmill"),
    }
    model = Trained(source, config, hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest())
    made = plan(parse(recipe), model, out)
    _refuse_rows(made)
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise Refused("there is no GPU that this torch can use", fix="--device cpu")
    return TernaryPlan(source, model, scratch, made, lessons, settings, steps, place)


def train_ternary(
    model: str | Checkpoint,
    data: str | Path,
    out: str | Path,
    *,
    settings: Settings = SETTINGS,
    recipe: str = RECIPE,
    scratch: bool = False,
    shape: str = "",
    held_out: str | Path | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
    boundary: Boundary = lambda _: None,
) -> Report:
    """Train ``model`` with ternary weights on ``data``, and write it by ``recipe``.

    Args:
        model: whose weights, configuration and tokenizer it starts from.
        data, held_out: files that :func:`~bitmill.training.lessons.read_lessons` takes.
        recipe: plain rounding into a layout of ternary weights.
        scratch: start from random weights instead, of another ``shape`` perhaps: ``layers=4,hidden=256``.
        resume: go on from an interrupted run of the same command.
        boundary: called at every durable step (tests).

    Raises:
        Refused: something the user can change; nothing was written.
        Interrupted: a clean stop; the same command goes on.
        Unsolvable: learning diverged before anything was learned.
    """
    started = time.monotonic()
    source = open_source(model, revision=revision) if isinstance(model, str) else model
    aside, out = None if held_out is None else Path(held_out), Path(out)
    asked: dict[str, Any] = {"recipe": recipe, "scratch": scratch, "shape": shape, "held_out": aside}
    made = plan_ternary(source, Path(data), settings, **asked, device=device, out=out)
    return carry_out_plan(made, out, started, force, resume, progress, boundary)


def carry_out_plan(
    made: TernaryPlan,
    out: Path,
    started: float,
    force: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    boundary: Boundary = lambda _: None,
) -> Report:
    """Train as planned; see :func:`train_ternary`."""
    space = Workspace(out, made.plan.files, not made.plan.files[0].path, boundary)
    course = Course(
        made.lessons, made.settings, made.steps, space, progress or (lambda *_: None), "train-ternary"
    )
    return carry_out(_Job(made, course), made.identity(), started, force=force, resume=resume)


@dataclass(frozen=True)
class _Job:
    """Fills a workspace with a trained model."""

    made: TernaryPlan
    course: Course

    @property
    def space(self) -> Workspace:
        return self.course.space

    def tell(self, event: str, done: int, total: int, text: str) -> None:
        self.course.tell(event, done, total, text)

    def run(self, identity: Mapping[str, Any], done: Sequence[Mapping[str, Any]], started: float) -> Report:
        return self.course.report(FINISHED, self._learned, self.made.to_json(), identity, done, started)

    def verify_sample(self) -> None:
        """Read what was written as any reader would.

        Raises:
            Unsolvable: a weight is not what was trained.
        """
        written = self.made.plan.container.open(self.space.payload)
        for row in self.made.plan.rows[:8] if self.made.model.values else ():
            wanted = self._quantized(row).dense()
            if not torch.equal(written.read(row.name).float(), wanted):
                raise Unsolvable("what was written does not read back as what was trained", where=row.name)

    def _learned(self, kept: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        made, settings = self.made, self.course.settings
        model = ternary_model(made.source, made.model.config, made.scratch, settings.seed, made.device)
        body = find_layers(model)[0].rpartition(".")[0]
        named = {name: p for name, p in model.named_parameters() if name in made.model.tensors}
        pupil = Pupil(model, body, named, settings.micro_tokens, settings.clip)
        learned = self.course.learn(pupil, kept)
        made.model.values = learned.values
        for row in made.plan.rows:
            for slot, data in made.plan.container.pack(row, self._quantized(row), made.model).items():
                self.space.write(slot, data)
        facts = {**learned.facts, "zeros": _zeros(made.plan, learned.values)}
        notes = [vars(note) for note in learned.notes]
        self.space.finish_unit(FINISHED, {"tuning": facts, "notes": notes})
        return facts, notes

    def _quantized(self, row: Row) -> Quantized:
        """A weight as it was in the products: ternary first, then on the grid of the file."""
        value = self.made.model.values[row.name]
        return row.grid.round(Ternary().round(value).dense() if row.solved else value)


def _zeros(made: Plan, values: Mapping[str, Tensor]) -> float:
    """Share of the ternary weights that are 0."""
    found = [(Ternary().round(values[row.name]).codes == 1).float() for row in made.rows if row.solved]
    return float(sum(f.sum() for f in found) / sum(f.numel() for f in found))


def _refuse_rows(made: Plan) -> None:
    """Refuse a recipe whose file does not hold what is trained, exactly."""
    if str(made.recipe.solver) != "nearest" or made.recipe.transforms or made.recipe.tune:
        raise Refused(
            f"{made.recipe}: what is trained is written as it is, without a solver or a transform",
            fix=f"{RECIPE!r}, TQ1_0, or 'nearest : tq2_0 > gguf'",
        )
    for row in made.rows:
        if row.solved and not (str(row.grid).startswith(("ternary-tensor", "tq1_0", "tq2_0"))):
            raise Refused(
                f"{row.grid} is no grid of ternary weights",
                where=f"{row.name}: {row.why}",
                fix=f"{RECIPE!r}, or 'nearest : tq2_0 > gguf' where rows are multiples of 256",
            )
