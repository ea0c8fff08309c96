"""Several outputs of one model: planned together, calibrated on the same windows, solved once where alike.

Every output is what it would be alone, byte for byte. Windows of text are drawn once. Outputs whose recipes
differ in nothing but where bytes lie share their solution: the first is solved, the others take its weights.
All others have a walk of their own, because each block's moments are those of that output's own quantized
blocks before it: recipes that shared one pass would not see their own error. Moments from a file are the same
for all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bitmill.account import Report
from bitmill.calibrate.tokens import Calibration
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.types import Row
from bitmill.forecast import refuse_folder
from bitmill.grids.dense import Dense
from bitmill.journal import Boundary, Workspace
from bitmill.mill import Job, Told, carry_out, identity_of, refuse_existing
from bitmill.planning import Plan
from bitmill.recipe import Recipe, parse
from bitmill.rotating import with_rotating
from bitmill.source import open_source
from bitmill.transfer import Transfer
from bitmill.tuning import with_tuning
from bitmill.walk import Progress, Walk


def quantize_many(
    model: str | Checkpoint,
    recipes: Sequence[str | Recipe],
    outs: Sequence[str | Path],
    *,
    calib: Sequence[str] | str | Tensor | None = None,
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    chat: bool = False,
    device: str = "cpu",
    moments: str | Path | None = None,
    imatrix: str | Path | Sequence[str | Path] = (),
    imatrix_missing: str = "plain",
    force: bool = False,
    strict: bool = False,
    resume: bool = True,
    revision: str | None = None,
    progress: Progress | None = None,
    boundary: Boundary = lambda _: None,
) -> tuple[Report, ...]:
    """Quantize ``model`` by each of ``recipes`` into the output of the same place in ``outs``.

    Each output is, byte for byte, what :func:`bitmill.quantize` makes alone. All are planned, and refused,
    before any work; they appear one after the other, each whole or not at all, and the same call goes on.
    Calibration windows are drawn once; recipes that differ in their container only are solved once. Any
    others run the model once each, since moments belong to an output's own quantized blocks; ``moments``
    from a file spares them that.

    Args:
        recipes, outs: as many of each.
        calib, nsamples, seqlen, seed, chat, device, moments, imatrix, imatrix_missing, force, strict, resume,
        revision, progress, boundary: as of :func:`bitmill.quantize`, for all of them.

    Raises:
        Refused: something the user can change; nothing was written.
        Interrupted: a clean stop; outputs that are finished stay, the same call goes on.
    """
    tell = progress or (lambda *_: None)
    source = open_source(model, revision=revision) if isinstance(model, str) else model
    wanted = [parse(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    told = Told.of(calib, nsamples, seqlen, seed, chat, moments, imatrix, imatrix_missing)
    paths = [Path(out) for out in outs]
    plans = plan_many(told, source, wanted, paths, strict=strict)
    for path, made in zip(paths, plans, strict=True):
        refuse_existing(path, made, force)
    reports: list[Report] = []
    drawn: dict[bool, Calibration] = {}
    for at, (made, out) in enumerate(zip(plans, paths, strict=True)):
        started = time.monotonic()
        tell("output", at, len(paths), str(out))
        own = told.own_text(made)
        known, calibration = told.known(made, source, tell, drawn.get(own))
        if calibration.tokens.numel():
            drawn[own] = calibration
        space = Workspace(out, made.files, not made.files[0].path, boundary)
        first = next((i for i in range(at) if solved_alike(plans[i], made)), None)
        job: Job
        if first is None:
            walk = Walk(made, source, space, tell, calibration, known, device, False)
            job = with_rotating(walk, with_tuning(walk))
        else:
            solved = plans[first].container.open(paths[first])
            job = Transfer(made, source, space, tell, solved, False, reports[first])
        identity = identity_of(made, calibration, device)
        reports.append(carry_out(job, identity, started, force=force, resume=resume))
    tell("output", len(paths), len(paths), "")
    return tuple(reports)


def plan_many(
    told: Told, source: Checkpoint, recipes: Sequence[Recipe], outs: Sequence[Path], *, strict: bool
) -> list[Plan]:
    """The plan of each output, once they fit together.

    Raises:
        Refused: their numbers differ, two are in one place, the disk is too small for all, or any of them is.
    """
    if len(recipes) != len(outs) or not outs:
        raise Refused(
            f"{len(recipes)} recipes and {len(outs)} outputs",
            fix="a recipe for each output, in the same order",
        )
    places = [Path(os.path.abspath(out)) for out in outs]
    for at, place in enumerate(places):
        if any(place == other or other in place.parents or place in other.parents for other in places[:at]):
            raise Refused(
                "two outputs are in one place", where=str(outs[at]), fix="give each a path of its own"
            )
    plans = [told.plan(recipe, source, out, strict) for recipe, out in zip(recipes, outs, strict=True)]
    sizes: dict[int, int] = {}
    for place, made in zip(places, plans, strict=True):
        disk = _disk(place)
        sizes[disk] = sizes.get(disk, 0) + made.bytes_
        refuse_folder(place, sizes[disk])
    return plans


def solved_alike(one: Plan, other: Plan) -> bool:
    """Whether the weights of two outputs are the same values on the same grids, so that one run solves both.

    What is kept may differ in precision, unless a transform has changed it on its way.
    """
    alike = (one.recipe.transforms, one.recipe.solver, one.needs, one.nsamples, one.seqlen)
    if one.recipe.tune is not None or other.recipe.tune is not None:
        return False  # norms are not the source's either, and what is learned is each container's own
    if any(row.turn for row in one.rows):
        return False  # what is stored for rotated inputs reads back as dense weights
    if alike != (other.recipe.transforms, other.recipe.solver, other.needs, other.nsamples, other.seqlen):
        return False
    changed = bool(one.recipe.transforms)
    if changed and one.family.norm_offset:
        return False  # a container that stores 1 + w keeps it less exactly than the walk had it
    same = {_key(row, changed) for row in one.rows} == {_key(row, changed) for row in other.rows}
    return same and any(not isinstance(row.grid, Dense) for row in one.rows)


def _key(row: Row, kept_too: bool) -> Row:
    """A row without what makes no difference to its values."""
    kept = isinstance(row.grid, Dense) and not kept_too
    calibrated = row.cache or (row.inputs and row.inputs.fixed)  # scales are rounded to what is kept
    dtype, grid = row.dtype if calibrated else "", Dense("f32") if kept else row.grid
    return replace(row, grid=grid, why="", fallback=None, dtype=dtype)


def _disk(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return path.stat().st_dev
