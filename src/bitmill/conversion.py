"""The plan of a conversion: which grid of another container holds each stored tensor, and whether exactly.

A conversion is a plan like any other, whose rows carry what is stored already: a weight keeps its grid, or
takes one that holds the very same values (:mod:`bitmill.relabel`). Whether one does depends on the numbers
and not on headers alone, so a quantized source is read once here, a tensor at a time. What no grid of the
container holds is refused, or put on the closest one where that was asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bitmill.checkpoint.stored_types import type_of
from bitmill.core import registry
from bitmill.core.axes import AffineGrid, Checkpoint, Container, Grid, VectorGrid, torch_dtype, total_bytes
from bitmill.core.errors import BadRecipe, Refused
from bitmill.core.types import FileImage, Quantized, Row, TensorFacts
from bitmill.families.base import LINEAR_ROLES, Family, describe
from bitmill.forecast import BASE_BYTES
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer
from bitmill.planning import MATRIX, Plan, plan, refuse_folder
from bitmill.recipe import Call, Recipe, parse
from bitmill.relabel import equivalents, relabelled

AS_STORED = "as-stored"
"""Stands for the grid in the name of a conversion that keeps what is stored."""
VERB = "convert"
MORE = 1.1  # bits of the closest grid, at most, times those of the stored one or of the next width there is
_WIDTHS = (2, 3, 4, 8)  # of integers that kernels exist for
_GROWN = 1.05
_SAMPLE = 32  # rows of a weight that choose it
_RATE = 60e6  # weights a second that are read, compared and written


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


def target(text: str) -> Recipe:
    """What to convert to: a container's name keeps what is stored; a recipe names grids as well.

    Raises:
        BadRecipe: it is neither, or a recipe that only ``bitmill quantize`` can follow.
    """
    name = text.strip().lower().replace("-", "_").removeprefix(">").strip()
    if name in registry.names("containers"):
        return Recipe((), Call(VERB), AS_STORED, name)
    if name not in ("f32", "f16", "bf16") and ":" not in text and ">" not in text:
        known = ", ".join(n.replace("_", "-") for n in registry.names("containers"))
        try:
            recipe = parse(text)
        except BadRecipe as error:
            raise BadRecipe(
                f"no container or recipe is called {text!r}", fix=f"containers: {known}"
            ) from error
    else:
        recipe = parse(text)
    if recipe.transforms or recipe.solver != Call("nearest"):
        raise BadRecipe(
            f"{recipe.solver} needs the original weights: a conversion places nothing anew but by rounding",
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
    rows = tuple(_row(f, chosen, closest) for f in found)
    recipe = replace(wanted, solver=call, dtype=dtype)
    rows, files = _laid_out(rows, found, recipe, container, source, chosen)
    remarks = [*_dtype_remarks(asked, chosen, found), *_growth(rows, source), *_losses(closest, lost)]
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
    rows = []
    for row in made.rows:
        stored = source.stored(row.name)
        if stored is None or isinstance(stored.grid, Dense):
            rows.append(row)
            continue
        exact = isinstance(row.grid, Dense) or relabelled(stored, row.grid) is not None
        was = str(stored.grid)
        rows.append(replace(row, why=_said(was, row.grid) if exact else f"requantized from {was}"))
    files = made.container.files(made.rows, source, _provenance(recipe, source))
    remarks = [r for r in made.remarks if not r.startswith("the source is quantized already")]
    remarks += _growth(rows, source)
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
        return _Found(row, "", {d: _dense(container, role, d, kind, read) for d in dtypes})
    row = replace(row, solved=role in LINEAR_ROLES and layer is not None)
    stored = source.stored(facts.name)
    said = kind if stored is None else str(stored.grid)
    grids = {d: _same(stored, container, role, d) if stored is not None else None for d in dtypes}
    if None in grids.values() and (not row.solved or _dense_only(container, row)):
        read = partial(source.read, facts.name)
        grids = {d: g or _dense(container, role, d, kind, read) for d, g in grids.items()}
    return _Found(row, said, grids, _why_not(stored, container, row, dtypes[0]))


def _dense_only(container: Container, row: Row) -> bool:
    """Whether a container quantizes nothing, so that decoding is what was asked for."""
    cheap = (
        grid for cls in registry.grid_families() for grid in cls.examples() if not isinstance(grid, Dense)
    )
    return all(container.refuses(grid, row.role, (256, 256)) for grid in cheap)


def _dense(container: Container, role: str, dtype: str, held: str, read: Callable[[], Tensor]) -> Grid | None:
    """The dense grid of a tensor that is kept or decoded, when it holds the values; a file in which each
    tensor has a type of its own may go back to single precision."""
    for name in (container.default_grid(dtype, role), *(["f32"] if container.single_file else [])):
        if name in (held, "f32"):
            return Dense(name)
        values = read()
        if torch.equal(values.to(torch_dtype(name)).to(torch.float32), values.to(torch.float32)):
            return Dense(name)
    return None


def _same(stored: Quantized, container: Container, role: str, dtype: str) -> Grid | None:
    """The smallest grid of the container with the very same values, the stored one before any other."""
    known = [stored.grid, *sorted(equivalents(stored.grid), key=lambda g: g.storage_bits(stored.shape))]
    for grid in _allowed(known, container, role, stored.shape, dtype):
        if relabelled(stored, grid) is not None:
            return grid
    return None


def _allowed(
    grids: Sequence[Grid], container: Container, role: str, shape: tuple[int, ...], dtype: str
) -> Iterator[Grid]:
    """Grids as the container settles them, as far as it and the shape allow; each once."""
    seen = set()
    for grid in grids:
        settled = container.adapt(grid, dtype)
        if settled in seen or settled.refuses(shape) or container.refuses(settled, role, shape):
            continue
        seen.add(settled)
        yield settled


def _why_not(stored: Quantized | None, container: Container, row: Row, dtype: str) -> str:
    if stored is None:
        return "no grid describes how its columns are laid out"
    settled = container.adapt(stored.grid, dtype)
    refused = container.refuses(settled, row.role, row.shape)
    return refused or f"its scales, zero points or codes are not all those of {settled}"


def _said(stored: str, grid: Grid) -> str:
    if isinstance(grid, Dense):
        return f"decoded from {stored}"
    return "as stored" if str(grid) == stored else f"the values of {stored}"


def _row(found: _Found, dtype: str, closest: Mapping[tuple[str, str, int], Grid]) -> Row:
    grid = found.grids[dtype]
    if grid is not None:
        why = _said(found.stored, grid) if found.stored else "kept"
        return replace(found.row, grid=grid, why=why)
    grid = closest[_class(found)]
    why = f"requantized from {found.stored}" if found.stored else f"kept, rounded to {grid}"
    return replace(found.row, grid=grid, why=why)


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
        if not one.row.solved or _dense_only(container, one.row):
            chosen[_class(one)] = Dense(container.default_grid(dtype, one.row.role))
            continue
        for grid in _nearest_first(source, one.row, container, dtype):
            rows = [
                replace(r, grid=grid) if _class(f) == _class(one) else r
                for f, r in zip(found, kept, strict=True)
            ]
            if _lays_out(container, rows, source):
                chosen[_class(one)] = grid
                break
        else:
            raise Refused(f"no grid there takes a weight of shape {list(one.row.shape)}", where=one.row.name)
    return chosen


def _lays_out(container: Container, rows: Sequence[Row], source: Checkpoint) -> bool:
    try:
        return bool(container.files(rows, source, {}))
    except Refused:
        return False


def _nearest_first(source: Checkpoint, row: Row, container: Container, dtype: str) -> list[Grid]:
    """The container's grids by squared error for the first rows of a stored weight; evenly spaced ones where
    that is."""
    stored = source.stored(row.name)
    weight = source.read(row.name)[:_SAMPLE].to(torch.float32)
    shape = (row.shape[0], row.shape[1])
    bits = 16 * math.prod(shape) if stored is None else stored.bits
    pool = [
        grid for cls in registry.grid_families() for grid in cls.examples() if not isinstance(grid, Integer)
    ]
    known = stored.grid if stored is not None and isinstance(stored.grid, Integer) else Integer()
    groups = dict.fromkeys((known.group, 0, 128, 64, 32))
    pool += [Integer(b, g, zero) for b in _WIDTHS for g in groups for zero in ("sym", "asym")]
    usable = [
        grid
        for grid in _allowed(pool, container, row.role, row.shape, dtype)
        if not isinstance(grid, Dense | VectorGrid)
    ]
    alike = [grid for grid in usable if isinstance(grid, AffineGrid)]
    even = stored is None or isinstance(stored.grid, AffineGrid)
    sizes = {grid: grid.storage_bits(shape) for grid in (alike if even and alike else usable)}
    whole = bits // math.prod(shape) * math.prod(shape)  # whole bits a weight: nothing narrower is close
    least = min((size for size in sizes.values() if size >= whole), default=max(sizes.values(), default=0))
    near = [grid for grid in sizes if sizes[grid] <= MORE * max(bits, least)]
    errors = {grid: float((grid.round(weight).dense() - weight).square().sum()) for grid in near}
    return sorted(near, key=lambda grid: (errors[grid], sizes[grid]))


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
    near = _nearest_first(source, first.row, container, dtype)
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
    except Refused:
        common = _common(rows, found, source, container, dtype)
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
            return tuple(changed.get(row.name, row) for row in rows)
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
    seconds = 2.0 + 2 * sum(math.prod(row.shape) for row in rows) / _RATE
    peak = BASE_BYTES + 16 * largest
    return Plan(
        recipe, family, rows, files, container, source.digest, dtype, 0, 0, "nothing", peak, seconds, remarks
    )
