"""What there is to run a model on: this machine, or one that is described in a few words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bitmill.advise.detect import cards, disk_bytes, processor, read_bandwidth
from bitmill.advise.hardware import Card, closest, find_card, memory_bandwidth
from bitmill.core.errors import Refused
from bitmill.run.memory import available_bytes

_ENDS = {"": 1000, "b": 1000, "ib": 1024}
_UNITS: Mapping[str, int] = MappingProxyType(
    {f"{letter}{end}": base**i for i, letter in enumerate("kmgt", 1) for end, base in _ENDS.items()}
)
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[a-z]*)")
_LED = re.compile(
    r"(?P<size>\d+(?:\.\d+)?\s*[kmgt]i?b?)\s+(?:(?P<channels>\d+)\s*x\s*)?(?P<name>l?p?ddr\w+?)(?:-(?P<speed>\d+))?"
)
_NAMED = re.compile(
    r"(?:(?P<many>\d)\s*x\s*)?(?P<name>[a-z0-9].*?)(?:\s+(?P<size>\d+(?:\.\d+)?)\s*g(?:i?b)?)?"
)
_CORES = re.compile(r"(\d{1,4})\s*(?:cpu\s*)?(?:cores?|threads?)")
_BUS = 31.5e9  # PCIe 4 with 16 lanes: what an unnamed card is taken to have


@dataclass(frozen=True)
class Machine:
    """What there is to put a model into, and how fast it is read there.

    Attributes:
        ram_bytes: main memory; 0 when only a card was named.
        vram_bytes: memory of its cards together; 0 without one, and where all memory is one.
        said: where the numbers come from.
        cards: what computes beside the processor, or with it: cards of one machine are alike.
        ram_bandwidth: bytes a second of main memory; 0 when not known.
        measured: whether that was measured just now, and not read from a table.
        cores: processor cores for the program; 0 when not known.
        features: extensions of the processor that matter.
        disk_bytes: free for what is made; 0 when not known.
    """

    ram_bytes: int
    vram_bytes: int
    said: str
    cards: tuple[Card, ...] = ()
    ram_bandwidth: float = 0.0
    measured: bool = False
    cores: int = 0
    features: tuple[str, ...] = ()
    disk_bytes: int = 0

    @property
    def unified(self) -> bool:
        """Whether processor and graphics share one memory: then there is no cliff."""
        return bool(self.cards) and self.cards[0].unified

    @property
    def formats(self) -> tuple[str, ...]:
        """What its cards multiply natively; empty when not known."""
        return self.cards[0].formats if self.cards else ()

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Where a model may be, the fastest first: ``vram``, ``unified``, ``ram``, and the bytes there."""
        if self.unified:
            return (("unified", self.cards[0].bytes_),)
        both = (("vram", self.vram_bytes), ("ram", self.ram_bytes))
        return tuple((place, bytes_) for place, bytes_ in both if bytes_)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "said": self.said,
            "ram_bytes": self.ram_bytes,
            "vram_bytes": self.vram_bytes,
            "unified": self.unified,
            "ram_bandwidth": self.ram_bandwidth or None,
            "ram_bandwidth_evidence": "measured"
            if self.measured
            else "described"
            if self.ram_bandwidth
            else None,
            "cores": self.cores or None,
            "features": list(self.features),
            "disk_bytes": self.disk_bytes or None,
            "cards": [
                {
                    "name": card.name,
                    "bytes": card.bytes_,
                    "bandwidth": card.bandwidth or None,
                    "flops": card.flops or None,
                    "bus": card.bus or None,
                    "formats": list(card.formats),
                    "source": card.source,
                }
                for card in self.cards
            ],
        }


def machine(text: str | None = None) -> Machine:
    """The machine that ``text`` describes, or this one, with what is free of it now.

    Args:
        text: parts with ``+`` or ``,`` between them: ``8GB`` (main memory), ``vram=24GB``, ``rtx4090``,
            ``2x rtx3090``, ``rtx4060ti 8GB``, ``m2max 64GB``, ``64GB ddr5-6000``, ``256GB 8x ddr4``,
            ``16 cores``. A named card has its size in GiB; elsewhere GB are 1000 to the third and GiB 1024.

    Raises:
        Refused: the text says something else.
    """
    if text is None:
        return here()
    found: dict[str, Any] = {}
    for part in re.split(r"[+,]", text.lower()):
        for key, value in _part(part.strip(), text).items():
            if key in found:
                raise Refused(
                    f"{text!r} describes no machine: it says {key.partition('_')[0]} twice", fix="keep one"
                )
            found[key] = value
    if not any(found.get(key) for key in ("ram_bytes", "vram_bytes", "cards")):
        raise _unread(text)
    return _whole(text, found)


