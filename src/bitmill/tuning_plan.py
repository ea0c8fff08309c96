"""What a last step with the whole model will take, and why it cannot be had: said in the plan."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bitmill.core.axes import VectorGrid
from bitmill.core.errors import Refused
from bitmill.core.learning import ModelSolver
from bitmill.core.types import Row
from bitmill.forecast import BASE_BYTES, RATE
from bitmill.numerics.moving import moving

JUDGES = 8  # windows that judge, at most
DECODED = 60e6  # weights a second a core that become values, or derivatives of them
KEPT = 9  # float32 numbers of each leaf: itself, its start and unit, three means, the best, two on the way
MICRO_TOKENS = 2048  # tokens inside a block at once


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
    taken = _cost(rows, config, tune, nsamples, seqlen)
    return _remarks(rows, name, tune, taken), (max(before[0], taken[0]), before[1] + taken[1])


def _refuse(rows: Sequence[Row], name: str, tune: ModelSolver, nsamples: int) -> None:
    reasons = [reason for row in rows if row.solved and (reason := tune.refuses(row.grid)) is not None]
    if len(reasons) == sum(row.solved for row in rows):
        raise Refused(
            f"{name} moves scales: {reasons[0] if reasons else 'nothing is quantized'}",
            fix="use a grid with scales of f16, bf16, f32 or E4M3, or leave it out",
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
    still = Counter(str(row.grid) for row in rows if row.solved and tune.refuses(row.grid) is not None)
    said += [f"{name} leaves {n} weights on {grid} as they are" for grid, n in still.items()]
    return tuple(said)


def _cost(
    rows: Sequence[Row], config: Mapping[str, Any], tune: ModelSolver, nsamples: int, seqlen: int
) -> tuple[int, float]:
    """Peak bytes and seconds, modelled: codes and leaves of the whole model, one block dense."""
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
    batch = min(tune.at_once, max(nsamples, 1)) * seqlen
    judged = tune.judgements * JUDGES * seqlen
    later = (seqlen + 1) // 2 * vocab
    hidden = 4 * width * (batch * (len(blocks) + 2) + 2 * (nsamples + JUDGES) * seqlen)
    inside = 4 * min(batch, max(MICRO_TOKENS, seqlen)) * 3 * (8 * width + 4 * middle)
    block = 4 * 5 * max(blocks.values(), default=0)
    heads = 4 * (2 * vocab * width + 6 * later)
    peak = BASE_BYTES + codes + 4 * KEPT * leaves + hidden + inside + block + heads
    through = 2.0 * weights * ((nsamples + JUDGES) * seqlen + 4 * tune.passes * batch + judged)
    through += vocab * width * (4.0 * tune.passes * batch + 2 * judged)
    again = tune.passes * decodes + tune.judgements * weights
    return int(peak), through / (RATE * cores) + again / (DECODED * cores)


def _count(row: Row) -> int:
    """Values of one scale of a weight."""
    rows, columns = (block or length for block, length in zip(row.grid.block, row.shape, strict=True))
    return -(-row.shape[0] // rows) * -(-row.shape[1] // columns)
