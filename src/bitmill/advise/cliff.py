"""How fast a model runs on a machine, and where the cliff stands: layers on a card, and layers beside it.

A token needs every weight that sees it, and every key and value so far, once: at one token a time the time is
that of reading them, each from where it is. What is not on the card is read by the processor from main memory
(llama.cpp), or crosses the bus for every token (transformers, vLLM). A prompt is a matter of arithmetic
instead. All of it is a model: shares of what the makers promise, as ranges, and no promise of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitmill.advise.machine import Machine
from bitmill.advise.memory import Model, Wanted, step_bytes

CARD_SHARE = (0.45, 0.85)
"""Of a card's bandwidth, one token a time: 7B in Q4_0 had 0.45 (M2 Ultra) to 0.8 (M1) in llama.cpp's
discussion 4167."""
RAM_SHARE = (0.5, 0.85)
"""Of main memory's bandwidth by its specification, read by all cores."""
MEASURED_SHARE = (0.6, 1.0)
"""Of main memory's bandwidth where it was measured: there the specification's losses are in the number."""
BUS_SHARE = (0.6, 0.9)
CORE_BYTES = (2.0e9, 8.0e9)
"""Bytes of quantized weights that one core decodes and multiplies a second."""
CORE_FLOPS = (15e9, 90e9)
CARD_FLOPS_SHARE = (0.2, 0.6)
BLOCK_SECONDS = (60e-6, 15e-6)
"""What a block takes beside reading: starting its kernels, waiting for threads."""
USUAL_CORES = 8
USUAL_RAM = 51.2e9
"""Two channels of DDR4-3200, where nothing says what main memory is."""
PIECE = 512
"""Tokens of a prompt that go through at once where weights cross the bus for it."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Split:
    """A model on a machine, some of it on the card.

    Attributes:
        layers: blocks on the card, of all.
        of: blocks there are.
        experts_off: whether what is not on the card are the experts of blocks, and nothing else of them.
        card_bytes, ram_bytes: what is where, caches and buffers too.
        decode: tokens a second of one sequence, with the context full: the low and the high end.
        prefill: seconds until the first token of a full context: the low and the high end; None when
            not known.
    """

    layers: int
    of: int
    experts_off: bool
    card_bytes: int
    ram_bytes: int
    decode: Range
    prefill: Range | None

    @property
    def whole(self) -> bool:
        """Whether all of it is on the card."""
        return self.layers == self.of

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "layers": self.layers,
            "of": self.of,
            "experts_off": self.experts_off,
            "card_bytes": self.card_bytes,
            "ram_bytes": self.ram_bytes,
            "tokens_per_second": list(self.decode),
            "seconds_to_first_token": None if self.prefill is None else list(self.prefill),
            "evidence": "modelled",
        }


@dataclass(frozen=True)
class Cliff:
    """Every way to part a model between a card and main memory.

    Attributes:
        splits: by blocks on the card, from none to all.
        most: the split with most blocks on the card that has room; None where none has.
        experts: the same where only experts leave the card; None without experts, or without need.
    """

    splits: tuple[Split, ...]
    most: Split | None
    experts: Split | None

    @property
    def best(self) -> Split | None:
        """The faster of what has room."""
        there = [split for split in (self.most, self.experts) if split is not None]
        return max(there, key=lambda split: sum(split.decode)) if there else None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        best = self.best
        return {
            "best": None if best is None else best.to_json(),
            "layers_that_fit": None if self.most is None else self.most.layers,
            "splits": [split.to_json() for split in self.splits],
        }


@dataclass(frozen=True)
class _Parts:
    """A model cut into what each block takes: bytes that lie there, and bytes that a token reads."""

    held: tuple[int, ...]
    read: tuple[float, ...]
    experts: tuple[int, ...]
    experts_read: tuple[float, ...]
    caches: tuple[int, ...]
    head: int
    rest: int
    buffers: int

    @property
    def count(self) -> int:
        return len(self.held)


def cliff(model: Model, wanted: Wanted, machine: Machine) -> Cliff:
    """What each number of layers on the card would give, and which has room.

    Without a card, and where all memory is one, there is a single split: everything in the one place.
    """
    parts = _parts(model, wanted)
    if machine.unified or not machine.vram_bytes:
        room = machine.cards[0].bytes_ if machine.unified else machine.ram_bytes
        split = _split(model, wanted, machine, parts, parts.count if machine.unified else 0)
        fits = split.card_bytes + split.ram_bytes <= room
        return Cliff((split,), split if fits else None, None)
    counts = range(parts.count + 1) if model.runtime.spills else (parts.count,)
    splits = tuple(_split(model, wanted, machine, parts, n) for n in counts)
    there = [split for split in splits if _room(split, machine)]
    most = max(there, key=lambda split: split.layers, default=None)
    experts = None
    if sum(parts.experts) and model.runtime.spills == "computes" and not (most and most.whole):
        apart = [_split(model, wanted, machine, parts, n, experts_off=True) for n in counts]
        experts = max((s for s in apart if _room(s, machine)), key=lambda s: s.layers, default=None)
    return Cliff(splits, most, experts)


def _room(split: Split, machine: Machine) -> bool:
    return split.card_bytes <= machine.vram_bytes and (split.whole or split.ram_bytes <= machine.ram_bytes)


def _parts(model: Model, wanted: Wanted) -> _Parts:
    shape, weights, runtime = model.shape, model.weights, model.runtime
    count = len(shape.blocks)
    outside = weights.bytes_ - sum(weights.blocks)
    held = weights.blocks if len(weights.blocks) == count else (sum(weights.blocks) // count,) * count
    experts = weights.routed if len(weights.routed) == count else (sum(weights.routed) // count,) * count
    if not weights.blocks:  # nothing says which tensor is where
        outside, held, experts = 0, (weights.bytes_ // count,) * count, (0,) * count
    share = _seen(shape.used, shape.experts, wanted.parallel)
    asked = (wanted.context, wanted.parallel, wanted.types, wanted.full_windows)
    caches = tuple(
        runtime.cache_bytes(b, *asked, (i, count)) + runtime.state_bytes(b, wanted.parallel)
        for i, b in enumerate(shape.blocks)
    )
    head = weights.head_bytes or outside // 2
    return _Parts(
        held=held,
        read=tuple(whole - routed * (1 - share) for whole, routed in zip(held, experts, strict=True)),
        experts=experts,
        experts_read=tuple(routed * share for routed in experts),
        caches=caches,
        head=head,
        rest=outside - head,
        buffers=step_bytes(shape, runtime, wanted) + 4 * shape.vocabulary * wanted.parallel,
    )


def _seen(used: int, experts: int, parallel: int) -> float:
    """The share of a block's experts that a step reads: with many sequences, nearly all."""
    return 1.0 if not used or not experts else 1 - (1 - min(used / experts, 1.0)) ** parallel


