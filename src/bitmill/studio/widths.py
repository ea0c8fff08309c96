"""How wide keys and values are in every kind of cache, for the heads of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitmill.advise.shape import Kept, Shape
from bitmill.core.caches import KEYS, VALUES, CacheMethod, stored_bytes
from bitmill.core.registry import cache_method, cache_spellings


@dataclass(frozen=True)
class Width:
    """One kind of cache.

    Attributes:
        name: as ``--kv`` takes it.
        keys, values: bits a number of what is packed.
        bytes_: of one sequence of so many tokens, the latest in 16 bits and all.
        why: where it cannot be: why; the numbers are 0 then.
    """

    name: str
    keys: float = 0.0
    values: float = 0.0
    bytes_: int = 0
    why: str = ""


def widths(shape: Shape, tokens: int) -> list[Width]:
    """Every kind of cache, the widest first, then those that the model's heads do not go into.

    Blocks that keep no heads of keys and values (recurrent ones) count nothing here.
    """
    blocks = [block for block in shape.blocks if block.head and block.value_head]
    if not blocks:
        return []
    found = [_width(cache_method(name), blocks, tokens) for name in dict.fromkeys(cache_spellings())]
    return sorted(found, key=lambda width: (bool(width.why), -width.bytes_))


def _width(method: CacheMethod, blocks: Sequence[Kept], tokens: int) -> Width:
    whys = [method.refuses(size) for block in blocks for size in (block.head, block.value_head)]
    why = next((why for why in whys if why), None)
    if why is not None:
        return Width(str(method), why=why)
    first = blocks[0]
    bytes_ = sum(
        stored_bytes(method, part, numbers // head, head, tokens, sliding=block.window)
        for block in blocks
        for part, numbers, head in (
            (KEYS, block.keys, block.head),
            (VALUES, block.values, block.value_head),
        )
    )
    return Width(
        str(method), _bits(method, KEYS, first.head), _bits(method, VALUES, first.value_head), bytes_
    )


def _bits(method: CacheMethod, part: str, head: int) -> float:
    layout = method.layout(part, head)
    return 8 * layout.bytes_ / (layout.run * head)
