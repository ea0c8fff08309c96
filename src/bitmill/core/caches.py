"""How keys and values are stored between tokens: a method, and what it makes of heads of one size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

KEYS, VALUES = "k", "v"
"""The two parts of a cache."""

STEP = 256
"""Tokens by which a cache of ours grows."""

Fields = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Element type and shape of stored tensors by name."""


def fields_bytes(fields: Fields) -> int:
    """Bytes of one of each."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in fields.values())


@dataclass(frozen=True)
class Layout:
    """What is stored for one head.

    Attributes:
        run: tokens that are packed together; a divisor of :data:`STEP`.
        fields: what a run of tokens becomes.
        learned: what the first tokens fix once and for all, a head.
    """

    run: int
    fields: Fields
    learned: Fields = field(default_factory=dict)

    @property
    def bytes_(self) -> int:
        """Of a run of tokens."""
        return fields_bytes(self.fields)


@dataclass(frozen=True, eq=False)
class Direct:
    """Coordinates ``level[code] · step + low``, which compiled loops read as they are packed.

    Attributes:
        codes, step, low: names of fields; the codes are a little-endian stream of ``bits`` each, steps and
            smallest values are one a group. Without a name, steps are 1 and smallest values are 0.
        levels: ``2**bits`` float32.
        group: coordinates of a token that share a step; of 0, every coordinate has its own for a whole run
            of tokens.
        first, width: which coordinates these are.
        zero: name of a field of whole numbers that are taken off ``level[code]`` before; without, none are.
    """

    codes: str
    step: str
    low: str
    bits: int
    levels: Tensor
    group: int
    first: int
    width: int
    zero: str = ""


@dataclass(frozen=True, eq=False)
class DirectBlocks:
    """Blocks of 32 coordinates as llama.cpp has them: half-precision numbers in front, and codes of four
    bits, those of the second half above those of the first; or codes of eight.

    Attributes:
        blocks: name of the field.
        bytes_: of a block.
        low, fifth: where in it the smallest value is and where the fifth bits are; -1 for none.
        codes: where those are.
        levels: 16 or 32 float32, what codes are multiplied by the first number of; empty where these are
            int8.
        first, width: which coordinates these are.
    """

    blocks: str
    bytes_: int
    low: int
    fifth: int
    codes: int
    levels: Tensor
    first: int
    width: int


@dataclass(frozen=True, eq=False)
class DirectAngles:
    """Sixteen coordinates as a radius and fifteen angles.

    Attributes:
        angles: names of the fields of angles: of two coordinates (four bits), and then of two radii, three
            times (two bits).
        radius: name of the last radius.
        levels: the angles of each of those fields' codes.
        first, width: which coordinates these are.
    """

    angles: tuple[str, ...]
    radius: str
    levels: tuple[Tensor, ...]
    first: int
    width: int


Packed = Direct | DirectBlocks | DirectAngles
"""What compiled loops know how to read."""


@dataclass(frozen=True, eq=False)
class CacheCode:
    """Packs heads of one size. Stored are coordinates in a ``basis``: the product of a query with a stored
    key is that of the query in this basis with the coordinates, so that attention turns its queries once and
    no key, and turns back its result and no value.

    Attributes:
        pack: ``… tokens head`` float32, whole runs, to the layout's fields, each ``… runs *shape``.
        unpack: the fields to coordinates, ``… tokens width`` float32.
        basis: ``width head``, or ``heads width head`` float32; None where coordinates are the numbers
            themselves.
        direct: how compiled loops read all coordinates, where they can.
    """

    pack: Callable[[Tensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor]], Tensor]
    basis: Tensor | None = None
    direct: tuple[Packed, ...] = ()

    def turned(self, x: Tensor) -> Tensor:
        """Queries ``batch heads n head`` as products with coordinates need them: ``… width``."""
        return x if self.basis is None else x @ self.basis.to(x.device, x.dtype).mT

    def back(self, coordinates: Tensor) -> Tensor:
        """The numbers that coordinates stand for, ``… head``; linear, so weighted sums may come first."""
        if self.basis is None:
            return coordinates
        return coordinates @ self.basis.to(coordinates.device, coordinates.dtype)


class CacheMethod(ABC):
    """A way to store keys or values; members are frozen dataclasses.

    ``str(method)`` is its canonical text, and ``type(method).parse(str(method)) == method``.
    """

    @property
    @abstractmethod
    def window(self) -> int:
        """The latest tokens that stay in 16 bits unless somebody asks for another number."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> CacheMethod | None:
        """The method this lower-case text names, or None when it is not one of this file's names."""

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[CacheMethod, ...]:
        """Members that tests, docs and messages show."""

    @abstractmethod
    def __str__(self) -> str:
        """Canonical text."""

    @abstractmethod
    def refuses(self, head: int) -> str | None:
        """Why heads of this size cannot be stored, or None."""

    @abstractmethod
    def layout(self, part: str, head: int) -> Layout:
        """What one head's keys (``k``) or values (``v``) become."""

    @abstractmethod
    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        """What packs them.

        Args:
            learned: the fields that the layout calls learned, each ``heads *shape``; what :meth:`learn` gave.

        Raises:
            ValueError: they are not what :meth:`learn` could have given.
        """

    @abstractmethod
    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        """What the first tokens (``batch heads tokens head``) fix for all that follow; most fix nothing."""


def stored_bytes(
    method: CacheMethod,
    part: str,
    heads: int,
    head: int,
    tokens: int,
    window: int | None = None,
    sliding: int | None = None,
    sequences: int = 1,
) -> int:
    """Bytes that keys or values take in one layer after ``tokens`` of each sequence, to the byte.

    Args:
        window: the latest tokens that stay in 16 bits; None is the method's own number.
        sliding: tokens that the layer's attention looks back over, itself included; None for all.
    """
    layout = method.layout(part, head)
    window = method.window if window is None else window
    kept = tokens - forgotten(tokens, sliding, layout.run, window)
    packed = packed_of(kept, layout.run, window)
    room = -(-packed // STEP) * STEP // layout.run
    learned = fields_bytes(layout.learned) if tokens else 0
    return heads * (sequences * (room * layout.bytes_ + 2 * head * (kept - packed)) + learned)


def packed_of(tokens: int, run: int, window: int) -> int:
    """How many of these tokens are packed: whole runs, and at least ``window`` tokens are not."""
    return max(tokens - window, 0) // run * run


def forgotten(tokens: int, sliding: int | None, run: int, window: int) -> int:
    """How many of the first of ``tokens`` are let go because nobody will look back at them: whole steps, all
    of them packed by then."""
    if sliding is None:
        return 0
    return max(tokens - max(sliding - 1, window + run - 1), 0) // STEP * STEP