def _split(
    model: Model, wanted: Wanted, machine: Machine, parts: _Parts, layers: int, experts_off: bool = False
) -> Split:
    """The last ``layers`` blocks on the card, with the head; or all but the experts of the other blocks."""
    first = parts.count - layers
    uses_card = machine.unified or layers > 0 or experts_off
    stays = uses_card and model.runtime.exact and not machine.unified  # the embedding: rows are looked up
    on, off = range(first, parts.count), range(first)
    runtime = model.runtime
    card: float = sum(parts.held[i] + parts.caches[i] for i in on)
    card_read: float = sum(parts.read[i] + parts.caches[i] for i in on)
    if experts_off:
        card += sum(parts.held[i] - parts.experts[i] + parts.caches[i] for i in off)
        card_read += sum(parts.read[i] - parts.experts_read[i] + parts.caches[i] for i in off)
        ram, ram_read = sum(parts.experts[i] for i in off), sum(parts.experts_read[i] for i in off)
    else:
        ram = sum(parts.held[i] + parts.caches[i] for i in off)
        ram_read = sum(parts.read[i] + parts.caches[i] for i in off)
    ram += 0 if machine.unified else runtime.ram_bytes
    if uses_card:
        card += parts.head + parts.buffers + runtime.vram_bytes + (0 if stays else parts.rest)
        card_read, ram = card_read + parts.head, ram + (parts.rest if stays else 0)
    else:
        ram, ram_read = ram + parts.head + parts.buffers + parts.rest, ram_read + parts.head
    seconds = [_seconds(model, machine, card_read, ram_read, len(off), parts.count, end) for end in (0, 1)]
    held_off = sum(parts.held[i] for i in off) if not experts_off else sum(parts.experts[i] for i in off)
    return Split(
        layers=layers,
        of=parts.count,
        experts_off=experts_off,
        card_bytes=round(card),
        ram_bytes=ram,
        decode=(1 / seconds[0], 1 / seconds[1]),
        prefill=_prefill(model, wanted, machine, held_off, len(off) / parts.count),
    )


