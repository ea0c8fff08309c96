"""The decision matrix as it stands in ``rules.toml``: jobs, programs, ladders, and the rules of thumb."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitmill.advise.machine import Machine
from bitmill.core.errors import Refused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Job:
    """What somebody wants of a model.

    Attributes:
        name: ``chat``, ``code``, ``extract``, ``serve``, ``finetune`` or ``edge``.
        rate: tokens a second of each sequence below which it is no fun.
        floor: bits a weight below which quality is not trusted.
        kld: what a measured file may lose.
        context, parallel: what is usual.
        why, source: the rule, and whose it is.
    """

    name: str
    rate: float
    floor: float
    kld: float
    context: int
    why: str
    source: str
    parallel: int = 1


@dataclass(frozen=True)
class Ladder:
    """Recipes to try, in order of preference; ``last`` only where nothing above the floor works."""

    try_: tuple[str, ...]
    last: tuple[str, ...]
    source: str


def jobs() -> tuple[str, ...]:
    """Names of the jobs."""
    return tuple(_table()["jobs"])


def job(name: str) -> Job:
    """The job of that name.

    Raises:
        Refused: there is none.
    """
    row = _table()["jobs"].get(name.strip().lower())
    if row is None:
        raise Refused(f"there is no job {name!r} here", fix=f"one of: {', '.join(jobs())}")
    return Job(name=name.strip().lower(), **row)


def kind_of(machine: Machine) -> tuple[str, ...]:
    """What a machine is, in the words of the rules."""
    if not machine.cards:
        return ("cpu", "any")
    maker = machine.cards[0].source.partition(" ")[0].lower()
    return (maker, "unified" if machine.unified else "card", "any")


def runtime_for(wanted: Job, machine: Machine) -> tuple[str, str, str]:
    """The program for a job on a machine, why, and whose rule that is."""
    kinds = kind_of(machine)
    for row in _table()["runtime"]:
        if row["job"] in (wanted.name, "any") and row["where"] in kinds:
            return row["use"], row["why"], row["source"]
    raise Refused(f"no program is known for {wanted.name} on this machine", fix="say --runtime")


def ladder(runtime: str, wanted: Job) -> Ladder:
    """What to try with a program for a job.

    Raises:
        Refused: the program is not for that.
    """
    rows = _table()["ladder"]
    for row in rows:
        if row["runtime"] == runtime and wanted.name in row["jobs"]:
            return Ladder(tuple(row["try"]), tuple(row["last"]), row["source"])
    able = [row["runtime"] for row in rows if wanted.name in row["jobs"]]
    raise Refused(f"{runtime} is not for {wanted.name}", fix=f"--runtime {' or '.join(dict.fromkeys(able))}")


def lacks(recipe: str, machine: Machine) -> str | None:
    """What a recipe asks for that the machine does not have; None when it has it, or nothing is asked."""
    row = _table()["needs"].get(recipe)
    if row is None or row["format"] in machine.formats:
        return None
    if machine.cards and not machine.formats:
        return f"whether the card multiplies {row['format']} is not known: name it"
    return f"no {row['format']} there: {row['why']}"


def least_bits(wanted: Job, parameters: int) -> tuple[float, str]:
    """The floor for a model of so many weights, and why."""
    for row in _table()["small"]:
        if parameters < row["below"] and row["floor"] > wanted.floor:
            return float(row["floor"]), str(row["why"])
    return wanted.floor, f"{wanted.floor:g} bits at least: step down a model before a type below 4 bits"


def low_bits() -> tuple[float, str]:
    """Bits a weight below which something else is better, and what."""
    row = _table()["low"]
    return float(row["below"]), str(row["why"])


def headroom(place: str) -> int:
    """Bytes to leave free in a place."""
    return round(_table()["headroom"][place])


def smaller_caches(runtime: str) -> tuple[str, ...]:
    """Types of keys and values to try after the program's own."""
    return tuple(_table()["caches"][runtime])


def cache_share() -> float:
    """At what share of the weights keys and values are quantized first."""
    return float(_table()["caches"]["share"])


def training() -> tuple[int, int]:
    """Rank of adapters, and bytes that each of their weights takes in training."""
    row = _table()["training"]
    return int(row["rank"]), int(row["bytes"])


def cited() -> Mapping[str, str]:
    """Rules that do not belong to one row, with their sources, and the table's date."""
    table = _table()
    return {
        "headroom": table["headroom"]["source"],
        "caches": f"{table['caches']['why']} ({table['caches']['source']})",
        "date": table["date"],
    }


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads((Path(__file__).parent / "rules.toml").read_text(encoding="utf-8"))
