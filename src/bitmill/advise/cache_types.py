"""What keys and values are stored as between tokens, by the names that runtimes use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from bitmill.core.cache_choice import OTHER_NAMES, CacheChoice, cache_choice
from bitmill.core.caches import KEYS, CacheMethod
from bitmill.core.errors import Refused
from bitmill.core.registry import find_cache_method

_USUAL_HEAD, _LARGEST = 128, 1024


@dataclass(frozen=True)
class CacheType:
    """``bytes_`` hold ``block`` numbers.

    Attributes:
        name: as a runtime calls it.
        block: numbers that share a scale; where sizes depend on the head, those of a usual head.
        bytes_: what they take, scales and all.
        choice: the whole cache that it is a part of, where ``bitmill run`` has it.
    """

    name: str
    block: int
    bytes_: int
    choice: CacheChoice | None = None

    def size(self, numbers: int) -> int:
        """Bytes of that many numbers, whole blocks."""
        return -(-numbers // self.block) * self.bytes_

    @property
    def bits(self) -> float:
        """Bits a number."""
        return 8 * self.bytes_ / self.block

    def refuses(self, head: int) -> str | None:
        """Why heads of this size cannot be stored, or None."""
        if not head:
            return None
        if self.choice is not None:
            return self.choice.keys.refuses(head)
        return (
            f"a head of {head} numbers is not made of blocks of {self.block}" if head % self.block else None
        )


GGML = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""What llama.cpp's ``-ctk`` and ``-ctv`` take."""

_OTHERS: Mapping[str, tuple[int, int]] = MappingProxyType({"nvfp4": (16, 9)})
"""What only other programs have: numbers of a block, and bytes."""


def cache_type(name: str) -> CacheType:
    """The type of that name, for both parts of a cache.

    Raises:
        Refused: there is none.
    """
    word = name.strip().lower()
    word = OTHER_NAMES.get(word, word)
    if word in _OTHERS:
        return CacheType(word, *_OTHERS[word])
    if find_cache_method(word) is None:
        others = f"; and {', '.join(_OTHERS)} elsewhere"
        try:
            cache_choice(word or "-")
        except Refused as error:
            raise Refused(
                f"no runtime stores keys and values as {name!r}", fix=f"{error.fix}{others}"
            ) from None
    return _type(cache_choice(word), word)


def cache_types(text: str) -> tuple[CacheType, CacheType]:
    """The types of keys and of values: ``q8_0`` for both, ``q8_0,q4_0``, or all that
    :func:`~bitmill.core.cache_choice.cache_choice` takes.

    Raises:
        Refused: one of them does not exist, or there are more than two.
    """
    if "=" in text:
        choice = cache_choice(text)
        values = replace(choice, keys=choice.values)
        return _type(choice, str(choice.keys)), _type(values, str(choice.values))
    words = text.split(",")
    if len(words) > 2:
        raise Refused(f"{text!r} names {len(words)} types", fix="one for both, or keys,values: q8_0,q4_0")
    return cache_type(words[0]), cache_type(words[-1])


def joined(types: tuple[CacheType, CacheType]) -> CacheChoice | None:
    """The whole cache of these keys and values, where ``bitmill run`` has it."""
    keys, values = (kind.choice for kind in types)
    return None if keys is None or values is None else replace(keys, values=values.keys)


def _type(choice: CacheChoice, name: str) -> CacheType:
    method = choice.keys
    block = _block(method)
    layout = method.layout(KEYS, block)
    return CacheType(name, block, layout.bytes_ // layout.run, choice)


def _block(method: CacheMethod) -> int:
    """The smallest head, where larger ones take as much more; else a usual one."""
    head = next((n for n in range(1, _LARGEST) if method.refuses(n) is None), _USUAL_HEAD)
    one, two, four = (method.layout(KEYS, head * times) for times in (1, 2, 4))
    even = two.bytes_ == 2 * one.bytes_ and four.bytes_ == 4 * one.bytes_
    return head if even and one.run == 1 else _USUAL_HEAD
