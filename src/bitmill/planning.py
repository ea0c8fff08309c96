"""A plan: a recipe resolved against one checkpoint before any weight is read.

Everything a user can get wrong is refused here, with what would work; the predicted bytes are the files'
bytes, because the same file images are what the mill writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitmill.allocation.mixture import Mixture, demands_importance
from bitmill.allocation.uniform import Uniform
from bitmill.caching import cache_remarks, with_cache
from bitmill.checkpoint.gguf_arch import architecture_of_model
from bitmill.checkpoint.gguf_config import unheard
from bitmill.checkpoint.stored_types import requantized, unread
from bitmill.core import registry
from bitmill.core.axes import (
    Allocation,
    CalibratedSolver,
    Checkpoint,
    Choice,
    Container,
    Grid,
    Weight,
    total_bytes,
)
from bitmill.core.errors import Refused
from bitmill.core.learning import BlockSolver
from bitmill.core.rotating import LearnedTransform
from bitmill.core.types import FileImage, Row, TensorFacts
from bitmill.expert_coverage import expert_remarks
from bitmill.families.base import LINEAR_ROLES, Family, describe, is_expert, traits
from bitmill.folding_plan import learning_of, own_head, transform_remarks, with_rotations
from bitmill.forecast import cost, kept_bytes, refuse_folder
from bitmill.inputs import input_remarks, with_inputs
from bitmill.recipe import Recipe
from bitmill.trust.planned import loader_remarks
from bitmill.tuning_plan import in_lots, tuned

BYTES = {"f32": 4, "f16": 2, "bf16": 2}
MATRIX = 2


@dataclass(frozen=True, eq=False)
class Plan:
    """What will be written, row by row, and what it will take.

    Attributes:
        recipe: what was asked.
        family: the model's table (``generic`` when there is none).
        rows: one a tensor.
        files: every output file to the byte.
        container: who lays them out.
        source: digest of the checkpoint.
        dtype: precision of what is kept.
        nsamples, seqlen: calibration, when the recipe needs any.
        needs: ``nothing``, ``diagonal`` or ``gram``.
        peak_bytes: modelled peak of anonymous memory.
        seconds: modelled time on this machine's cores.
        remarks: what a reader must know (an untied head, a seam that is skipped).
        timed: how ``seconds`` was found where it was not modelled: see :mod:`bitmill.timing`.
    """

    recipe: Recipe
    family: Family
    rows: tuple[Row, ...]
    files: tuple[FileImage, ...]
    container: Container
    source: str
    dtype: str
    nsamples: int
    seqlen: int
    needs: str
    peak_bytes: int
    seconds: float
    remarks: tuple[str, ...] = ()
    timed: str = ""

    @property
    def bytes_(self) -> int:
        """Exact size of the output."""
        return total_bytes(self.files)

    @property
    def parameters(self) -> int:
        """Weights stored."""
        return sum(math.prod(row.shape) for row in self.rows if row.cache is None)

    @property
    def bpw(self) -> float:
        """Bits a weight of the whole output, headers and all."""
        return 8 * self.bytes_ / self.parameters

    @property
    def bpw_linears(self) -> float:
        """Bits a weight of the linear layers inside the blocks."""
        linear = [row for row in self.rows if row.role in LINEAR_ROLES]
        bits = sum(row.grid.storage_bits((row.shape[0], row.shape[1])) for row in linear)
        return bits / max(sum(math.prod(row.shape) for row in linear), 1)

    @property
    def disk_bytes(self) -> int:
        """The most that is on disk while it is made: the output, and what a resumed run would go on from."""
        if self.needs == "nothing":
            return self.bytes_
        blocks: Counter[int] = Counter()
        for row in self.rows:
            if row.layer is not None:
                blocks[row.layer] += math.prod(row.shape)
        width = next((row.shape[1] for row in self.rows if row.role == "embed"), 0)
        solver = self.recipe.make_solver()
        along = isinstance(solver, BlockSolver) or (isinstance(solver, CalibratedSolver) and solver.cross)
        weights = max(blocks.values(), default=0)
        return self.bytes_ + kept_bytes(width, self.nsamples * self.seqlen, len(blocks), weights, along)

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """Rows whose shape forced another grid than the one asked for."""
        return tuple(row for row in self.rows if row.fallback)

    @property
    def learned_rotations(self) -> str | None:
        """What learns rotations before the walk, as the recipe calls it; None where nothing does."""
        made = zip(self.recipe.transforms, self.recipe.make_transforms(), strict=True)
        return next((str(call) for call, t in made if isinstance(t, LearnedTransform)), None)

    @property
    def calibrates(self) -> bool:
        """Whether a run looks at text."""
        learns = self.recipe.tune is not None or self.learned_rotations is not None
        return self.needs != "nothing" or learns

    @property
    def headline(self) -> tuple[str, ...]:
        """What matters first: the recipe, how much of it a shape changed, the size, the cost."""
        lines = [str(self.recipe)]
        if self.fallbacks:
            share = sum(math.prod(r.shape) for r in self.fallbacks) / self.parameters
            kinds = Counter(f"{r.fallback} -> {r.grid}" for r in self.fallbacks)
            listed = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common())
            lines.insert(
                0,
                f"shapes force another type on {share:.1%} of the weights ({listed}); --strict refuses this",
            )
        lines += self.remarks
        lines.append(
            f"{self.bytes_:,} bytes, {self.bpw:.3f} bits a weight ({self.bpw_linears:.3f} in the linears)"
        )
        lines.append(
            f"about {self.peak_bytes / 2**30:.1f} GiB of memory, {self.disk_bytes / 2**30:.1f} GiB of disk "
            f"while it runs and {_minutes(self.seconds)} (modelled{f'; {self.timed}' if self.timed else ''})"
        )
        return tuple(lines)

    @property
    def digest(self) -> str:
        """Identity of the output, but for what calibration saw and the device."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The fields a resumed run must agree on."""
        return {
            "recipe": str(self.recipe),
            "source": self.source,
            "dtype": self.dtype,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "bitmill": version("bitmill"),
            "files": [[f.path, f.bytes_, hashlib.sha256(f.head).hexdigest()] for f in self.files],
        }

    def explain(self, name: str) -> str:
        """Why one tensor is stored the way it is.

        Raises:
            Refused: the model has no such tensor.
        """
        for row in self.rows:
            if row.name == name:
                instead = f", instead of {row.fallback}" if row.fallback else ""
                inputs = f"; its inputs on {row.inputs}" if row.inputs else ""
                turned = f"; for inputs in a Hadamard basis of order {row.turn}" if row.turn else ""
                return f"{row.name}: {row.grid} ({row.why}){instead}{inputs}{turned}"
        raise Refused(
            f"the model has no tensor {name!r}", fix="names are Hugging Face's, see `bitmill plan --json`"
        )

    def to_json(self) -> dict[str, Any]:
        """The whole plan as plain values."""
        return {
            "recipe": str(self.recipe),
            "family": self.family.name,
            "container": self.recipe.container.replace("_", "-"),
            "source": self.source,
            "digest": self.digest,
            "bytes": self.bytes_,
            "bpw": self.bpw,
            "bpw_linears": self.bpw_linears,
            "parameters": self.parameters,
            "dtype": self.dtype,
            "calibration": {"needs": self.needs, "nsamples": self.nsamples, "seqlen": self.seqlen},
            "peak_bytes": {"value": self.peak_bytes, "evidence": "modelled"},
            "disk_bytes": {"value": self.disk_bytes, "evidence": "modelled"},
            "seconds": {"value": self.seconds, "evidence": self.timed or "modelled"},
            "remarks": list(self.remarks),
            "files": [{"path": f.path, "bytes": f.bytes_} for f in self.files],
            "rows": [
                {
                    "name": r.name,
                    "role": r.role,
                    "layer": r.layer,
                    "shape": list(r.shape),
                    "grid": str(r.grid),
                    "solved": r.solved,
                    "why": r.why,
                    "fallback": r.fallback,
                    "inputs": str(r.inputs) if r.inputs else None,
                    "cache": str(r.cache) if r.cache else None,
                    "turn": r.turn,
                }
                for r in self.rows
            ],
        }


