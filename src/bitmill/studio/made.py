"""A file that Bitmill made, as its own report tells it: errors by tensor and by block, and notes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadRecipe, Refused
from bitmill.core.registry import parse_grid
from bitmill.measurement.report import give, percent, size
from bitmill.pages.anatomy import anatomy
from bitmill.pages.beside import report_of, weighted
from bitmill.pages.experts import experts
from bitmill.pages.heat import ROLES, heat
from bitmill.pages.parts import Card, commands, facts, note, panel, rows, section, strip
from bitmill.pages.record import map_of
from bitmill.pages.svg import WIDTH, box, line, svg, text

MOST_WEIGHTS = 1 << 27
"""Of a tensor that is looked into whole."""

_MOST_ROWS, _LONGEST = 200_000, 200
_SHOWN_NOTES = 12


@dataclass(frozen=True, eq=False)
class Made:
    """One file with its report.

    Attributes:
        path: of the file.
        stored: the file, open.
        original: what it was made from, where that is given.
        report: what the run said, unchecked.
        tensors: rows of the report that make sense: name, role, layer, shape, grid, bits, relative.
    """

    path: Path
    stored: Checkpoint
    original: Checkpoint | None
    report: Mapping[str, Any]
    tensors: Sequence[Mapping[str, Any]]

    def panel(self, name: str) -> dict[str, Any]:
        """One tensor from inside, see :func:`~bitmill.pages.anatomy.anatomy`.

        Raises:
            Refused: it is not one of the report's, its original is not there, or it is too large.
        """
        if name not in {row["name"] for row in self.tensors}:
            raise Refused("the report has no such tensor", where="tensor", fix="one of the map")
        if self.original is None:
            raise Refused(
                "its weights before are not here", where=name, fix="bitmill studio FILE --against ORIGINAL"
            )
        known = self.original.tensors.get(name)
        if known is None or len(known.shape) != len(("out", "in")):
            raise Refused("the original has no such matrix", where=name, fix="the model it was made from")
        if prod(known.shape) > MOST_WEIGHTS:
            raise Refused(f"more than {MOST_WEIGHTS:,} weights are not looked into whole", where=name)
        stored = self.stored.stored(name)
        if stored is None or stored.shape != known.shape:
            raise Refused("it is not stored on a grid", where=name)
        return anatomy(stored, self.original.read(name).float())


def made(path: Path, stored: Checkpoint, original: Checkpoint | None) -> Made | None:
    """The report beside a file, or inside a folder; None where there is none."""
    report = report_of(path)
    if not isinstance(report.get("plan"), dict):
        return None
    return Made(path, stored, original, report, _tensors(report))


def sections(found: Made, again: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The page's part about this file, and what the script is to know of its map.

    Args:
        again: commands that make and measure it again.
    """
    picture, cells = heat([{"tensors": found.tensors}], [weighted(found.report)])
    other = ""
    if found.original is not None and found.report["plan"].get("source") != found.original.digest:
        other = note(
            f"The report is of another model than {found.original.path.name}, or of one in other files: "
            "weights before are not surely those that this file was made from."
        )
    body = (
        strip(_cards(found))
        + other
        + map_of([found.path.name], picture, found.original is not None)
        + experts(found.report)
        + _blocks(found.report)
        + _notes(found.report)
        + _how(found, again)
    )
    return body, cells


