"""What running a model takes: weights, keys and values, one step's buffers, the program; and what would fit.

For llama.cpp, weights and caches are its own allocations to the byte, and the buffers of a step are a model.
For other runtimes the weights are the stored bytes, and all else is a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitmill.advise.cache_types import CacheType
from bitmill.advise.machine import Machine
from bitmill.advise.runtimes import Runtime
from bitmill.advise.shape import Shape
from bitmill.advise.weights import Weights

STEP = 256
"""Contexts that are proposed are multiples of this."""


@dataclass(frozen=True)
class Model:
    """A model as it would be run: its shape, its weights, the program."""

    shape: Shape
    weights: Weights
    runtime: Runtime


@dataclass(frozen=True)
class Wanted:
    """How a model is to be run.

    Attributes:
        context: tokens of each sequence.
        parallel: sequences at a time.
        types: what keys and values are stored as.
        full_windows: keep the whole context in blocks with a window, too (llama.cpp's ``--swa-full``).
    """

    context: int
    parallel: int
    types: tuple[CacheType, CacheType]
    full_windows: bool = False


@dataclass(frozen=True)
class Part:
    """One line of the table: ``evidence`` is ``exact``, ``stored`` (as in the files) or ``modelled``."""

    name: str
    bytes_: int
    evidence: str


@dataclass(frozen=True)
class Memory:
    """Everything that running a model takes in one place: ``vram``, ``ram`` or ``unified`` memory."""

    place: str
    parts: tuple[Part, ...]

    @property
    def bytes_(self) -> int:
        """All of it."""
        return sum(part.bytes_ for part in self.parts)


@dataclass(frozen=True)
class Fit:
    """A machine's answer for one place.

    Attributes:
        memory: what is needed there.
        there_bytes: what there is.
        context: the longest context that would fit with the same types of keys and values; 0 for none.
        others: the same with smaller types, by name, where that is more.
    """

    memory: Memory
    there_bytes: int
    context: int
    others: tuple[tuple[str, int], ...]

    @property
    def spare_bytes(self) -> int:
        """What would be left; negative when it does not fit."""
        return self.there_bytes - self.memory.bytes_

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.spare_bytes >= 0


def memory(model: Model, wanted: Wanted, place: str = "ram") -> Memory:
    """What running the model takes when all of it is in one place.

    Raises:
        Refused: the runtime, or the model's heads, do not go with these types of keys and values.
    """
    shape, runtime = model.shape, model.runtime
    runtime.check(wanted.types, shape.blocks)
    asked = (wanted.context, wanted.parallel, wanted.types, wanted.full_windows)
    many = len(shape.blocks)
    cache = sum(runtime.cache_bytes(b, *asked, (i, many)) for i, b in enumerate(shape.blocks))
    state = sum(runtime.state_bytes(block, wanted.parallel) for block in shape.blocks)
    card = place != "ram"
    weights = model.weights.bytes_ - (model.weights.stays_bytes if place == "vram" and runtime.exact else 0)
    sure = "exact" if runtime.exact else "modelled"
    parts = [
        Part("weights", weights, "exact" if runtime.exact else "stored"),
        Part("keys and values", cache, sure),
        Part("recurrent states", state, sure),
        Part("one step", step_bytes(shape, runtime, wanted), "modelled"),
        Part("logits", 4 * shape.vocabulary * wanted.parallel, sure),
        Part(f"{runtime.name} itself", runtime.vram_bytes if card else runtime.ram_bytes, "modelled"),
    ]
    return Memory(place, tuple(part for part in parts if part.bytes_ or part.name != "recurrent states"))


def step_bytes(shape: Shape, runtime: Runtime, wanted: Wanted) -> int:
    """Buffers of one step, from what is alive together at its widest points: the logits, an MLP, attention.

    A model of llama.cpp's graph with flash attention: at the end the logits of all tokens and two hidden
    states; in an MLP three times its width and four hidden states; in attention three times queries, keys and
    values; and the mask, a half-precision number a token of the step and cell.
    """
    whole = wanted.context * wanted.parallel
    tokens = min(runtime.step or whole, whole)
    rows = tokens if runtime.every_logit else wanted.parallel
    widest = max((block.keys + block.values for block in shape.blocks), default=0)
    mask = 2 * tokens * runtime.cells(wanted.context, None) if runtime.exact else 0
    inside = max(3 * shape.middle + 4 * shape.hidden, 3 * shape.queries + 3 * widest, 5 * shape.hidden)
    end = 4 * rows * shape.vocabulary + runtime.width * tokens * 2 * shape.hidden
    return max(mask + runtime.width * tokens * inside, end)


def most_context(model: Model, wanted: Wanted, place: str, there_bytes: int) -> int:
    """The longest context, of those the model is trained for, with which it fits into ``there_bytes``."""

    def fits(steps: int) -> bool:
        return memory(model, replace(wanted, context=steps * STEP), place).bytes_ <= there_bytes

    low, high = 0, max((model.shape.trained or wanted.context) // STEP, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * STEP


def fit(model: Model, wanted: Wanted, machine: Machine, smaller: Sequence[CacheType] = ()) -> tuple[Fit, ...]:
    """Whether the model fits, place by place, the fastest first, and what would.

    Args:
        smaller: other types of keys and values to try where the whole context does not fit.
    """
    found = []
    for place, there in machine.places:
        context = most_context(model, wanted, place, there)
        others = []
        for kind in smaller if context < (model.shape.trained or wanted.context) else ():
            more = most_context(model, replace(wanted, types=(kind, kind)), place, there)
            if more > context:
                others.append((kind.name, more))
        found.append(Fit(memory(model, wanted, place), there, context, tuple(others)))
    return tuple(found)


def to_json(wanted: Wanted, model: Model, fits: Sequence[Fit]) -> dict[str, Any]:
    """The answer as plain values."""
    first = next((f for f in fits if f.fits), None)
    return {
        "runtime": model.runtime.name,
        "context": wanted.context,
        "parallel": wanted.parallel,
        "keys": wanted.types[0].name,
        "values": wanted.types[1].name,
        "trained_context": model.shape.trained,
        "fits": None if first is None else first.memory.place,
        "places": [
            {
                "place": f.memory.place,
                "parts": [
                    {"name": p.name, "bytes": p.bytes_, "evidence": p.evidence} for p in f.memory.parts
                ],
                "bytes": f.memory.bytes_,
                "there_bytes": f.there_bytes,
                "spare_bytes": f.spare_bytes,
                "largest_context": f.context,
                "with_other_types": dict(f.others),
            }
            for f in fits
        ],
    }
