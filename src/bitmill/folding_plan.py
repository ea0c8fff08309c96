"""What a plan says of its transforms: where each folds and where it cannot, whether a tied head needs a
matrix of its own, and what is left for the runtime to rotate."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from bitmill.core.axes import Checkpoint, Container, Transform
from bitmill.core.errors import Refused
from bitmill.core.online import DOWN, KEYS, OnlineContainer, OnlineTransform
from bitmill.core.rotating import LearnedTransform
from bitmill.core.types import Row, TensorFacts
from bitmill.families.base import Family, head_dim
from bitmill.folding import constant_norm, rotates, unknown_readers
from bitmill.forecast import BASE_BYTES, RATE
from bitmill.numerics import cache
from bitmill.recipe import Recipe

JUDGES = 8  # windows that judge what was learned, at most
KEPT_BYTES = 1_500_000_000  # blocks below this stay in memory; above, they are read again for every step

_MIDDLE = {"mlp_mid", "mlp_order"}  # seams that down reads


def transform_remarks(recipe: Recipe, family: Family, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a reader must know of a recipe's transforms.

    Raises:
        Refused: one finds no place, two rotate the same, or one would leave out what reads the space that it
            changes.
    """
    remarks: list[str] = []
    taken: dict[str, str] = {}
    for call, transform in zip(recipe.transforms, recipe.make_transforms(), strict=True):
        if not family.seams:
            raise Refused(
                f"{call.name} needs to know what may be folded where, and there is no table for "
                f"{checkpoint.config.get('model_type')!r}",
                fix=f"drop {call.name} from the recipe; the solver works without it",
            )
        usable = []
        for name in transform.seams():
            seam = family.seam(name)
            if seam is None or transform.kind not in seam.allows:
                remarks.append(
                    f"{call.name}: {family.name} has no {name} seam for a {transform.kind} map; skipped"
                )
            else:
                usable.append(name)
        if not usable and not isinstance(transform, OnlineTransform):
            raise Refused(f"{call.name} finds no seam to fold at in {family.name}", fix=f"drop {call.name}")
        for name in usable if transform.kind == "orthogonal" else ():
            if name in taken:
                raise Refused(f"{taken[name]} and {call.name} both rotate {name}", fix="drop one of them")
            taken[name] = call.name
    unknown = unknown_readers(family, checkpoint.tensors) if rotates(family, recipe.make_transforms()) else ()
    if unknown:
        raise Refused(
            f"{len(unknown)} matrices are not described for {family.name}, and may read the residual stream",
            where=unknown[0],
            fix="leave the stream as it is: r1=false",
        )
    if needs_own_head(recipe, family, checkpoint):
        remarks.append(
            "the tied head gets a matrix of its own: a rotated embedding and a rotated head differ"
        )
    return tuple(remarks)


def needs_own_head(recipe: Recipe, family: Family, checkpoint: Checkpoint) -> bool:
    """Whether a head that shares the embedding's matrix cannot go on doing so: both are rotated alike, but
    the final norm's weight goes into one of them, unless it is one number for all channels."""
    if "lm_head.weight" in checkpoint.tensors or not rotates(family, recipe.make_transforms()):
        return False
    return not constant_norm(family, checkpoint)


def own_head(recipe: Recipe, family: Family, checkpoint: Checkpoint) -> dict[str, TensorFacts]:
    """The head's matrix, where one becomes needed."""
    if not needs_own_head(recipe, family, checkpoint):
        return {}
    embed = checkpoint.tensors[f"{family.module('embed', None)}.weight"]
    return {"lm_head.weight": TensorFacts("lm_head.weight", embed.shape, embed.dtype)}


