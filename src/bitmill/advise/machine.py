"""How much memory a machine has: this one's, or one that is described in a few words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from bitmill.core.errors import Refused
from bitmill.run.memory import available_bytes

_ENDS = {"": 1000, "b": 1000, "ib": 1024}
_UNITS: Mapping[str, int] = MappingProxyType(
    {f"{letter}{end}": base**i for i, letter in enumerate("kmgt", 1) for end, base in _ENDS.items()}
)
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]*)")


@dataclass(frozen=True)
class Machine:
    """What there is to put a model into.

    Attributes:
        ram_bytes: main memory; 0 when only a card was named.
        vram_bytes: memory of one card; 0 without one.
        said: where the numbers come from.
    """

    ram_bytes: int
    vram_bytes: int
    said: str

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Where a model may be, the fastest first: ``vram``, ``ram``, and the bytes there."""
        both = (("vram", self.vram_bytes), ("ram", self.ram_bytes))
        return tuple((place, bytes_) for place, bytes_ in both if bytes_)


def machine(text: str | None = None) -> Machine:
    """The machine that ``text`` describes, or this one, with what is free of it now.

    Args:
        text: ``8GB`` (main memory), ``vram=24GB``, ``ram=16GB,vram=8GB``; GiB are 1024 to the third.

    Raises:
        Refused: the text says something else.
    """
    if text is None:
        return here()
    found: dict[str, int] = {}
    for part in text.lower().replace("+", ",").split(","):
        name, equals, size = part.strip().rpartition("=")
        name = name.strip() if equals else "ram"
        if name not in ("ram", "vram") or name in found:
            raise _unread(text)
        found[name] = _bytes(size.strip(), text)
    if not any(found.values()):
        raise _unread(text)
    return Machine(found.get("ram", 0), found.get("vram", 0), text)


def here() -> Machine:
    """This machine: memory that may still be taken, and what is free on its first card."""
    card = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return Machine(available_bytes(), card, "free on this machine")


def _bytes(size: str, text: str) -> int:
    match = _SIZE.fullmatch(size)
    if match is None or match["unit"] not in _UNITS:
        raise _unread(text)
    return round(float(match["number"]) * _UNITS[match["unit"]])


def _unread(text: str) -> Refused:
    return Refused(f"{text!r} describes no machine", fix="for example 16GB, vram=24GB or ram=64GB,vram=24GB")
