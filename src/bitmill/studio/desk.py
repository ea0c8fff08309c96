"""A model on the desk: its matrices by name, and whole rows of one at a time, the latest few kept at hand."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.packed_folder import PackedFolder
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused

ROWS = (1, 16, 128)
"""How many rows may be rounded together."""
MOST_WEIGHTS = 1 << 20
"""Of the rows that are rounded together."""
MOST_DECODED = 1 << 28
"""Weights of a tensor whose container decodes it whole."""
MOST_NAMES = 400
"""Of an answer that lists tensors."""
OUTSIDE = "outside the blocks"

_DENSE = ("f16", "bf16", "f32")
_KEPT_TILES = 6
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class Tile:
    """Whole rows of a matrix.

    Attributes:
        name, shape: of the matrix.
        first: the first of the rows.
        values: ``rows in`` float32, finite.
    """

    name: str
    shape: tuple[int, int]
    first: int
    values: Tensor


class Desk:
    """An open model: what is asked for is read, and no more."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._tiles: OrderedDict[tuple[str, int, int], Tile] = OrderedDict()
        self._lock = Lock()
        self._blocks: dict[str, list[str]] = {}
        for name, facts in checkpoint.tensors.items():
            if _is_matrix(facts.shape):
                found = _BLOCK.search(name)
                self._blocks.setdefault(OUTSIDE if found is None else found[1], []).append(name)

    @property
    def blocks(self) -> list[str]:
        """Numbers of the blocks that hold matrices, then :data:`OUTSIDE` where there are others."""
        inside = sorted((name for name in self._blocks if name != OUTSIDE), key=int)
        return inside + [OUTSIDE] * (OUTSIDE in self._blocks)

    def matrices(self, block: str, having: str = "") -> dict[str, Any]:
        """Names and shapes of a block's matrices that have ``having`` in their names, the first of them.

        Raises:
            Refused: there is no such block.
        """
        if block not in self._blocks:
            raise Refused(f"there is no block {block!r}", where="block", fix="one that the page lists")
        names = [name for name in self._blocks[block] if having.lower() in name.lower()]
        facts = self.checkpoint.tensors
        shown = [{"name": name, "shape": list(facts[name].shape)} for name in names[:MOST_NAMES]]
        return {"block": block, "matrices": shown, "all": len(names)}

    def shape(self, name: str) -> tuple[int, int]:
        """Of a matrix.

        Raises:
            Refused: there is none of this name.
        """
        facts = self.checkpoint.tensors.get(name)
        if facts is None or not _is_matrix(facts.shape):
            raise Refused("there is no matrix of this name", where="tensor", fix="one that the page lists")
        return facts.shape[0], facts.shape[1]

    def kept(self, name: str) -> str:
        """The grid that a tensor of a quantized file is on, or what it is packed as; empty for dense ones."""
        if isinstance(self.checkpoint, GgufCheckpoint):
            kind = self.checkpoint.type_of(name)
            return "" if kind in _DENSE else kind
        packed = isinstance(self.checkpoint, PackedFolder) and self.checkpoint.is_packed(name)
        return "quantized" if packed else ""

    def tile(self, name: str, row: int, rows: int) -> Tile:
        """The ``rows`` rows that ``row`` is one of, counted from the first; fewer at the end.

        Raises:
            Refused: no such matrix or row, too many weights, or weights that are not numbers.
        """
        shape = self.shape(name)
        if row >= shape[0]:
            raise Refused(
                f"there is no row {row}: the matrix has {shape[0]}", where="row", fix=f"0 to {shape[0] - 1}"
            )
        many = rows * shape[1]
        if many > MOST_WEIGHTS:
            raise Refused(
                f"{rows} rows of {shape[1]:,} weights are more than the {MOST_WEIGHTS:,} that are rounded "
                "at a time",
                where="rows",
                fix=f"rows: {max((n for n in ROWS if n * shape[1] <= MOST_WEIGHTS), default=1)}",
            )
        first = row // rows * rows
        key = (name, first, rows)
        with self._lock:
            if key not in self._tiles:
                values = _read(self.checkpoint, name, first, min(first + rows, shape[0]))
                self._tiles[key] = Tile(name, shape, first, values)
                while len(self._tiles) > _KEPT_TILES:
                    self._tiles.popitem(last=False)
            self._tiles.move_to_end(key)
            return self._tiles[key]


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == len(("out", "in")) and all(shape)


def _read(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Tensor:
    """Rows of a matrix, float32. A GGUF file decodes these rows alone, and dense safetensors are mapped."""
    if isinstance(checkpoint, GgufCheckpoint):
        values = checkpoint.rows(name, start, stop)
    else:
        whole = prod(checkpoint.tensors[name].shape)
        packed = isinstance(checkpoint, PackedFolder) and checkpoint.is_packed(name)
        if packed and whole > MOST_DECODED:
            raise Refused(
                f"this tensor of {whole:,} weights is decoded whole, and more than {MOST_DECODED:,} are not",
                where=name,
                fix="give the original model, whose rows are read alone",
            )
        values = checkpoint.read(name)[start:stop]
    made = values.to(torch.float32).clone()
    if not bool(made.isfinite().all()):
        raise Refused("some of these weights are not numbers", where=name, fix="bitmill verify says where")
    return made
