"""What keys and values are stored as between tokens, by the names that runtimes use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bitmill.core.errors import Refused

_GROUPED = re.compile(r"int(?P<bits>[2-8])(?:-g(?P<group>\d{1,4}))?")
_GROUP = 64


@dataclass(frozen=True)
class CacheType:
    """``bytes_`` hold ``block`` numbers.

    Attributes:
        name: as a runtime calls it.
        block: numbers that share a scale; a head's width must be a multiple of it.
        bytes_: what they take, scales and all.
    """

    name: str
    block: int
    bytes_: int

    def size(self, numbers: int) -> int:
        """Bytes of that many numbers, whole blocks."""
        return -(-numbers // self.block) * self.bytes_

    @property
    def bits(self) -> float:
        """Bits a number."""
        return 8 * self.bytes_ / self.block


GGML = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""What llama.cpp's ``-ctk`` and ``-ctv`` take."""

_TYPES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "f32": (1, 4),
        "f16": (1, 2),
        "bf16": (1, 2),
        "q8_0": (32, 34),
        "q5_1": (32, 24),
        "q5_0": (32, 22),
        "q4_1": (32, 20),
        "q4_0": (32, 18),
        "iq4_nl": (32, 18),
        "fp8": (1, 1),  # one scale a tensor, or a head: nothing that grows with the context
        "nvfp4": (16, 9),
    }
)
_OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "auto": "f16",
        "float16": "f16",
        "bfloat16": "bf16",
        "float32": "f32",
        "fp8_e4m3": "fp8",
        "fp8_e5m2": "fp8",
        "q8": "q8_0",
        "q4": "q4_0",
    }
)


def cache_type(name: str) -> CacheType:
    """The type of that name; ``int4`` and ``int2-g32`` are whole numbers with two 16-bit numbers a group.

    Raises:
        Refused: there is none.
    """
    word = name.strip().lower()
    word = _OTHER_NAMES.get(word, word)
    if word in _TYPES:
        return CacheType(word, *_TYPES[word])
    found = _GROUPED.fullmatch(word)
    group = int(found["group"] or _GROUP) if found is not None else 0
    if found is None or not group or group * int(found["bits"]) % 8:
        raise Refused(
            f"no runtime stores keys and values as {name!r}",
            fix=f"one of: {', '.join(_TYPES)}, or int2 to int8 with a group: int4-g64",
        )
    return CacheType(word, group, group * int(found["bits"]) // 8 + 4)


def cache_types(text: str) -> tuple[CacheType, CacheType]:
    """The types of keys and of values: ``q8_0`` for both, or ``q8_0,q4_0``.

    Raises:
        Refused: one of them does not exist, or there are more than two.
    """
    words = text.split(",")
    if len(words) > 2:
        raise Refused(f"{text!r} names {len(words)} types", fix="one for both, or keys,values: q8_0,q4_0")
    return cache_type(words[0]), cache_type(words[-1])