def plan(
    recipe: Recipe,
    checkpoint: Checkpoint,
    out: Path | None = None,
    *,
    nsamples: int = 128,
    seqlen: int = 512,
    strict: bool = False,
    calibrated: bool = False,
) -> Plan:
    """Resolve ``recipe`` against ``checkpoint``; reads headers only.

    Args:
        out: where the result would go; its folder must be writable and have room.
        nsamples, seqlen: calibration windows and their length.
        strict: refuse when a shape would force another grid, or nobody is known to load the output rightly.
        calibrated: whether moments will be there although the solver does not ask for them.

    Raises:
        Refused: with what, where, why, and what would work.
    """
    family = describe(checkpoint.config)
    container = recipe.make_container()
    solver = recipe.make_solver()
    transforms = recipe.make_transforms()
    needs = max((solver.needs, *(t.needs for t in transforms)), key=["nothing", "diagonal", "gram"].index)
    tune = recipe.make_tune()
    if calibrated and needs == "nothing" and not (tune is not None and tune.weights):
        needs = "diagonal"
    dtype = recipe.dtype or (recipe.grid if recipe.grid in BYTES else source_dtype(checkpoint))
    remarks = transform_remarks(recipe, family, checkpoint)
    facts = _facts(recipe, family, checkpoint)
    told = needs != "nothing"
    rows = _rows(recipe, family, container, checkpoint, facts, dtype, told)
    blind = _blind(recipe, rows)
    if blind is not None:
        rows = _rows(recipe, family, container, checkpoint, facts, dtype, True)
        if needs == "nothing":
            needs = "diagonal"
            remarks += (f"{blind.grid} needs to know a weight's inputs: the run calibrates first",)
    rows, said = _at_run_time(recipe, rows, container, checkpoint)
    remarks += said + _unheard(recipe, rows, container, checkpoint, dtype)
    fixing = (grid.fixed for row in rows for grid in (row.cache, row.inputs) if grid is not None)
    if needs == "nothing" and any(fixing):
        needs = "diagonal"
    again = requantized(checkpoint) if any(str(row.grid) not in BYTES for row in rows) else None
    remarks += tuple(said for said in (again, unread(checkpoint)) if said is not None)
    if recipe.container == "gguf":
        remarks += unheard(checkpoint.config, architecture_of_model(checkpoint.config))
    _refuse_rows(recipe, rows, container, solver, strict)
    remarks += expert_remarks(recipe, rows, family, solver, checkpoint, needs, nsamples * seqlen)
    recipe, said = in_lots(recipe, rows, checkpoint.config, nsamples, seqlen)
    remarks, tune = remarks + said, recipe.make_tune()
    provenance = {"recipe": str(recipe), "source": checkpoint.digest, "version": version("bitmill")}
    files = container.files(rows, checkpoint, provenance)
    remarks += loader_remarks(files, strict)
    if out is not None and files[0].path and out.suffix == ".gguf":
        raise Refused("this output is a folder", where=str(out), fix=f"-o {out.with_suffix('')}")
    said, learning = learning_of(recipe, rows, checkpoint, nsamples, seqlen)
    remarks += said
    calibration = (nsamples, seqlen) if needs != "nothing" or tune or learning[0] else (0, 0)
    fitted = any(transform.needs != "nothing" for transform in transforms)
    taken = cost(rows, checkpoint.config, solver, needs, *calibration, fitted)
    taken = (max(taken[0], learning[0]), taken[1] + learning[1])
    if tune is not None:
        said, taken = tuned(rows, checkpoint.config, str(recipe.tune), tune, *calibration, taken)
        remarks += said
    settled = (checkpoint.digest, dtype, *calibration, needs, *taken, remarks)
    made = Plan(recipe, family, rows, files, container, *settled)
    if out is not None:
        refuse_folder(out, made.disk_bytes)
    return made


