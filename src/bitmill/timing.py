"""How long a run takes on this machine: its embedding, head and first blocks done for real, and thrown away.

The first block pays for what happens once (compiled loops are loaded, threads start), so those after it stand
for the rest. Where a plan has blocks of several kinds, as llama.cpp's mixtures do, a block of each kind is
timed: the weights of an early block on the grids of a later one.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bitmill.calibrate.tokens import Calibration
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Moments, Row, Slot
from bitmill.forecast import DISK
from bitmill.journal import Workspace
from bitmill.planning import Plan
from bitmill.walk import Progress, Walk

KINDS = 3  # of blocks that are timed, beside the first block
OUTSIDE = "embedding and head"

Kind = tuple[tuple[str, str], ...]
"""Grids of a block's tensors by their names inside it."""


@dataclass(frozen=True)
class Timed:
    """What was timed, and what it comes to.

    Attributes:
        outside: seconds of embedding, head and final norm.
        blocks: seconds of the blocks that were done, the first one first.
        seconds: of the whole run, without the drawing of calibration text.
        of: how many blocks there are.
    """

    outside: float
    blocks: tuple[float, ...]
    seconds: float
    of: int

    @property
    def said(self) -> str:
        """How it was found, for a reader."""
        return f"{len(self.blocks)} of {self.of} blocks timed"


def timed(
    made: Plan,
    source: Checkpoint,
    known: Mapping[str, Moments] | None = None,
    *,
    scratch: Path | None = None,
    device: str = "cpu",
    tell: Progress = lambda *_: None,
) -> Timed:
    """Time a plan's first blocks on random tokens, as many and as long as it would calibrate on.

    Args:
        known: moments that the run would have from a file or an importance matrix.
        scratch: folder for what is written on the way, and deleted; the system's unless given.

    Raises:
        Refused: a step with the whole model follows the blocks, or comes before them.
    """
    if made.recipe.tune is not None or made.learned_rotations is not None:
        raise Refused(
            "timing blocks says nothing of a step with the whole model",
            where=str(made.recipe),
            fix="leave --time out: the plan models it",
        )
    rows, kinds = first_rows(made)
    common = _common(kinds)
    clock = _Clock(tell, 1 + len(common))
    calibration = (
        _random_tokens(made, source) if made.needs != "nothing" and not known else Calibration.none()
    )
    with tempfile.TemporaryDirectory(prefix=".bitmill-timing-", dir=scratch) as folder:
        files = (_scratch_file(made, rows, source),)
        space = Workspace(Path(folder) / "timed", files, True)
        part = replace(made, rows=rows, files=files)
        walk = Walk(part, source, space, clock, calibration, known or {}, device, False)
        try:
            space.open({"timing": made.digest}, False)
            walk.run({}, (), clock.started)
        finally:
            space.discard()
    return _extrapolated(made, clock, kinds, common)


def first_rows(made: Plan) -> tuple[tuple[Row, ...], tuple[Kind, ...]]:
    """The rows that are timed, and the kind of every block of the plan.

    Of the plan's rows, those outside the blocks, those of the first block, and a block for each common kind:
    on the grids of that kind where it has the same tensors, else as it is.

    Raises:
        Refused: there are no blocks.
    """
    layers = sorted({row.layer for row in made.rows if row.layer is not None})
    if not layers:
        raise Refused("the plan has no blocks to time", where=str(made.recipe), fix="leave --time out")
    kinds = [_kind(made.rows, layer) for layer in layers]
    found = [row for row in made.rows if row.layer is None or row.layer == layers[0]]
    for layer, kind in zip(layers[1:], _common(kinds), strict=False):
        own = [row for row in made.rows if row.layer == layer]
        model = layers[kinds.index(kind, 1)]
        theirs = {_inside(row): row for row in made.rows if row.layer == model}
        same = {_inside(row) for row in own} == set(theirs)
        found += [replace(row, grid=theirs[_inside(row)].grid) if same else row for row in own]
    return tuple(found), tuple(kinds)


def _common(kinds: Sequence[Kind]) -> list[Kind]:
    """The commonest kinds of the blocks after the first."""
    return [kind for kind, _ in Counter(kinds[1:]).most_common(KINDS)]


@dataclass
class _Clock:
    """Hears of a walk's progress, and notes when each part was done."""

    tell: Progress
    blocks: int
    ends: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.outside = self.started

    def __call__(self, event: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if text == OUTSIDE:
            self.outside = now
        if event == "block" and done == len(self.ends) + 1:
            self.ends.append(now)
        self.tell("timing", len(self.ends), self.blocks, "")

    @property
    def spans(self) -> list[float]:
        """Seconds of each block."""
        return [b - a for a, b in zip([self.outside, *self.ends], self.ends, strict=False)]


def _kind(rows: Sequence[Row], layer: int) -> Kind:
    return tuple(sorted((_inside(row), str(row.grid)) for row in rows if row.layer == layer))


def _inside(row: Row) -> str:
    """A tensor's name without its block's number, and its shape."""
    return f"{row.name.replace(f'.{row.layer}.', '.', 1)} {list(row.shape)}"


def _scratch_file(made: Plan, rows: Sequence[Row], source: Checkpoint) -> FileImage:
    """Room for what these rows are stored as, one after the other."""
    slots: list[Slot] = []
    at = 0
    for row in rows:
        for name, bytes_ in made.container.slots(row, source).items():
            slots.append(Slot(name, at, bytes_))
            at += bytes_
    return FileImage("", b"", tuple(slots), at)


def _random_tokens(made: Plan, source: Checkpoint) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    shape = (made.nsamples, made.seqlen)
    ids = torch.randint(0, int(source.config["vocab_size"]), shape, generator=generator)
    return Calibration(ids, {"source": "random tokens"})


def _extrapolated(made: Plan, clock: _Clock, kinds: Sequence[Kind], common: Sequence[Kind]) -> Timed:
    spans, outside = clock.spans, clock.outside - clock.started
    later = dict(zip(common, spans[1:], strict=True))
    usual = sum(later.values()) / len(later) if later else 0.0
    rest = sum(later.get(kind, usual) for kind in kinds[1:])
    whole = outside + spans[0] + rest + made.bytes_ / DISK
    return Timed(outside, tuple(spans), whole, len(kinds))
