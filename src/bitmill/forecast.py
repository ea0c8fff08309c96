"""What a run will take, from shapes alone: memory and time on these cores, modelled; and room on disk."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitmill.core.axes import CalibratedSolver, Solver, VectorGrid
from bitmill.core.errors import Refused
from bitmill.core.learning import BlockSolver
from bitmill.core.types import Row

BASE_BYTES = 400 << 20  # an interpreter with torch, transformers and numba loaded
PLAIN_BYTES = 300 << 20  # the same where no model runs: none of its classes is loaded
STAGED_BYTES = 5 << 28  # 1.25 GiB of activations may be alive at once in a one-pass walk
MICRO_TOKENS = 4096  # of a forward pass: enough for full speed, few enough to stay in cache
DISK = 300e6  # bytes a second that reach a disk for good
CHEAP = 4 << 20  # bytes that are made durable without a thought
KEEPING = 0.02  # share of a run's time that keeping activations for a resume may take
RATE = 90e9  # float32 operations a second a core of a 2024 server
ROUNDED = 4e6  # weights a second a core that a grid's own search rounds, most of them
SOUGHT = 0.9e6  # the same where points of a codebook are sought
MOVED = 40e6  # weights a second a core that a step of learning rounds and moves
FITTED = 7.0  # how often a fitted transform rounds weights, while it tries itself out
SHARING = frozenset({"k", "v", "up"})  # roles whose input is another's, and counted there
PLACED = 3.3e6  # weights a second a core that one pass puts on points


def staged_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Activations alive at once when a whole block sees every calibration token in one pass."""
    width, middle = (
        int(config["hidden_size"]),
        int(config.get("intermediate_size") or 4 * config["hidden_size"]),
    )
    return tokens * (6 * width + 3 * middle) * 4


def blocks_between(hidden: int, width: int, weights: int) -> int:
    """After how many blocks activations are made durable again: what is small costs nothing worth saving,
    more may take :data:`KEEPING` of the time that the blocks do.

    Args:
        hidden: bytes of all activations.
        width: bytes of one token's.
        weights: of a block; every token is multiplied by each, and Gram matrices take about as long again.
    """
    if hidden <= CHEAP:
        return 1
    seconds_a_token = 4.0 * weights / (RATE * (os.cpu_count() or 1))
    return math.ceil(width / DISK / (KEEPING * seconds_a_token))


def rounding_seconds(rows: Sequence[Row]) -> float:
    """Seconds in which the grids of these rows round their weights once, on all cores."""
    cores = os.cpu_count() or 1
    weights = sum(math.prod(row.shape) for row in rows)
    sought = sum(math.prod(row.shape) for row in rows if isinstance(row.grid, VectorGrid))
    return (weights - sought) / (ROUNDED * cores) + sought / (SOUGHT * cores)


def cost(
    rows: Sequence[Row],
    config: Mapping[str, Any],
    solver: Solver,
    needs: str,
    nsamples: int,
    seqlen: int,
    fitted: bool = False,
) -> tuple[int, float]:
    """Peak bytes and seconds of the walk.

    Args:
        needs: ``nothing``, ``diagonal`` or ``gram``: what calibration takes.
        nsamples, seqlen: calibration windows and their length.
        fitted: whether a transform is fitted: a block is then there before and after the fold, and rounded.
    """
    blocks: Counter[int] = Counter()
    for row in rows:
        if row.layer is not None:
            blocks[row.layer] += math.prod(row.shape)
    matrices = [row for row in rows if row.solved]
    widest = max((row.shape[1] for row in matrices), default=0)
    largest = max((math.prod(row.shape) for row in matrices), default=0)
    cores = os.cpu_count() or 1
    weights = sum(math.prod(row.shape) for row in matrices)
    sought = sum(math.prod(row.shape) for row in matrices if isinstance(row.grid, VectorGrid))
    seconds = rounding_seconds(matrices)
    tokens = nsamples * seqlen
    if needs == "nothing":
        widely = max((math.prod(row.shape) for row in rows if row.layer is None), default=0)
        return PLAIN_BYTES + min(8 * widely, 100 << 20) + 16 * min(largest, 1 << 26), 2.0 + seconds
    crosses, learns = isinstance(solver, CalibratedSolver) and solver.cross, isinstance(solver, BlockSolver)
    streams = 1 + (crosses or learns)  # the original model runs along
    hidden = 2 * tokens * int(config["hidden_size"]) * 4 * streams
    activations = _activations(config, solver, tokens, seqlen, streams)
    once = _staged(config, solver, tokens)  # else a second pass, with the block as it is stored
    operations, grams = 2.0 * _seen(matrices, config) * tokens * (streams if once else streams + 1), 0
    seconds += FITTED * rounding_seconds(matrices) * fitted
    if needs == "gram":
        grams = 4 * (2 + 2 * streams) * widest * widest
        operations += tokens * _gram_numbers(matrices, config) * (1 + 2 * crosses)
        operations += sum(2 * math.prod(row.shape) * row.shape[1] for row in matrices) * solver.passes
        seconds += solver.passes * sought / (PLACED * cores)
    if isinstance(solver, BlockSolver):
        operations += 2.0 * weights * seqlen * 3 * solver.windows_run  # backwards is twice forwards
        seconds += solver.passes * weights / (MOVED * cores)
    block = 4 * max(blocks.values(), default=0) * (streams + 2 * fitted + 9 * learns)
    return BASE_BYTES + block + hidden + activations + grams, 5.0 + seconds + operations / (RATE * cores)


