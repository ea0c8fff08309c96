"""From one container to another: what is stored is taken over, tensor by tensor, and read back.

The loop is the mill's, with its journal and its one rename, but nothing is solved: a weight is relabelled
exactly (:mod:`bitmill.relabel`), and every one is compared with its source before it is written and once more
as a reader of the output sees it. What the plan says is placed anew is rounded, and its error is on record.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.account import Report
from bitmill.caching import same_cache
from bitmill.conversion import plan_conversion, target
from bitmill.core.axes import Checkpoint, Container, cache_of, inputs_of
from bitmill.core.errors import Refused, Unsolvable
from bitmill.core.types import Inputs, Note, Quantized, Row
from bitmill.grids.dense import Dense
from bitmill.journal import Boundary, Workspace
from bitmill.mill import carry_out, refuse_existing
from bitmill.numerics.floats import all_finite
from bitmill.planning import Plan
from bitmill.recipe import Recipe
from bitmill.relabel import relabelled, same_values
from bitmill.source import open_source
from bitmill.walk import Progress

_ROWS = 1 << 24  # weights converted to float32 at a time: 64 MiB
_OFFSET_ROUNDING = 2.0**-22
"""A container may store a norm as 1 + w, which keeps w to this and no closer."""


@dataclass
class Transfer:
    """The state of one conversion.

    Attributes:
        plan: what is to be written.
        source: the model.
        space, tell: as in a walk.
        stored: whose quantized weights are taken; the source itself, unless another output of the same
            recipe has them.
        loses: whether weights may be rounded to a grid that does not hold them.
        given: the account of the run that solved ``stored``, where that is not the source.
    """

    plan: Plan
    source: Checkpoint
    space: Workspace
    tell: Progress
    stored: Checkpoint
    loses: bool
    given: Report | None = None
    tensors: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.container: Container = self.plan.container
        self.inputs: Mapping[str, Inputs] = inputs_of(self.stored)
        told = cache_of(self.stored)
        self.cache = {name: how.fixed["scale"] for name, how in told.items() if how.grid.static}

    def run(self, identity: Mapping[str, Any], done: Sequence[Mapping[str, Any]], started: float) -> Report:
        """Every unit that is not done yet; the report of all of them."""
        for record in done:
            self.tensors.update(record["tensors"])
        if done:
            self.tell("resume", len(done), len(done), f"{len(done)} finished units taken over")
        layers = sorted({row.layer for row in self.plan.rows if row.layer is not None})
        units: list[tuple[str, int | None]] = [("outside", None), *((f"block {i}", i) for i in layers)]
        for at, (unit, layer) in enumerate(units[len(done) :], len(done)):
            self.tell("convert", at, len(units), unit)
            before = set(self.tensors)
            for row in self.plan.rows:
                if row.layer == layer:
                    self._row(row)
            fresh = {name: error for name, error in self.tensors.items() if name not in before}
            self.space.finish_unit(unit, {"tensors": fresh})
        self.tell("convert", len(units), len(units), "")
        given = self.given
        return Report(
            path=str(self.space.out),
            plan=self.plan.to_json(),
            calibration={} if given is None else given.calibration,
            notes=self._summary() if given is None else (*given.notes, self._shared(given)),
            tensors=self.tensors if given is None else given.tensors,
            blocks={} if given is None else given.blocks,
            seconds=time.monotonic() - started,
            resumed=len(done),
            identity=identity,
        )

    def verify_sample(self) -> None:
        """Read every tensor of the output as any reader would; it is what the source's is, or what the record
        says was rounded.

        Raises:
            Unsolvable: something else was written; the output never appears.
        """
        written = self.container.open(self.space.payload)
        told = inputs_of(written)
        scales = {row.name: self.cache[row.name] for row in self.plan.rows if row.name in self.cache}
        if not same_cache(cache_of(written), self.plan.rows, scales):
            raise Unsolvable("scales of the cache do not read back as they are", where=str(self.space.out))
        for at, row in enumerate(self.plan.rows):
            self.tell("verify", at, len(self.plan.rows), row.name)
            if row.cache is not None or not self.container.slots(row, self.source):
                continue
            found = written.read(row.name)
            wanted = found if row.name in self.tensors else self._from(row).read(row.name)
            if self.given is not None and isinstance(row.grid, Dense):
                wanted = row.grid.round(wanted).codes
            if not _alike(wanted, found, row) or not _told(row, self.inputs, told):
                raise Unsolvable(
                    "what was written does not read back as what is stored in the source",
                    where=f"{row.name} in {self.plan.recipe.container}",
                    fix="a defect of a container's layout: report it with both containers' names",
                )
        self.tell("verify", len(self.plan.rows), len(self.plan.rows), "")

    def _from(self, row: Row) -> Checkpoint:
        """Whose tensor is taken: a kept one of the model itself, unless a transform has changed it."""
        kept = isinstance(row.grid, Dense) and not self.plan.recipe.transforms
        return self.source if kept else self.stored

    def _row(self, row: Row) -> None:
        if row.cache is not None:
            if row.cache.static:
                self._write(row, row.grid.round(self.cache[row.name]))
            return
        stored = self._from(row).stored(row.name)
        if stored is None or isinstance(stored.grid, Dense):
            self._dense(row, self._from(row).read(row.name))
            return
        if isinstance(row.grid, Dense):
            self._dense(row, stored.dense())
            return
        same = relabelled(stored, row.grid)
        if same is not None:
            if not same_values(stored, same):
                raise Unsolvable(f"{row.grid} does not hold {stored.grid} after all", where=row.name)
            self._write(row, same)
            return
        self._anew(row, stored.dense())

    def _dense(self, row: Row, values: Tensor) -> None:
        """A tensor that was dense, or that becomes so: rounded row by row where it is kept."""
        if not all_finite(values):
            raise Refused("a weight is NaN or infinite", where=f"{row.name} in {self.source.path}")
        if not isinstance(row.grid, Dense):
            self._anew(row, values.float())
            return
        made = row.grid.round(values if values.dtype != torch.float64 else values.float())
        if not torch.equal(made.codes.float(), values.float()):
            self._lost(row, values.float(), made.codes.float())
        self._write(row, made)

    def _anew(self, row: Row, weight: Tensor) -> None:
        if not all_finite(weight):
            raise Refused("a weight is NaN or infinite", where=f"{row.name} in {self.source.path}")
        made = row.grid.round(weight)
        dense = made.dense()
        if not torch.equal(dense, weight):
            self._lost(row, weight, dense)
        self._write(row, made)

    def _lost(self, row: Row, weight: Tensor, dense: Tensor) -> None:
        if self.given is not None and isinstance(row.grid, Dense):
            return  # what is kept is rounded to the recipe's precision, as in any run
        if not self.loses:
            raise Unsolvable(f"{row.grid} does not hold what is stored", where=row.name, fix="--requantize")
        error = float((dense - weight).double().square().sum())
        power = float(weight.double().square().sum())
        squared = error / max(power, 1e-30)
        self.tensors[row.name] = {
            "relative": squared**0.5, "squared": squared, "error": error, "power": power
        }  # fmt: skip

    def _write(self, row: Row, quantized: Quantized) -> None:
        if row.inputs is not None and row.name in self.inputs:
            quantized = replace(quantized, inputs=self.inputs[row.name].fixed)
        for slot, data in self.container.pack(row, quantized, self.source).items():
            self.space.write(slot, data)

    def _shared(self, given: Report) -> Note:
        text = f"its weights were solved once, for {given.path}: only where their bytes lie differs"
        return Note("shared", str(self.space.out), text)

    def _summary(self) -> tuple[Note, ...]:
        """What was lost, in one sentence; nothing where all is exact."""
        if not self.loses or not self.tensors:
            return ()
        errors = [e for e in self.tensors.values() if "power" in e]
        if not errors:
            return ()
        squared = sum(e["error"] for e in errors) / max(sum(e["power"] for e in errors), 1e-30)
        worst, most = max(self.tensors.items(), key=lambda item: item[1].get("squared", 0.0))
        text = (
            f"{len(errors)} of {len(self.plan.rows)} tensors are not the same values: relative squared error "
            f"{squared:.3g} overall, {most['squared']:.3g} at worst ({worst}), of weights alone; "
            "it comes on top of what the source had lost"
        )
        return (Note("requantized", str(self.space.out), text, squared),)


def convert(
    model: str | Checkpoint,
    to: str | Recipe,
    out: str | Path,
    *,
    dtype: str | None = None,
    requantize: bool = False,
    force: bool = False,
    resume: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
    boundary: Boundary = lambda _: None,
) -> Report:
    """Write a quantized model in another container, with the very same values where that can hold them.

    Args:
        model: a quantized folder or file, a hub id, or an open checkpoint.
        to: a container's name (``gptq``, ``compressed-tensors``, ``gguf`` …), which keeps what is stored; or
            a recipe that names grids, ``nearest : q4_k > gguf``, which rounds what they do not hold.
        out: a file or folder that does not exist yet (or ``force``).
        dtype: precision of what is kept (``f32 f16 bf16``); None is the source's, or ``f32`` where only that
            is exact.
        requantize: put what the container cannot hold on its closest grid; the report says what it cost.
        resume: go on from an interrupted run of the same command.
        progress: called as ``progress(event, done, total, text)``.
        boundary: called at every durable step (tests).

    Raises:
        Refused: nothing is quantized, or values would change and nobody asked for that; nothing was written.
        Interrupted: a clean stop; the same command goes on.
    """
    started = time.monotonic()
    out, tell = Path(out), progress or (lambda *_: None)
    source = open_source(model, revision=revision) if isinstance(model, str) else model
    wanted = target(to) if isinstance(to, str) else to
    made = plan_conversion(wanted, source, out, dtype=dtype, requantize=requantize)
    refuse_existing(out, made, force)
    return carry_over(made, source, out, started, loses=asked_for_loss(wanted, requantize), force=force,
                      resume=resume, tell=tell, boundary=boundary)  # fmt: skip


def asked_for_loss(wanted: Recipe, requantize: bool) -> bool:
    """Whether values may change: grids were named, or the closest ones asked for."""
    return requantize or wanted.grid != "as-stored"


def carry_over(
    made: Plan,
    source: Checkpoint,
    out: Path,
    started: float,
    *,
    loses: bool,
    force: bool,
    resume: bool,
    tell: Progress,
    boundary: Boundary = lambda _: None,
) -> Report:
    """Carry out a plan of :func:`~bitmill.conversion.plan_conversion`."""
    space = Workspace(out, made.files, not made.files[0].path, boundary)
    job = Transfer(made, source, space, tell, source, loses)
    return carry_out(job, made.identity(), started, force=force, resume=resume)


def _told(row: Row, wanted: Mapping[str, Inputs], found: Mapping[str, Inputs]) -> bool:
    """Whether a file says of rounding a linear's inputs what it should."""
    if row.inputs is None or row.name not in found:
        return row.inputs is None and row.name not in found
    one = wanted[row.name].fixed if row.name in wanted and row.inputs.fixed else {}
    other = found[row.name]
    same = other.grid == row.inputs and set(one) == set(other.fixed)
    return same and all(torch.equal(one[k].flatten(), other.fixed[k].flatten()) for k in one)


def _alike(wanted: Tensor, found: Tensor, row: Row) -> bool:
    """Whether a tensor reads back as it is in the source, to the bit; what is no matrix, to the rounding of a
    container that stores it with an offset."""
    if wanted.shape != found.shape:
        return False
    for at in range(0, max(len(wanted), 1), max(1, _ROWS // max(wanted[:1].numel(), 1))):
        step = slice(at, at + max(1, _ROWS // max(wanted[:1].numel(), 1)))
        one, other = wanted[step].float(), found[step].float()
        if torch.equal(one, other):
            continue
        close = (one - other).abs() <= _OFFSET_ROUNDING * (1 + one.abs())
        if len(row.shape) > 1 or not bool(close.all()):
            return False
    return True
