"""Cards, chips and memories by name, from a table of what their makers say of them (``hardware.toml``)."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitmill.core.errors import Refused

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_GIB = 1 << 30
_MAKERS = re.compile(r"nvidia|geforce|amd|radeon|apple|intel|graphics|generation|gpu|[^a-z0-9]")
_SIZE = re.compile(r"[ -]?\b(\d+) ?GB\b.*")
_FORM = re.compile(r"(sxm\d?|pcie)$")
_SMALL = 36
"""Apple's graphics may take two thirds of up to this many GiB, and three quarters of more."""


@dataclass(frozen=True)
class Card:
    """Something that computes beside, or together with, the processor.

    Attributes:
        name: as the table has it, or as the driver says.
        bytes_: memory that a model may take there.
        bandwidth: bytes a second of its memory, as its maker says; 0 when not known.
        flops: dense 16-bit operations a second; 0 when not known.
        bus: bytes a second to and from main memory; 0 where that is the same memory.
        formats: what it multiplies natively: ``f16 bf16 int8 int4 fp8 fp4``.
        source: where these come from.
        cores: processor cores, where the chip is the whole machine; 0 when not known.
    """

    name: str
    bytes_: int
    bandwidth: float = 0.0
    flops: float = 0.0
    bus: float = 0.0
    formats: tuple[str, ...] = ()
    source: str = ""
    cores: int = 0

    @property
    def unified(self) -> bool:
        """Whether its memory is the processor's."""
        return not self.bus


def find_card(name: str, gib: float | None = None) -> Card | None:
    """The card or chip of that name, with the memory it is usually sold with or with ``gib``; None for none.

    Raises:
        Refused: it is not sold with that much memory.
    """
    key = plain_name(name)
    table = _table()
    key = table["names"].get(key, key)
    for kind in ("cards", "chips"):
        row = table[kind].get(key)
        if row is not None:
            return _card(key, row, gib, kind == "chips")
    return None


def known_card(name: str) -> Card | None:
    """As :func:`find_card` for what a driver calls it: ``NVIDIA A100-SXM4-80GB``."""
    size = _SIZE.search(name)
    key = plain_name(_SIZE.sub("", name))
    key = key if find_card(key) is not None else _FORM.sub("", key)
    try:
        return find_card(key, None if size is None else float(size[1]))
    except Refused:
        return None  # a card of that name with another size is another card


def memory_bandwidth(name: str, transfers: int | None, channels: int = 2) -> float | None:
    """Bytes a second of main memory, ``ddr5`` or the like; None when the table has no such memory.

    Args:
        transfers: millions a second, as in ``ddr5-6000``; None for the usual.
        channels: of 8 bytes.
    """
    row = _table()["memories"].get(name)
    return None if row is None else 8e6 * channels * float(transfers or row["mts"])


def closest(name: str) -> str:
    """Names near to one that is not in the table, or a few that are."""
    table = _table()
    known = [*table["cards"], *table["chips"], *table["memories"]]
    near = difflib.get_close_matches(plain_name(name), known, n=3, cutoff=0.5)
    return " or ".join(near) if near else "for example rtx4090, a100, m2max, ddr5"


def dated() -> str:
    """When the table was last gone through."""
    return str(_table()["date"])


def every_card() -> tuple[Card, ...]:
    """All of the table, each as it is usually sold."""
    table = _table()
    return tuple(
        _card(k, row, None, kind == "chips") for kind in ("cards", "chips") for k, row in table[kind].items()
    )


def plain_name(name: str) -> str:
    """``NVIDIA GeForce RTX 4060 Ti`` as the table spells it."""
    return _MAKERS.sub("", name.lower())


def _card(name: str, row: Mapping[str, Any], gib: float | None, chip: bool) -> Card:
    size = float(row["gb"][0]) if gib is None else gib
    if size not in row["gb"]:
        sold = " or ".join(f"{gb}GB" for gb in sorted(row["gb"]))
        raise Refused(
            f"{name} is not made with {size:g} GB", fix=f"{name} {sold}, or vram={size:g}GB for any card"
        )
    speeds = row["gbps"]
    usable = row.get("usable", (2 / 3 if size <= _SMALL else 3 / 4) if chip else 1.0)
    generation = _table()["generations"][row["generation"]]
    return Card(
        name=name,
        bytes_=round(size * _GIB * usable),
        bandwidth=1e9 * speeds[row["gb"].index(size) if len(speeds) > 1 else 0],
        flops=1e12 * row["tflops"],
        bus=0.0 if chip else 1e9 * row["pcie"],
        formats=tuple(generation["formats"]),
        source=f"{row['source']}; {generation['source']}",
        cores=int(row.get("cores", 0)),
    )


@cache
def _table() -> Mapping[str, Any]:
    return tomllib.loads((Path(__file__).parent / "hardware.toml").read_text(encoding="utf-8"))
