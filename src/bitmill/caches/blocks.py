"""llama.cpp's blocks of 32 numbers, as its ``-ctk`` and ``-ctv`` store them, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from bitmill.core.caches import CacheCode, CacheMethod, DirectBlocks, Layout
from bitmill.core.registry import parse_grid
from bitmill.numerics import blocks

_NAMES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_PLACES = {
    "q8_0": (-1, -1, 2, 0),
    "q5_1": (2, 4, 8, 32),
    "q5_0": (-1, 2, 6, 32),
    "q4_1": (2, -1, 4, 16),
    "q4_0": (-1, -1, 2, 16),
    "iq4_nl": (-1, -1, 2, 16),
}
"""Where in a block the smallest value, the fifth bits and the codes are; how many levels there are."""


@final
@dataclass(frozen=True)
class BlockCache(CacheMethod):
    """The bytes of the grid of the same name, rounded by llama.cpp's plain rule.

    Attributes:
        type: llama.cpp's name.
    """

    type: str = "q8_0"

    @classmethod
    def parse(cls, text: str) -> BlockCache | None:
        return cls(text) if text in _NAMES else None

    @classmethod
    def examples(cls) -> tuple[BlockCache, ...]:
        return tuple(cls(name) for name in _NAMES)

    def __str__(self) -> str:
        return self.type

    @property
    def window(self) -> int:
        return 0

    def refuses(self, head: int) -> str | None:
        length = blocks.TYPES[self.type].length
        if head % length:
            return f"a head of {head} numbers is not made of {self.type}'s blocks of {length}"
        return None

    def layout(self, part: str, head: int) -> Layout:
        return Layout(1, {"blocks": (torch.uint8, (blocks.TYPES[self.type].row_bytes(head),))})

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        grid = parse_grid(self.type)

        def pack(x: Tensor) -> dict[str, Tensor]:
            on_grid = grid.round(x.reshape(-1, head).contiguous())
            raw = torch.from_numpy(blocks.pack(self.type, on_grid.codes, on_grid.params))
            return {"blocks": raw.reshape(*x.shape[:-1], -1).to(x.device)}

        def unpack(fields: Mapping[str, Tensor]) -> Tensor:
            raw = fields["blocks"]
            codes, params = blocks.unpack(self.type, raw.reshape(-1, raw.shape[-1]).cpu().numpy())
            return grid.decode(codes, params).reshape(*raw.shape[:-1], head).to(raw.device)

        return CacheCode(pack, unpack, direct=(_direct(self.type, head),))


@lru_cache(maxsize=256)
def _direct(type_: str, head: int) -> DirectBlocks:
    low, fifth, codes, count = _PLACES[type_]
    grid, ones = parse_grid(type_), torch.ones(1, 1)
    every = torch.arange(32).remainder(max(count, 1)).to(torch.uint8).reshape(1, 32)
    levels = grid.decode(every, {"d": ones, "m": 0 * ones})[0, :count].to(torch.float32)
    return DirectBlocks("blocks", blocks.TYPES[type_].bytes_, low, fifth, codes, levels, 0, head)