def with_rotations(
    rows: Sequence[Row], recipe: Recipe, container: Container, checkpoint: Checkpoint
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """The rows, with the rotations that are left for the runtime, and the sentences about those.

    Raises:
        Refused: no file of this container says so, nothing is there that they would change, or something else
            of the recipe does not go with them.
    """
    transforms = recipe.make_transforms()
    online = [transform for transform in transforms if isinstance(transform, OnlineTransform)]
    if not online:
        return tuple(rows), ()
    head = head_dim(checkpoint.config)
    made = []
    for row in rows:
        order = max(_order(transform, row, head) for transform in online)
        if order > 1:
            _refuse(recipe, transforms, container, row, order)
            row = replace(row, turn=order)
        made.append(row)
    found = {DOWN: _orders(r for r in made if r.cache is None), KEYS: _orders(r for r in made if r.cache)}
    for transform in online:
        if transform.online(KEYS, head) > 1 and not found[KEYS]:
            raise Refused(
                "rotated queries and keys have the products they had: r3 is for a rounded cache",
                where="r3=true",
                fix="say what keys are rounded to, e.g. cache=int4-token-asym, or leave r3 out",
            )
        if transform.online(DOWN, 2) > 1 and not found[DOWN]:
            raise Refused("no weight of down is placed by this recipe", where="r4=true", fix="leave r4 out")
    said = "a runtime multiplies {} by a Hadamard matrix of order {} before it rounds them ({})"
    told = (("queries and keys", KEYS, "R3"), ("the inputs of down", DOWN, "R4"))
    remarks = [said.format(what, found[space], name) for what, space, name in told if found[space]]
    return tuple(made), tuple(remarks)


def learning_of(
    recipe: Recipe, rows: Sequence[Row], checkpoint: Checkpoint, nsamples: int, seqlen: int
) -> tuple[tuple[str, ...], tuple[int, float]]:
    """What a reader must know of rotations that are learned before the walk, and peak bytes and seconds of
    that, modelled; nothing where none are.

    Raises:
        Refused: nothing is rounded that could teach, scales are fixed only later, or there is no text.
    """
    made = zip(recipe.transforms, recipe.make_transforms(), strict=True)
    found = [(str(call), t) for call, t in made if isinstance(t, LearnedTransform)]
    if not found:
        return (), (0, 0.0)
    name, learns = found[0]
    rounded = [grid for row in rows for grid in (row.inputs, row.cache) if grid is not None]
    if not rounded:
        raise Refused(
            f"{name} learns what loses least in rounded inputs and a rounded cache, and neither is asked for",
            fix="say what, e.g. input=int4-token, cache=int4-token-asym; or hadamard, which learns nothing",
        )
    fixed = next((grid for grid in rounded if grid.fixed or grid.extent == "tensor"), None)
    if fixed is not None:
        raise Refused(
            f"{name} learns before calibration fixes what {fixed} needs",
            fix="grids whose scales come with each token, e.g. input=int4-token, cache=int4-token-asym",
        )
    if not nsamples:
        raise Refused(f"{name} learns from text", fix="calibrate: --calib TEXT")
    width, vocab = int(checkpoint.config["hidden_size"]), int(checkpoint.config["vocab_size"])
    layers = max((row.layer for row in rows if row.layer is not None), default=-1) + 1
    weights = sum(math.prod(row.shape) for row in rows if row.layer is not None)
    tokens = learns.at_once * seqlen
    turning = 4 * layers * width * width  # a turn there and back, before two groups of linears
    original = 2.0 * (nsamples + JUDGES) * seqlen * weights
    through = original + 2.0 * (weights + turning) * (4 * learns.passes * tokens + 2 * JUDGES * seqlen)
    through += 2.0 * vocab * width * (4 * learns.passes * tokens + 4 * JUDGES * seqlen)
    blocks = 4 * (weights if 4 * weights < KEPT_BYTES else 2 * weights // max(layers, 1))
    hidden = 4 * width * seqlen * (nsamples + JUDGES + learns.at_once * (layers + 2))
    peak = BASE_BYTES + blocks + hidden + 4 * (2 * vocab * width + 4 * seqlen * vocab)
    seconds = through / (RATE * (os.cpu_count() or 1))
    said = (
        f"{name}: before all else {learns.passes} steps of {learns.at_once} windows through the whole model: "
    )
    said += f"about {peak / 2**30:.1f} GiB and {seconds / 60:.0f} min of the figures below"
    return (said,), (int(peak), seconds)


def _orders(rows: Iterable[Row]) -> str:
    return " or ".join(str(order) for order in sorted({row.turn for row in rows if row.turn}))


def _order(transform: OnlineTransform, row: Row, head: int) -> int:
    """Of the matrix that this transform has a runtime multiply the inputs, or keys, of a row by."""
    if row.cache is not None:
        return transform.online(KEYS, head) if row.name.endswith(cache.KEYS) else 0
    return transform.online(DOWN, row.shape[1]) if row.solved and row.role == "down" else 0


def _refuse(
    recipe: Recipe, transforms: Sequence[Transform], container: Container, row: Row, order: int
) -> None:
    space, which = (DOWN, "r4") if row.cache is None else (KEYS, "r3")
    name = recipe.container.replace("_", "-")
    if not isinstance(container, OnlineContainer):
        raise Refused(
            f"{name} files do not say that a runtime rotates {space} ({which})",
            where=row.name,
            fix=f"leave {which} out: r1 and r2 are in the weights; or > compressed-tensors, or > bitmill",
        )
    reason = container.refuses_rotation(space, order)
    if reason is not None:
        raise Refused(f"{name} cannot say {which} of order {order}: {reason}", where=row.name)
    scaling = next((t for t in transforms if t.needs != "nothing" and _MIDDLE & set(t.seams())), None)
    if space == DOWN and scaling is not None:
        call = recipe.transforms[transforms.index(scaling)]
        raise Refused(
            f"{call} fits the channels of down's inputs, and r4 mixes them",
            where=row.name,
            fix="drop one; smoothquant(inner=false) leaves them",
        )
    if space == DOWN and recipe.tune is not None:
        raise Refused(
            f"{recipe.tune} learns with weights as a file has them, and down's are for rotated inputs (r4)",
            where=row.name,
            fix=f"leave r4 out, or {recipe.tune.name}",
        )