def _at_run_time(
    recipe: Recipe, rows: tuple[Row, ...], container: Container, checkpoint: Checkpoint
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """The rows with what a runtime is to do beside its products: round inputs and a cache, rotate."""
    called = recipe.container.replace("_", "-")
    rows = with_inputs(rows, recipe.input, container, called)
    rows = with_cache(rows, recipe.cache, container, called, checkpoint.config)
    rows, said = with_rotations(rows, recipe, container, checkpoint)
    return rows, input_remarks(rows, checkpoint) + cache_remarks(rows, checkpoint) + said


def placed(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Row, ...]:
    """The rows that a plan of ``recipe`` would have, without files: all that shapes alone can say.

    Raises:
        Refused: the recipe cannot work on these shapes.
    """
    family, container, solver = describe(checkpoint.config), recipe.make_container(), recipe.make_solver()
    dtype = recipe.dtype or (recipe.grid if recipe.grid in BYTES else source_dtype(checkpoint))
    told = solver.needs != "nothing" or any(t.needs != "nothing" for t in recipe.make_transforms())
    asked = (recipe, family, container, checkpoint, _facts(recipe, family, checkpoint), dtype)
    rows = _rows(*asked, told)
    rows = rows if _blind(recipe, rows) is None else _rows(*asked, True)
    _refuse_rows(recipe, rows, container, solver, False)
    return rows


def source_dtype(checkpoint: Checkpoint) -> str:
    """Precision most of the source's matrices are stored in: what is kept keeps it."""
    sizes: Counter[str] = Counter()
    for fact in checkpoint.tensors.values():
        if len(fact.shape) == MATRIX:
            sizes[fact.dtype] += math.prod(fact.shape)
    return sizes.most_common(1)[0][0] if sizes else "f32"


def _facts(recipe: Recipe, family: Family, checkpoint: Checkpoint) -> Mapping[str, TensorFacts]:
    """The tensors that are placed: the checkpoint's, and a head of its own where one becomes needed."""
    return {**checkpoint.tensors, **own_head(recipe, family, checkpoint)}


def _rows(
    recipe: Recipe,
    family: Family,
    container: Container,
    checkpoint: Checkpoint,
    facts: Mapping[str, TensorFacts],
    dtype: str,
    imatrix: bool,
) -> tuple[Row, ...]:
    roles = dict(recipe.roles)
    allocation: Allocation = Uniform(recipe.grid, tensors=recipe.tensors)
    if recipe.is_mixture:
        allocation = Mixture(recipe.grid, recipe.pure, recipe.tensors, roles.get("head"))
    model = {**traits(checkpoint.config), "imatrix": int(imatrix)}
    model["tied"] = int("lm_head.weight" not in facts)
    if model["tied"] and "head" in roles and recipe.container == "gguf" and not recipe.is_mixture:
        roles.setdefault("embed", roles["head"])  # GGUF has one matrix for both
    rows = []
    for name, fact in facts.items():
        role, layer = family.role(name)
        if role == "linear" and (len(fact.shape) != MATRIX or not name.endswith(".weight")):
            role = "other"
        stored = _stored(recipe, container, checkpoint, name, fact.shape) if recipe.tensors else ""
        weight = Weight(name, role, layer, fact.shape, model["layers"], model, stored)
        choice = None
        if role in recipe.keep or len(fact.shape) != MATRIX:
            why = "kept: asked for" if role in recipe.keep else "kept: not a matrix"
        elif role in roles:
            choice, why = Choice(roles[role], f"{role}={roles[role]}"), ""
        else:
            stack = (model["experts"], *fact.shape) if is_expert(name) else fact.shape
            choice, why = allocation.choose(replace(weight, shape=stack)), "kept: not a weight of a block"
        if choice is None:
            grid = registry.parse_grid(container.default_grid(dtype, role))
            rows.append(Row(name, role, layer, fact.shape, grid, False, why))
        else:
            rows.append(_placed(recipe, container, weight, choice, dtype))
    return tuple(replace(row, dtype=dtype) for row in rows)


def _stored(
    recipe: Recipe, container: Container, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]
) -> str:
    """The name that patterns are searched in: in GGUF the container's, empty when it has no place for the
    tensor; elsewhere the model's own."""
    if recipe.container != "gguf":
        return name
    row = Row(name, "other", None, shape, registry.parse_grid("f32"), False, "")
    return next(iter(container.slots(row, checkpoint)), "").partition("[")[0]