def _seconds(
    model: Model, machine: Machine, card_read: float, ram_read: float, off: int, blocks: int, end: int
) -> float:
    """Time of one token; ``end`` is 0 for the slow end of every share, 1 for the quick one."""
    seconds = blocks * BLOCK_SECONDS[end]
    if machine.cards and card_read:
        bandwidth = machine.cards[0].bandwidth or 8 * USUAL_RAM
        seconds += card_read / (bandwidth * CARD_SHARE[end])
    elif card_read:
        ram_read += card_read
    if ram_read:
        seconds += ram_read / ram_speed(
            machine, end, streamed=bool(machine.cards) and _streams(model) and off > 0
        )
    return seconds


def _streams(model: Model) -> bool:
    return model.runtime.spills == "streams"


def ram_speed(machine: Machine, end: int, streamed: bool = False) -> float:
    """Bytes of weights a second that come from main memory: through the cores, or over the bus."""
    memory = machine.ram_bandwidth or USUAL_RAM
    memory *= (MEASURED_SHARE if machine.measured else RAM_SHARE)[end]
    if streamed:
        return min(memory, machine.cards[0].bus * BUS_SHARE[end])
    return min(memory, (machine.cores or USUAL_CORES) * CORE_BYTES[end])


def _prefill(model: Model, wanted: Wanted, machine: Machine, off_bytes: int, off: float) -> Range | None:
    """Seconds for prompts of the whole context: products, attention, what crosses the bus."""
    shape = model.shape
    tokens = wanted.context * wanted.parallel
    window = [min(block.window or wanted.context, wanted.context) for block in shape.blocks]
    attention = sum(2 * shape.queries * 2 * reach / 2 for reach in window)
    flops = tokens * (2 * shape.numbers + attention)
    found = []
    for end in (0, 1):
        if not machine.cards:
            found.append(flops / ((machine.cores or USUAL_CORES) * CORE_FLOPS[end]))
            continue
        card = machine.cards[0]
        if not card.flops:
            return None
        pieces = -(-tokens // max(PIECE, model.runtime.step))
        crossing = pieces * off_bytes / (card.bus * BUS_SHARE[end]) if off and card.bus else 0.0
        found.append(flops / (card.flops * CARD_FLOPS_SHARE[end]) + crossing)
    return found[0], found[1]


def shown(span: Sequence[float], unit: str = "") -> str:
    """``31 to 58``, with as many digits as a model deserves."""
    low, high = sorted(span)
    said = [f"{v:,.0f}" if v >= 10 else f"{v:.1f}" if v >= 1 else f"{v:.2f}" for v in (low, high)]
    return f"{said[0]} to {said[1]}{unit}" if said[0] != said[1] else f"{said[0]}{unit}"
