"""Importance matrices of a model: taken on calibration text, and handed to the solvers as moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.calibrate.moments import MomentSum
from bitmill.calibrate.stream import Block, Stream
from bitmill.calibrate.tokens import Calibration
from bitmill.checkpoint.gguf_arch import architecture_of_model
from bitmill.checkpoint.imatrix import Entry, Imatrix
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.experts import ExpertTokens
from bitmill.core.types import Moments, Note, Row
from bitmill.families.base import is_expert

MISSING = ("plain", "refuse")
"""What becomes of a weight without data: it is quantized without importance, or the run is refused."""

_DENSE = ("f32", "f16", "bf16")
_TOKENS = 4096  # of a forward pass
_NAMED = 6  # weights in a refusal


@dataclass(frozen=True, eq=False)
class Taken:
    """An importance matrix of a model, and how its experts came by their tokens.

    Attributes:
        experts: of each expert's weight, by canonical name, the ``tokens`` summed over, and how many of them
            the router had ``sent``.
    """

    imatrix: Imatrix
    experts: Mapping[str, Mapping[str, float]]


def take_imatrix(
    source: Checkpoint,
    calibration: Calibration,
    device: str = "cpu",
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
    experts: ExpertTokens = ExpertTokens(),  # noqa: B008 - frozen
) -> Taken:
    """Run the calibration tokens through ``source`` and sum the squares of every block linear's input.

    Args:
        experts: which tokens the experts of a mixture are shown; hidden states do not change by it.

    Raises:
        Refused: llama.cpp has no names for this architecture's weights.
        Unsolvable: an activation is NaN or infinite.
    """
    arch = architecture_of_model(source.config)
    tokens = calibration.tokens
    stream = Stream(source, device, experts=(experts, tokens.numel()))
    hidden = stream.embed(tokens)
    batch = max(1, _TOKENS // tokens.shape[1])
    known: dict[str, dict[int, Moments]] = {}
    counted: dict[str, dict[str, float]] = {}
    for block in stream.blocks():
        progress("activations", block.index, stream.layers, f"block {block.index}")
        for path, moments in _summed(block, hidden, batch).items():
            weight = f"{block.prefix}{path}.weight"
            name, sent = arch.gguf_name(weight), block.sent(path)
            if sent is not None:
                counted[weight] = {"tokens": moments.tokens, "sent": sent}
            if name is not None:
                known.setdefault(name, {})[arch.expert(weight) or 0] = moments
    progress("activations", stream.layers, stream.layers, f"{tokens.numel()} tokens")
    entries = {name: _entry(parts) for name, parts in sorted(known.items())}
    return Taken(Imatrix(entries, _names(calibration), tokens.shape[0], tokens.shape[1]), counted)


def moments_from(
    imatrix: Imatrix, source: Checkpoint, rows: Sequence[Row], missing: str = "plain"
) -> tuple[dict[str, Moments], Calibration]:
    """Moments without Gram matrices for the weights that ``imatrix`` knows, and the account of the rest.

    Weights of a block with the same sums have the same input, and share a record.

    Args:
        rows: of the plan.
        missing: one of :data:`MISSING`.

    Raises:
        Refused: the matrix is another model's; a weight has no data and ``missing`` is ``refuse``, or its
        grid cannot do without.
    """
    if missing not in MISSING:
        raise Refused(f"{missing!r} is not one of {', '.join(MISSING)}", where="imatrix_missing")
    arch = architecture_of_model(source.config)
    known: dict[str, Moments] = {}
    shared: dict[tuple[int | None, str, int], Moments] = {}
    lacking = []
    for row in rows:
        if not (row.solved or row.role == "head"):
            continue
        entry, expert = imatrix.entries.get(arch.gguf_name(row.name) or ""), arch.expert(row.name) or 0
        if entry is not None:
            _refuse_shape(row, entry, expert)
        if entry is not None and int(entry.counts[expert]) > 0:
            record = Moments(int(entry.counts[expert]), entry.in_sum2[expert])
            known[row.name] = shared.setdefault((row.layer, entry.digest, expert), record)
        elif row.solved and str(row.grid) not in _DENSE:
            lacking.append(row)
    if not known:
        raise Refused(
            "no weight of this model has data in the importance matrix",
            where=f"its weights are called {', '.join(list(imatrix.entries)[:2])} …",
            fix="take one on this model: bitmill imatrix MODEL -o FILE",
        )
    if missing == "refuse" and lacking:
        raise _refused("the importance matrix has no data for", lacking, "drop --imatrix-missing refuse")
    notes = tuple(
        Note("no-importance", row.name, "no data in the importance matrix: every channel counts alike")
        for row in lacking
    )
    facts = {**_facts(imatrix), "weights": len(known), "without": len(lacking)}
    return known, Calibration(Calibration.none().tokens, facts, notes)


def _summed(block: Block, hidden: Tensor, batch: int) -> dict[str, Moments]:
    """Moments of each linear's input by path; ``hidden`` becomes the block's output."""
    linears, groups = block.linears(), block.shared_inputs(hidden[:1])
    sums = {group[0]: MomentSum(linears[group[0]].in_features, False, hidden.device) for group in groups}

    def adds(path: str) -> Callable[[Tensor], None]:
        return lambda x: sums[path].add(x, block.prefix + path)

    hooks = {path: adds(path) for path in sums}
    block.recount()
    for a in range(0, hidden.shape[0], batch):
        hidden[a : a + batch] = block.watched(hidden[a : a + batch], hooks)
    taken = {path: total.moments() for path, total in sums.items()}
    return {path: taken[group[0]] for group in groups for path in group}


def _entry(experts: Mapping[int, Moments]) -> Entry:
    """One weight's sums, or those of every expert of a stack in order."""
    ordered = [experts[number] for number in sorted(experts)]
    counts = torch.tensor([moments.tokens for moments in ordered])
    return Entry(torch.stack([moments.square for moments in ordered]).cpu(), counts)


def _names(calibration: Calibration) -> tuple[str, ...]:
    """Names of the texts; of a file its own only, since a whole path tells where it was made."""
    sources = calibration.facts.get("sources") or ({"name": calibration.facts.get("source", "unknown")},)
    names = [str(source["name"]) for source in sources]
    return tuple(Path(name).name if Path(name).is_file() else name for name in names)


def _facts(imatrix: Imatrix) -> dict[str, Any]:
    return {
        "source": "importance matrix",
        "sha256": imatrix.digest,
        "datasets": list(imatrix.datasets),
        "chunks": imatrix.chunk_count,
    }


def _refuse_shape(row: Row, entry: Entry, expert: int) -> None:
    matrices, columns = entry.in_sum2.shape
    if columns != row.shape[-1] or expert >= matrices or (matrices > 1 and not is_expert(row.name)):
        raise Refused(
            f"the importance matrix has {matrices} × {columns} values, the weight {row.shape[-1]} columns",
            where=row.name,
            fix="it was taken on another model: take one on this model",
        )


def _refused(what: str, rows: Sequence[Row], fix: str) -> Refused:
    named = ", ".join(row.name for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return Refused(f"{what} {len(rows)} weights", where=named + more, fix=f"{fix}, or take it on more text")