def _blind(recipe: Recipe, rows: Sequence[Row]) -> Row | None:
    """The first row that cannot be stored well without knowing its inputs."""
    return next((row for row in rows if demands_importance(recipe.grid, row.role, str(row.grid))), None)


def _unheard(
    recipe: Recipe, rows: Sequence[Row], container: Container, checkpoint: Checkpoint, dtype: str
) -> tuple[str, ...]:
    """What the recipe says of single tensors, and no tensor is that way."""
    remarks = []
    if recipe.tensors:
        matrices = [row for row in rows if len(row.shape) == MATRIX]
        stored = [_stored(recipe, container, checkpoint, row.name, row.shape) for row in matrices]
        unused = [p for p, _ in recipe.tensors if not any(re.search(p, name) for name in stored)]
        remarks += [f"/{pattern}/ is in no matrix's name" for pattern in unused]
    present = {row.role: row for row in rows}
    remarks += [f"keep={role} is for no tensor" for role in recipe.keep if role not in present]
    for role, grid in recipe.roles:
        embed = present.get("embed")
        settled = str(container.adapt(registry.parse_grid(grid), dtype))
        if role in present or (role == "head" and embed and settled in (str(embed.grid), embed.fallback)):
            continue
        shared = role == "head" and embed is not None
        why = ": the embedding is also the head, and is on a grid of its own" if shared else ""
        remarks.append(f"{role}={grid} is for no tensor{why}")
    return tuple(remarks)


