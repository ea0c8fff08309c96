"""The plan of a conversion: which grid of another container holds each stored tensor, and whether exactly.

A conversion is a plan like any other, whose rows carry what is stored already: a weight keeps its grid, or
takes one that holds the very same values (:mod:`bitmill.relabel`). Whether one does depends on the numbers
and not on headers alone, so a quantized source is read once here, a tensor at a time. What no grid of the
container holds is refused, or put on the closest one where that was asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from bitmill.caching import with_stored_cache
from bitmill.checkpoint.read_only import ReadOnly
from bitmill.checkpoint.stored_types import type_of, unread
from bitmill.core import registry
from bitmill.core.axes import (
    Checkpoint,
    Container,
    Grid,
    InputContainer,
    inputs_of,
    total_bytes,
)
from bitmill.core.errors import BadRecipe, Refused
from bitmill.core.types import FileImage, Row, TensorFacts
from bitmill.families.base import LINEAR_ROLES, Family, describe
from bitmill.forecast import BASE_BYTES, refuse_folder, rounding_seconds
from bitmill.grids.dense import Dense
from bitmill.planning import MATRIX, Plan, plan
from bitmill.recipe import Call, Recipe, parse
from bitmill.relabel import relabelled
from bitmill.substitutes import dense_grid, dense_only, lays_out, nearest_first, same_grid, why_not
from bitmill.trust.planned import loader_remarks

AS_STORED = "as-stored"
"""Stands for the grid in the name of a conversion that keeps what is stored."""
VERB = "convert"
_GROWN = 1.05
_ANEW = "requantized from"  # why a row is on another grid than its source
_RATE = 60e6  # weights a second that are read, compared and written as they are
_UNPACKED = 7e6  # weights a second that are unpacked for the plan, the file and two comparisons


@dataclass(frozen=True, eq=False)
class _Found:
    """What was found out about one tensor.

    Attributes:
        row: without a grid that is certain.
        stored: what it is stored on in the source, for a reader.
        grids: by precision of what is kept: the grid that holds it exactly, or None.
        why: why there is none.
    """

    row: Row
    stored: str
    grids: Mapping[str, Grid | None]
    why: str = ""


def writable() -> tuple[str, ...]:
    """Names of the containers that can be converted to."""
    return tuple(
        name for name, cls in registry.members("containers").items() if not issubclass(cls, ReadOnly)
    )


def target(text: str) -> Recipe:
    """What to convert to: a container's name keeps what is stored; a recipe names grids as well.

    Raises:
        BadRecipe: it is neither, or a recipe that only ``bitmill quantize`` can follow.
    """
    name = text.strip().lower().replace("-", "_").removeprefix(">").strip()
    if name.partition("(")[0] in registry.names("containers"):
        return replace(parse(f"nearest : f32 > {name}"), solver=Call(VERB), grid=AS_STORED)
    if name not in ("f32", "f16", "bf16") and ":" not in text and ">" not in text:
        known = ", ".join(n.replace("_", "-") for n in writable())
        try:
            recipe = parse(text)
        except BadRecipe as error:
            raise BadRecipe(
                f"no container or recipe is called {text!r}", fix=f"containers: {known}"
            ) from error
    else:
        recipe = parse(text)
    if recipe.transforms or recipe.tune is not None or recipe.solver != Call("nearest"):
        raise BadRecipe(
            f"{recipe.tune or recipe.solver} needs the original weights: a conversion places nothing anew "
            "but by rounding",
            where=str(recipe),
            fix=f"bitmill quantize MODEL {text!r} from the original model, or only a container or grid here",
        )
    return replace(recipe, solver=Call(VERB))


def plan_conversion(
    wanted: Recipe,
    source: Checkpoint,
    out: Path | None = None,
    *,
    dtype: str | None = None,
    requantize: bool = False,
) -> Plan:
    """Resolve a conversion; reads every stored tensor once and writes nothing.

    Args:
        wanted: as :func:`target` makes it.
        dtype: precision of what is kept; None keeps the source's, or takes ``f32`` where only that is exact.
        requantize: whether what cannot be kept may go on the closest grid.

    Raises:
        Refused: nothing is quantized, or something would lose and ``requantize`` does not allow it.
    """
    dtype = dtype or wanted.dtype
    if wanted.grid != AS_STORED:
        return _on_named_grids(wanted, source, out, dtype)
    family, container = describe(source.config), wanted.make_container()
    call = Call(VERB, (("requantize", True),) if requantize else ())
    asked = [dtype] if dtype else list(dict.fromkeys((kept_dtype(source), "f32")))
    found = [_find(source, family, container, facts, asked) for facts in source.tensors.values()]
    if not any(f.stored for f in found):
        raise Refused(
            "nothing in this model is quantized: there is nothing to convert",
            where=str(source.path),
            fix="bitmill quantize MODEL RECIPE -o OUT",
        )
    chosen = next((d for d in asked if all(f.grids[d] is not None for f in found)), asked[0])
    lost = [f for f in found if f.grids[chosen] is None]
    if lost and not requantize:
        raise _refused(wanted, container, source, chosen, lost, [f for f in found if f.stored])
    closest = _closest_grids(source, container, chosen, found, lost)
    rows, unsaid = _with_inputs([_row(f, chosen, closest) for f in found], container, source)
    rows, unheard = with_stored_cache(rows, container, source)
    recipe = replace(wanted, solver=call, dtype=dtype)
    rows, files = _laid_out(rows, found, recipe, container, source, chosen)
    remarks = [
        *_dtype_remarks(asked, chosen, found),
        *_growth(rows, source),
        *_losses(closest, lost),
        *unsaid,
        *unheard,
        *loader_remarks(files),
        *filter(None, [unread(source)]),
    ]
    return _made(recipe, family, rows, files, container, source, chosen, tuple(remarks), out)


def kept_dtype(source: Checkpoint) -> str:
    """Precision of most of what is not quantized: matrices decide, where there are any."""
    sizes: Counter[str] = Counter()
    for fact in source.tensors.values():
        if type_of(source, fact.name) == fact.dtype:
            sizes[fact.dtype] += math.prod(fact.shape)
    return sizes.most_common(1)[0][0] if sizes else "f32"


def _on_named_grids(wanted: Recipe, source: Checkpoint, out: Path | None, dtype: str | None) -> Plan:
    """A conversion to grids that were named: rows of that recipe, said to be exact where they are."""
    recipe = replace(wanted, dtype=dtype or kept_dtype(source))
    made = plan(replace(recipe, solver=Call("nearest")), source, out, nsamples=0, seqlen=0)
    if made.needs != "nothing":
        raise Refused(
            "this recipe has to see the inputs of weights, and a conversion runs no model",
            where=str(wanted),
            fix="bitmill quantize MODEL RECIPE -o OUT, from the original model",
        )
    rows = []
    for row in made.rows:
        stored = source.stored(row.name)
        if stored is None or isinstance(stored.grid, Dense):
            rows.append(row)
            continue
        exact = isinstance(row.grid, Dense) or relabelled(stored, row.grid) is not None
        was = str(stored.grid)
        rows.append(replace(row, why=_said(was, row.grid) if exact else f"{_ANEW} {was}"))
    told, lost = _with_inputs(made.rows, made.container, source)
    rows = [replace(row, inputs=one.inputs) for row, one in zip(rows, told, strict=True)]
    (*rows,), unheard = with_stored_cache(rows, made.container, source)
    told = (*told, *rows[len(told) :])
    files = made.container.files(told, source, _provenance(recipe, source))
    known = ("the source is quantized already", "the source rounds ")
    remarks = [r for r in made.remarks if not r.startswith(known)]
    remarks += [*_growth(rows, source), *lost, *unheard]
    return _made(
        recipe, made.family, tuple(rows), files, made.container, source, made.dtype, tuple(remarks), out
    )


def _find(
    source: Checkpoint, family: Family, container: Container, facts: TensorFacts, dtypes: Sequence[str]
) -> _Found:
    """Whether ``container`` holds one tensor exactly, for each precision of what is kept."""
    role, layer = family.role(facts.name)
    if role == "linear" and (len(facts.shape) != MATRIX or not facts.name.endswith(".weight")):
        role = "other"
    row = Row(facts.name, role, layer, facts.shape, Dense("f32"), False, "")
    kind = type_of(source, facts.name)
    if kind == facts.dtype:
        read = partial(source.read, facts.name)
        return _Found(row, "", {d: dense_grid(container, role, d, kind, read) for d in dtypes})
    row = replace(row, solved=role in LINEAR_ROLES and layer is not None)
    stored = source.stored(facts.name)
    said = kind if stored is None else str(stored.grid)
    grids = {d: same_grid(stored, container, role, d) if stored is not None else None for d in dtypes}
    if None in grids.values() and (not row.solved or dense_only(container, row.role)):
        read = partial(source.read, facts.name)
        grids = {d: g or dense_grid(container, role, d, kind, read) for d, g in grids.items()}
    return _Found(row, said, grids, why_not(stored, container, row, dtypes[0]))


def _said(stored: str, grid: Grid) -> str:
    if isinstance(grid, Dense):
        return f"decoded from {stored}"
    return "as stored" if str(grid) == stored else f"the values of {stored}"


def _row(found: _Found, dtype: str, closest: Mapping[tuple[str, str, int], Grid]) -> Row:
    grid = found.grids[dtype]
    if grid is not None:
        why = _said(found.stored, grid) if found.stored else "kept"
        return replace(found.row, grid=grid, why=why, dtype=dtype)
    grid = closest[_class(found)]
    why = f"{_ANEW} {found.stored}" if found.stored else f"kept, rounded to {grid}"
    return replace(found.row, grid=grid, why=why, dtype=dtype)


def _class(found: _Found) -> tuple[str, str, int]:
    """Tensors that get the same closest grid."""
    kind = "linear" if found.row.solved else found.row.role
    return found.stored, kind, found.row.shape[-1] if found.row.shape else 1


def _closest_grids(
    source: Checkpoint, container: Container, dtype: str, found: Sequence[_Found], lost: Sequence[_Found]
) -> dict[tuple[str, str, int], Grid]:
    """By class of tensors: the grid with the least error on some rows of the first, at about the bits that
    are stored; dense for what was not a quantized weight of a block."""
    chosen: dict[tuple[str, str, int], Grid] = {}
    kept = [replace(f.row, grid=Dense(container.default_grid(dtype, f.row.role))) for f in found]
    for one in lost:
        if _class(one) in chosen:
            continue
        if not one.row.solved or dense_only(container, one.row.role):
            chosen[_class(one)] = Dense(container.default_grid(dtype, one.row.role))
            continue
        for grid in nearest_first(source, one.row, container, dtype):
            rows = [
                replace(r, grid=grid) if _class(f) == _class(one) else r
                for f, r in zip(found, kept, strict=True)
            ]
            if lays_out(container, rows, source):
                chosen[_class(one)] = grid
                break
        else:
            raise Refused(f"no grid there takes a weight of shape {list(one.row.shape)}", where=one.row.name)
    return chosen


def _with_inputs(
    rows: Sequence[Row], container: Container, source: Checkpoint
) -> tuple[tuple[Row, ...], list[str]]:
    """The rows with what the source says of rounding their inputs; a remark where the file cannot say it."""
    told, left, made = inputs_of(source), Counter[str](), []
    for row in rows:
        how = told[row.name] if row.name in told and row.inputs is None else None
        if how is not None:
            able = (
                isinstance(container, InputContainer)
                and how.basis is None
                and not container.refuses_inputs(row.grid, how.grid)
            )
            left.update([] if able else [str(how)])
            row = replace(row, inputs=how.grid) if able else row
        made.append(row)
    remarks = [
        f"the inputs of {n} weights are rounded to {grid} in the source; this output does not say so, and "
        "its readers leave them as they are"
        for grid, n in left.most_common()
    ]
    return tuple(made), remarks


def _refused(
    wanted: Recipe,
    container: Container,
    source: Checkpoint,
    dtype: str,
    lost: Sequence[_Found],
    quantized: Sequence[_Found],
) -> Refused:
    name = wanted.container.replace("_", "-")
    weights = [f for f in lost if f.stored and f.row.solved] or [f for f in lost if f.stored] or list(lost)
    first = weights[0]
    if not first.stored or not first.row.solved:
        kind = container.default_grid(dtype, first.row.role)
        wide = container.default_grid("f32", first.row.role) == "f32"
        return Refused(
            f"{name} keeps this as {kind}, which would round it"
            + (f", and {len(lost) - 1} more" if lost[1:] else ""),
            where=first.row.name,
            fix=f"{'--dtype f32 keeps all; ' if wide else ''}--requantize rounds, and says what that costs",
        )
    near = nearest_first(source, first.row, container, dtype)
    offer = (
        f"--requantize puts them on the closest grid, here {near[0]}, and says what that costs; "
        if near
        else ""
    )
    return Refused(
        f"{name} cannot hold the very values of {len(weights)} of {len(quantized)} quantized weights: "
        f"{first.stored}: {first.why}",
        where=first.row.name,
        fix=f"{offer}better, quantize the original model",
    )


def _dtype_remarks(asked: Sequence[str], chosen: str, found: Sequence[_Found]) -> list[str]:
    if chosen == asked[0]:
        return []
    forced = [f for f in found if f.grids[asked[0]] is None]
    return [
        f"what is kept becomes {chosen}: {asked[0]} would change {len(forced)} tensors, {forced[0].row.name} "
        f"first; --dtype {asked[0]} --requantize is smaller"
    ]


def _growth(rows: Sequence[Row], source: Checkpoint) -> list[str]:
    """What the same values take in the other container, where that is more than a twentieth more."""
    grown: Counter[tuple[str, str]] = Counter()
    bits: dict[tuple[str, str], tuple[float, float]] = {}
    for row in rows:
        stored = source.stored(row.name) if row.solved and row.why.startswith("the values of ") else None
        if stored is not None:
            shape = stored.shape
            was, now = (b / math.prod(shape) for b in (stored.bits, row.grid.storage_bits(shape)))
            if now > _GROWN * was:
                grown[str(stored.grid), str(row.grid)] += 1
                bits[str(stored.grid), str(row.grid)] = was, now
    return [
        f"{n} x {a} in wider codes: {b} takes {bits[a, b][1]:.2f} bits a weight, it took {bits[a, b][0]:.2f}"
        for (a, b), n in grown.most_common()
    ]


def _losses(closest: Mapping[tuple[str, str, int], Grid], lost: Sequence[_Found]) -> list[str]:
    if not lost:
        return []
    kinds = Counter((f.stored or "dense", str(closest[_class(f)])) for f in lost)
    listed = ", ".join(f"{n} x {a} -> {b}" for (a, b), n in kinds.most_common())
    return [f"not the same values: {listed}; this loss comes on top of what the source lost before"]


def _laid_out(
    rows: tuple[Row, ...],
    found: Sequence[_Found],
    recipe: Recipe,
    container: Container,
    source: Checkpoint,
    dtype: str,
) -> tuple[tuple[Row, ...], tuple[FileImage, ...]]:
    """The files; where a container wants one grid for all its layers, one that holds them all."""
    notes = _provenance(recipe, source)
    try:
        return rows, container.files(rows, source, notes)
    except Refused as refusal:
        common = _common(rows, found, source, container, dtype)
        if common is None and "dtype=" in str(refusal.fix):
            fix = f"{refusal.fix}: here that is --dtype, with --requantize where it rounds what is kept"
            raise Refused(refusal.what, where=refusal.where, fix=fix) from refusal
        if common is None:
            raise
    return common, container.files(common, source, notes)


def _common(
    rows: Sequence[Row], found: Sequence[_Found], source: Checkpoint, container: Container, dtype: str
) -> tuple[Row, ...] | None:
    """The rows with all linears on the first grid that holds every one of them."""
    linears = [row for row in rows if row.solved]
    said = {f.row.name: f.stored for f in found}
    for grid in dict.fromkeys(row.grid for row in linears):
        held = [source.stored(row.name) for row in linears]
        if all(q is not None and relabelled(q, grid) is not None for q in held):
            changed = {r.name: replace(r, grid=grid, why=_said(said[r.name], grid)) for r in linears}
            common = tuple(changed.get(row.name, row) for row in rows)
            return None if [r.grid for r in common] == [r.grid for r in rows] else common
    return None


def _provenance(recipe: Recipe, source: Checkpoint) -> dict[str, str]:
    return {"recipe": str(recipe), "source": source.digest, "version": version("bitmill")}


def _made(
    recipe: Recipe,
    family: Family,
    rows: tuple[Row, ...],
    files: tuple[FileImage, ...],
    container: Container,
    source: Checkpoint,
    dtype: str,
    remarks: tuple[str, ...],
    out: Path | None,
) -> Plan:
    if out is not None and files[0].path and out.suffix == ".gguf":
        raise Refused("this output is a folder", where=str(out), fix=f"-o {out.with_suffix('')}")
    if out is not None:
        refuse_folder(out, total_bytes(files))
    largest = max(math.prod(row.shape) for row in rows)
    anew = [row for row in rows if row.why.startswith(_ANEW) and not isinstance(row.grid, Dense)]
    stored = sum(math.prod(row.shape) for row in rows if not row.why.startswith("kept"))
    kept = sum(math.prod(row.shape) for row in rows) - stored
    seconds = 2.0 + 2 * kept / _RATE + stored / _UNPACKED + rounding_seconds(anew)
    peak = BASE_BYTES + 16 * largest
    return Plan(
        recipe, family, rows, files, container, source.digest, dtype, 0, 0, "nothing", peak, seconds, remarks
    )