def here(fast: bool = False) -> Machine:
    """This machine: memory that may still be taken, and what is free on its cards.

    Args:
        fast: leave out how fast main memory is read, which takes a tenth of a second.
    """
    cpu, found = processor(), cards()
    unified = bool(found) and found[0].unified
    return Machine(
        ram_bytes=available_bytes(),
        vram_bytes=0 if unified else sum(card.bytes_ for card in found),
        said="free on this machine",
        cards=found,
        ram_bandwidth=0.0 if fast else read_bandwidth(),
        measured=not fast,
        cores=cpu.cores,
        features=cpu.features,
        disk_bytes=disk_bytes(Path.cwd()),
    )


def _whole(text: str, found: Mapping[str, Any]) -> Machine:
    cards_: tuple[Card, ...] = found.get("cards", ())
    if cards_ and "vram_bytes" in found:
        raise Refused(f"{text!r} names a card and the memory of one", fix="keep one of them")
    if cards_ and cards_[0].unified:
        if "ram_bytes" in found:
            raise Refused(
                f"{cards_[0].name} has one memory for processor and graphics, and {text!r} names two",
                fix=f"for example {cards_[0].name} 64GB",
            )
        size = cards_[0].bytes_
        return Machine(size, 0, text, cards_, cards_[0].bandwidth, cores=found.get("cores", cards_[0].cores))
    vram = found.get("vram_bytes", 0) or sum(card.bytes_ for card in cards_)
    if vram and not cards_:
        cards_ = (Card("a card", vram, bus=_BUS, source="only its memory was named"),)
    return Machine(
        ram_bytes=found.get("ram_bytes", 0),
        vram_bytes=vram,
        said=text,
        cards=cards_,
        ram_bandwidth=found.get("ram_bandwidth", 0.0),
        cores=found.get("cores", 0),
    )


def _part(part: str, text: str) -> dict[str, Any]:
    """What one part of a description says, by name of what it is about."""
    name, equals, size = (word.strip() for word in part.rpartition("="))
    if equals:
        if name not in ("ram", "vram"):
            raise _unread(text)
        return {f"{name}_bytes": _bytes(size, text)}
    if (cores := _CORES.fullmatch(part)) is not None:
        return {"cores": int(cores[1])}
    if (led := _LED.fullmatch(part)) is not None:
        speed = led["speed"] and int(led["speed"])
        bandwidth = memory_bandwidth(led["name"], speed or None, int(led["channels"] or 2))
        if bandwidth is None:
            raise _unread(text, led["name"])
        return {"ram_bytes": _bytes(led["size"], text), "ram_bandwidth": bandwidth}
    named = _NAMED.fullmatch(part)
    if named is not None:
        card = find_card(named["name"], float(named["size"]) if named["size"] else None)
        if card is not None:
            return {"cards": (card,) * int(named["many"] or 1)}
    if _SIZE.fullmatch(part) is not None or named is None:
        return {"ram_bytes": _bytes(part, text)}
    raise _unread(text, named["name"])


def _bytes(size: str, text: str) -> int:
    match = _SIZE.fullmatch(size.strip())
    if match is None or match["unit"] not in _UNITS:
        raise _unread(text)
    return round(float(match["number"]) * _UNITS[match["unit"]])


def _unread(text: str, name: str | None = None) -> Refused:
    if name is None:
        fix = "for example 16GB, vram=24GB, 'rtx4090 + 64GB ddr5' or 'm2max 64GB'"
        return Refused(f"{text!r} describes no machine", fix=fix)
    return Refused(
        f"{text!r} describes no machine: {name!r} is not in the table of cards, chips and memories",
        fix=f"{closest(name)}; any other card is vram=24GB, memory ram=64GB",
    )
