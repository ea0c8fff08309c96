"""What a last step with the whole model will take, and why it cannot be had: said in the plan."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bitmill.core.axes import VectorGrid
from bitmill.core.errors import Refused
from bitmill.core.learning import ModelSolver
from bitmill.core.types import Row
from bitmill.forecast import BASE_BYTES, RATE, ROUNDED
from bitmill.numerics.moving import moving
from bitmill.recipe import Call, Recipe
from bitmill.run.memory import whole_bytes

JUDGES = 8  # windows that judge, at most
DECODED = 60e6  # weights a second a core that become values, or derivatives of them
KEPT = 9  # float32 numbers of each leaf: itself, its start and unit, three means, the best, two on the way
MICRO_TOKENS = 2048  # tokens inside a block at once
SHARE = 0.6  # of the machine's memory that weights which learn may take, and all that goes with them


def in_lots(
    recipe: Recipe, rows: Sequence[Row], config: Mapping[str, Any], nsamples: int, seqlen: int
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the number of blocks that learn at once, where all are more than this machine's memory
    has room for; and what a reader must know of that.

    Raises:
        Refused: what comes before would be lost.
    """
    tune, call = recipe.make_tune(), recipe.tune
    if tune is None or call is None or not tune.weights:
        return recipe, ()
    _refuse_lost(recipe)
    blocks, room = len({row.layer for row in rows if row.layer is not None}), int(SHARE * whole_bytes())
    whole = _cost(rows, config, tune, nsamples, seqlen, blocks)[0]
    if tune.blocks_at_once:
        return recipe, (f"{call}: {tune.blocks_at_once} of {blocks} blocks learn at once, as asked",)
    if whole <= room:
        return recipe, (f"{call}: the whole model learns at once",)
    fits = [n for n in range(1, blocks) if _cost(rows, config, tune, nsamples, seqlen, n)[0] <= room]
    at_once = max(fits, default=1)
    options = (*(o for o in call.options if o[0] != "blocks"), ("blocks", at_once))
    said = (
        f"{call}: {at_once} of {blocks} blocks learn at once, one lot after the other: all together would "
        f"take {whole / 2**30:.1f} GiB, and {room / 2**30:.1f} are {SHARE:.0%} of this machine's memory"
    )
    return replace(recipe, tune=Call(call.name, options)), (said,)


def _refuse_lost(recipe: Recipe) -> None:
    if recipe.solver != Call("nearest"):
        raise Refused(
            f"{recipe.tune} trains the weights as they were: what {recipe.solver} finds before would be lost",
            fix=f"{recipe.tune} alone, or {recipe.solver} + tune",
        )
    made = zip(recipe.transforms, recipe.make_transforms(), strict=True)
    fitted = next((call for call, transform in made if transform.needs != "nothing"), None)
    if fitted is not None:
        raise Refused(
            f"{fitted} is folded into weights block by block, and {recipe.tune} starts from those before",
            fix=f"hadamard or spinquant, which are known before; or {fitted} + efficientqat",
        )


def tuned(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    name: str,
    tune: ModelSolver,
    nsamples: int,
    seqlen: int,
    before: tuple[int, float],
) -> tuple[tuple[str, ...], tuple[int, float]]:
    """What a reader must know of it, and peak bytes and seconds of a run that took ``before`` without it.

    Raises:
        Refused: nothing moves, or there is no text to learn from.
    """
    _refuse(rows, name, tune, nsamples)
    taken = _cost(rows, config, tune, nsamples, seqlen, tune.blocks_at_once)
    return _remarks(rows, name, tune, taken), (max(before[0], taken[0]), before[1] + taken[1])


def _refuse(rows: Sequence[Row], name: str, tune: ModelSolver, nsamples: int) -> None:
    reasons = [reason for row in rows if row.solved and (reason := tune.refuses(row.grid)) is not None]
    what, such = ("scales", "with scales of f16, bf16, f32 or E4M3")
    if tune.weights:
        what, such = ("weights", "of integers, int4-channel-sym for example")
    if len(reasons) == sum(row.solved for row in rows):
        raise Refused(
            f"{name} moves {what}: {reasons[0] if reasons else 'nothing is quantized'}",
            fix=f"use a grid {such}, or leave it out",
        )
    if not nsamples:
        raise Refused(
            f"{name} learns from what the model puts out; importance matrices do not tell",
            fix="calibrate: --calib TEXT instead of --imatrix",
        )


def _remarks(rows: Sequence[Row], name: str, tune: ModelSolver, taken: tuple[int, float]) -> tuple[str, ...]:
    said = [
        f"{name}: afterwards {tune.passes} steps of {tune.at_once} windows through the whole model, the "
        f"original's and the quantized: about {taken[0] / 2**30:.1f} GiB and {taken[1] / 60:.0f} min of the "
        "figures below"
    ]
    said += [f"{name} learns from what the model itself writes, where no text is named"] * tune.own_text
    still = Counter(str(row.grid) for row in rows if row.solved and tune.refuses(row.grid) is not None)
    said += [f"{name} leaves {n} weights on {grid} as they are" for grid, n in still.items()]
    return tuple(said)


def _cost(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    tune: ModelSolver,
    nsamples: int,
    seqlen: int,
    at_once: int,
) -> tuple[int, float]:
    """Peak bytes and seconds, modelled: codes of the whole model, leaves of the blocks that learn
    ``at_once``, one block dense."""
    cores, width, vocab = os.cpu_count() or 1, int(config["hidden_size"]), int(config["vocab_size"])
    middle = int(config.get("intermediate_size") or 4 * width)
    solved = [row for row in rows if row.solved]
    weights = sum(math.prod(row.shape) for row in solved)
    blocks: Counter[int] = Counter()
    codes, leaves, decodes = 0.0, 0.0, 0.0
    for row in solved:
        size, names = math.prod(row.shape), moving(row.grid)
        blocks[row.layer or 0] += size
        codes += size * (0.5 if isinstance(row.grid, VectorGrid) else 1.0)
        leaves += sum(_count(row) for _ in names)
        decodes += size * (2 + max(len(names) - 1, 0))
    largest, at_once = max(blocks.values(), default=0), min(at_once or len(blocks), len(blocks))
    lots = -(-len(blocks) // max(at_once, 1))
    batch = min(tune.at_once, max(nsamples, 1)) * seqlen
    judged = lots * tune.judgements * JUDGES * seqlen
    later = (seqlen + 1) // 2 * vocab
    hidden = 4 * width * (batch * (len(blocks) + 2) + 2 * (nsamples + JUDGES) * seqlen)
    inside = 4 * min(batch, max(MICRO_TOKENS, seqlen)) * 3 * (8 * width + 4 * middle)
    heads = 4 * (2 * vocab * width + 6 * later)
    moving_now = largest * at_once if tune.weights else leaves
    peak = BASE_BYTES + codes + 4 * KEPT * moving_now + hidden + inside + 4 * 5 * largest + heads
    passes = lots * tune.passes
    through = 2.0 * weights * (lots * (nsamples + JUDGES) * seqlen + 4 * passes * batch + judged)
    through += vocab * width * (4.0 * passes * batch + 2 * judged)
    again = (passes * decodes + lots * tune.judgements * weights) / DECODED
    again += 2 * passes * largest * at_once / ROUNDED if tune.weights else 0.0
    return int(peak), through / (RATE * cores) + again / cores


def _count(row: Row) -> int:
    """Values of one scale of a weight."""
    rows, columns = (block or length for block, length in zip(row.grid.block, row.shape, strict=True))
    return -(-row.shape[0] // rows) * -(-row.shape[1] // columns)