def _cards(found: Made) -> list[Card]:
    plan = found.report["plan"]
    errors = [row["relative"] for row in found.tensors]
    worst = max(found.tensors, key=lambda row: row["relative"], default=None)
    linears = _number(plan.get("bpw_linears"))
    cards = [
        Card(
            "Size", size(_number(plan.get("bytes")) or 0.0), f"{give(_number(plan.get('bpw')))} bits a weight"
        ),
        Card("Linears", give(linears), "bits a weight"),
    ]
    if worst is not None:
        middle = sorted(errors)[len(errors) // 2]
        cards.append(
            Card("Error of a weight", percent(middle), f"median; worst {percent(worst['relative'])}")
        )
    seconds = _number(found.report.get("seconds"))
    if seconds is not None:
        cards.append(Card("Made in", f"{seconds:,.0f} s", f"by Bitmill {_word(found.report.get('bitmill'))}"))
    return cards


def _blocks(report: Mapping[str, Any]) -> str:
    """Output error of each block, as the run saw it."""
    told = report.get("blocks")
    errors = [_number(value) for value in told.values()] if isinstance(told, dict) else []
    known = [value for value in errors[:_MOST_ROWS] if value is not None]
    if not known or len(known) != len(errors):
        return ""
    left, high, base = 58, 120, 140
    top, wide = max(known) or 1.0, (WIDTH - left) / len(known)
    parts = [
        line(left, base, WIDTH, base, "axis"),
        text(left - 8, base - high + 4, percent(top), "tick", "end"),
    ]
    every = max(1, math.ceil(len(known) / 16))
    for i, value in enumerate(known):
        tall, x = max(high * value / top, 1.0), left + i * wide
        parts.append(box(x, base - tall, max(wide - 2, 1.0), tall, "bar"))
        if i % every == 0:
            parts.append(text(x + wide / 2, base + 16, str(i), "tick", "middle"))
    said = "Error of each block’s output on the calibration text, relative to what the block adds."
    return section("Block by block", said, svg(base + 22, parts, "error of each block's output"))


def _notes(report: Mapping[str, Any]) -> str:
    told = report.get("notes")
    found = [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    if not found:
        return ""
    kinds = Counter(_word(one.get("kind")) for one in found)
    first = {_word(one.get("kind")): one for one in reversed(found)}
    lines = [
        (kind, str(count), _word(first[kind].get("where")), _word(first[kind].get("text")))
        for kind, count in kinds.most_common(_SHOWN_NOTES)
    ]
    said = "What did not go as asked, or is good to know: the first of each kind."
    return section("Notes", said, rows(("kind", "how many", "where", "what"), lines, left=4))


def _how(found: Made, again: Sequence[str]) -> str:
    plan, calibration = found.report["plan"], found.report.get("calibration")
    told = calibration if isinstance(calibration, dict) else {}
    pairs = [("recipe", _word(plan.get("recipe"))), ("container", _word(plan.get("container")))]
    named = (("source", "calibrated on"), ("tokens", "tokens"), ("windows", "windows"), ("seed", "seed"))
    pairs += [(label, _word(told[key])) for key, label in named if key in told]
    return f"<h2>How it was made</h2>{panel(facts(pairs, 'mono'))}{commands(again) if again else ''}"


def _tensors(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan's rows whose error the run noted; what does not make sense is left out."""
    told, errors = report["plan"].get("rows"), report.get("tensors")
    if not isinstance(told, list) or not isinstance(errors, dict):
        return []
    found = []
    for row in told[:_MOST_ROWS]:
        if not isinstance(row, dict) or row.get("role") not in ROLES:
            continue
        name, layer, shape = row.get("name"), row.get("layer"), row.get("shape")
        if not isinstance(name, str) or not isinstance(errors.get(name), dict):
            continue
        relative, bits = _number(errors[name].get("relative")), _bits(row.get("grid"), shape)
        if relative is None or bits is None or not isinstance(layer, int) or not 0 <= layer < _MOST_ROWS:
            continue
        kept = {"name": name, "role": row["role"], "layer": layer, "shape": shape}
        found.append({**kept, "grid": row["grid"], "bits": bits, "relative": relative})
    return found


def _bits(grid: Any, shape: Any) -> int | None:
    """Stored bits of a matrix, where both are what they should be."""
    whole = isinstance(shape, list) and len(shape) == len(("out", "in"))
    if not isinstance(grid, str) or len(grid) > _LONGEST or not whole:
        return None
    if not all(isinstance(n, int) and 0 < n < 1 << 32 for n in shape):
        return None
    try:
        known = parse_grid(grid)
    except BadRecipe:
        return None
    return None if known.refuses(tuple(shape)) else known.storage_bits((shape[0], shape[1]))


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return float(value) if good and math.isfinite(value) else None


def _word(value: Any) -> str:
    """Text as it is, numbers as text, cut short; it is escaped where it is put into the page."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return "?"
    said = value if isinstance(value, str) else f"{value:,}"
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST - 1]}…"