def _staged(config: Mapping[str, Any], solver: Solver, tokens: int) -> bool:
    """Whether all tokens are inside a block at once, which then runs once."""
    told = solver if isinstance(solver, CalibratedSolver) else None
    crosses = told is not None and told.cross
    whole = staged_bytes(config, tokens) * (1 + crosses) <= STAGED_BYTES
    return whole and (told is None or told.sequential) and not isinstance(solver, BlockSolver)


def _share(row: Row, config: Mapping[str, Any]) -> float:
    """Of all tokens, how many see a weight: of an expert's, those that are sent to it."""
    if ".experts." not in row.name:
        return 1.0
    used = int(config.get("num_experts_per_tok") or config.get("top_k") or 1)
    return min(1.0, used / int(config.get("num_local_experts") or config.get("num_experts") or used))


def _seen(rows: Sequence[Row], config: Mapping[str, Any]) -> float:
    """Weights that one token sees."""
    return sum(math.prod(row.shape) * _share(row, config) for row in rows)


def _gram_numbers(rows: Sequence[Row], config: Mapping[str, Any]) -> float:
    """Numbers of the Gram matrices that one token goes into: one an input, and several weights share one."""
    return sum(row.shape[1] ** 2 * _share(row, config) for row in rows if row.role not in SHARING)


def _activations(config: Mapping[str, Any], solver: Solver, tokens: int, seqlen: int, streams: int) -> int:
    """Bytes alive inside a block: of all tokens that wait before ``down``, its input and the stream beside
    it, or, where they would be too many, of as many as go through at once."""
    width = int(config["hidden_size"])
    middle = int(config.get("intermediate_size") or 4 * width)
    if _staged(config, solver, tokens):
        return 4 * tokens * (width + 2 * middle) * streams
    return staged_bytes(config, min(tokens, max(MICRO_TOKENS, seqlen))) * streams


def kept_bytes(width: int, tokens: int, blocks: int, weights: int, along: bool) -> int:
    """Bytes of activations that lie beside an output while it is made: of the last two blocks that left any,
    and of a third while that is written.

    Args:
        width: of a hidden state.
        tokens: of the calibration; 0 without.
        weights: of a block.
        along: whether the original model's go along.
    """
    size = 4 * width * tokens * (1 + along)
    every = blocks_between(size, 4 * width * (1 + along), weights) if size else 1
    return size * min(3, max(blocks - 1, 0) // every)


def refuse_folder(out: Path, bytes_: int) -> None:
    """Refuse an output that its folder does not let in, or has no room for."""
    folder = out.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise Refused(f"cannot write into {str(folder)!r}", where=str(out), fix="choose another -o")
    free = shutil.disk_usage(folder).free
    if free < bytes_ + (64 << 20):
        raise Refused(
            f"{bytes_:,} bytes to write and {free:,} free",
            where=str(folder),
            fix="free some space, or choose another -o",
        )