def _placed(recipe: Recipe, container: Container, weight: Weight, choice: Choice, dtype: str) -> Row:
    grid = container.adapt(registry.parse_grid(choice.grid), dtype)
    fallback, why = choice.fallback, choice.why
    refusal = grid.refuses(weight.shape)
    if refusal is not None and recipe.fallback is not None:
        fallback, why = str(grid), f"fallback: {refusal}"
        grid = container.adapt(registry.parse_grid(recipe.fallback), dtype)
        refusal = grid.refuses(weight.shape)
    if refusal is not None:
        raise Refused(
            f"{grid} cannot hold a weight of shape {list(weight.shape)}: {refusal}",
            where=weight.name,
            fix=_fitting(grid, weight)
            + f"say what such weights get instead, e.g. fallback={_roomy(grid)}, or keep={weight.role}",
        )
    return Row(
        weight.name, weight.role, weight.layer, weight.shape, grid, weight.role in LINEAR_ROLES, why, fallback
    )


def _fitting(grid: Grid, weight: Weight) -> str:
    """The largest power of two that would divide a row into groups, where the grid's own does not."""
    step = weight.shape[1] & -weight.shape[1]
    return f"groups of {step}, if the grid has them; or " if 16 <= step < grid.block[1] else ""


def _roomy(grid: Grid) -> str:
    """A grid of the same world that takes nearly any shape: what a refusal proposes."""
    return "q8_0" if str(grid).startswith("q") else "int8-channel-sym"


def _refuse_rows(
    recipe: Recipe, rows: Sequence[Row], container: Container, solver: Any, strict: bool
) -> None:
    for row in rows:
        reason = container.refuses(row.grid, row.role, row.shape)
        if reason is not None:
            raise Refused(
                f"{recipe.container.replace('_', '-')} cannot hold {row.grid} as {row.role}: {reason}",
                where=row.name,
            )
        reason = solver.refuses(row.grid) if row.solved else None
        if reason is not None:
            raise Refused(f"{recipe.solver} cannot place weights on {row.grid}: {reason}", where=row.name)
    if not any(row.solved for row in rows) and str(recipe.grid).lower() not in BYTES:
        raise Refused(
            "the recipe leaves every weight as it is",
            fix="shorten keep=…, or check that this architecture's weights are under model.layers",
        )
    fallbacks = [row for row in rows if row.fallback]
    if strict and fallbacks:
        first = fallbacks[0]
        raise Refused(
            f"--strict: shapes force another type on {len(fallbacks)} of {len(rows)} tensors",
            where=f"{first.name}: {first.fallback} -> {first.grid}, shape {list(first.shape)}",
            fix="choose types whose block divides the row, e.g. 32-blocks (q4_0, q8_0), or drop --strict",
        )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
