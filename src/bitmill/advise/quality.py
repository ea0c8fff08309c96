"""What a recipe loses, and how that is known: measured here, elsewhere on this family, or modelled."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitmill.advise.naming import bits_of
from bitmill.checkpoint.hf_folder import read_object
from bitmill.core.errors import BadFile, Refused
from bitmill.recipe import parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE, ELSEWHERE, MODELLED = "measured here", "measured elsewhere on this family", "modelled"
_LOSSLESS = 15.9
"""Bits from which nothing is lost that anybody measured."""


@dataclass(frozen=True)
class Loss:
    """Mean KL divergence in nats a token, and whose word that is."""

    kld: float
    evidence: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"kld": self.kld, "evidence": self.evidence, "source": self.source}

    def __str__(self) -> str:
        return f"KLD {self.kld:.2g} ({self.evidence})"


def loss(name: str, bits: float, family: str, measured: Mapping[str, Loss]) -> Loss:
    """What ``name`` loses: as measured here, as published for this family, or by its bits along that ladder.

    Args:
        name: a known name of a recipe.
        bits: a weight, of its linears.
        family: of the model.
        measured: what was measured on this model, by recipe.
    """
    known = measured.get(str(parse(name)))
    if known is not None:
        return known
    if bits >= _LOSSLESS:
        return Loss(0.0, MODELLED, "16 bits are the original")
    rows: list[Any] = _table()["measured"]
    for row in rows:
        if name in row["kld"] and row["family"] == family:
            return Loss(row["kld"][name], ELSEWHERE, f"{row['model']}, {row['text']}: {row['source']}")
    row = rows[0]
    if name in row["kld"]:
        return Loss(row["kld"][name], MODELLED, f"as {row['model']}, another family: {row['source']}")
    return Loss(_along(bits), MODELLED, f"by its bits, along the ladder of {row['model']}: {row['source']}")


def _along(bits: float) -> float:
    """The ladder at this many bits: between two of its files, logarithms in proportion."""
    points = _ladder()
    low = max((p for p in points if p[0] <= bits), default=points[0])
    high = min((p for p in points if p[0] >= bits), default=points[-1])
    if low[0] == high[0]:
        return min(low[1], high[1])
    share = (bits - low[0]) / (high[0] - low[0])
    return math.exp((1 - share) * math.log(low[1]) + share * math.log(high[1]))


@cache
def _ladder() -> tuple[tuple[float, float], ...]:
    kld: Mapping[str, float] = _table()["measured"][0]["kld"]
    found = sorted((bits_of(parse(name)).type_, value) for name, value in kld.items())
    hull: list[tuple[float, float]] = []
    for bits, value in found:
        while len(hull) > 1 and _above(hull[-2], hull[-1], (bits, value)):
            hull.pop()  # another file is better for its bits: this one is no rung
        hull.append((bits, value))
    return tuple(hull)


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether the middle one lies above the line between the others, logarithms in proportion."""
    if last[0] == first[0]:
        return True
    share = (middle[0] - first[0]) / (last[0] - first[0])
    return math.log(middle[1]) >= (1 - share) * math.log(first[1]) + share * math.log(last[1])


def read_measured(texts: list[str]) -> dict[str, Loss]:
    """What ``--measured`` names: ``Q4_K_M=record.json``, a record of ``bitmill measure --json``.

    Raises:
        Refused: it names no recipe, or no file.
        BadFile: the file is no such record.
    """
    found = {}
    for text in texts:
        name, equals, file = text.partition("=")
        path = Path(file).expanduser()
        if not equals or not path.is_file():
            raise Refused(f"{text!r} names no measurement", fix="--measured Q4_K_M=record.json")
        recipe = str(parse(name))
        record = read_object(path)
        kld = record.get("kld")
        mean = kld.get("mean") if isinstance(kld, dict) else None
        if not isinstance(mean, int | float) or isinstance(mean, bool) or not 0 <= mean < math.inf:
            raise BadFile("this is no record of a measurement: it has no mean KLD", where=str(path))
        found[recipe] = Loss(float(mean), HERE, f"{path.name}, {record.get('tokens', 0):,} tokens")
    return found


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads((Path(__file__).parent / "quality.toml").read_text(encoding="utf-8"))
