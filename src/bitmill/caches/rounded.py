"""The very numbers that a recipe's ``cache=`` rounds to, held: whole numbers with a scale for each head of a
token, or for runs of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bitmill.core.caches import CacheCode, CacheMethod, Direct, Layout
from bitmill.core.inputs import InputGrid, find_inputs, is_cache
from bitmill.numerics.bits import pack, packed_words, unpack
from bitmill.numerics.inputs import scale_and_zero

_SHOWN = ("int4-token-asym", "int8-token", "int4-g32-token-asym-clip0.95")


@final
@dataclass(frozen=True)
class RoundedCache(CacheMethod):
    """Codes, scales in single precision and, with ``asym``, zero points: nothing is rounded a second time, so
    that what a simulated cache gave is what this one gives.

    Attributes:
        grid: of keys and values, as input grids are spelled.
    """

    grid: InputGrid = field(default_factory=lambda: _grid(_SHOWN[0]))

    @classmethod
    def parse(cls, text: str) -> RoundedCache | None:
        """``int4-token-asym``, ``int8-g64-token``, ``int4-token-clip0.95``; a word without ``token`` is
        another way's."""
        grid = find_inputs(text) if "token" in text.split("-") else None
        return cls(grid) if grid is not None and is_cache(grid) and not grid.static else None

    @classmethod
    def examples(cls) -> tuple[RoundedCache, ...]:
        return tuple(cls(_grid(text)) for text in _SHOWN)

    def __str__(self) -> str:
        return str(self.grid)

    @property
    def window(self) -> int:
        return 0

    def refuses(self, head: int) -> str | None:
        if self.grid.group and head % self.grid.group:
            return f"a head of {head} numbers is not made of groups of {self.grid.group}"
        return None

    def layout(self, part: str, head: int) -> Layout:
        groups = head // (self.grid.group or head)
        zero = {} if self.grid.symmetric else {"zero": (torch.int8, (groups,))}
        codes = (torch.uint8, (packed_words(head, self.grid.bits, 8),))
        return Layout(1, {"codes": codes, "scale": (torch.float32, (groups,)), **zero})

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        group, bits, grid = self.grid.group or head, self.grid.bits, self.grid
        half = 2 ** (bits - 1)

        def packed(x: Tensor) -> dict[str, Tensor]:
            wide = x.to(torch.float32).unflatten(-1, (-1, group))
            scale, zero = scale_and_zero(grid, wide, {})
            values = wide / scale if zero is None else wide / scale + zero
            codes = values.clamp(-half, half - 1).round() + half
            found = {"codes": pack(codes.to(torch.uint8).flatten(-2), bits, 8), "scale": scale.squeeze(-1)}
            return found if zero is None else {**found, "zero": zero.squeeze(-1).to(torch.int8)}

        def unpacked(fields: Mapping[str, Tensor]) -> Tensor:
            codes = unpack(fields["codes"], bits, head).unflatten(-1, (-1, group)).to(torch.float32) - half
            if not grid.symmetric:
                codes = codes - fields["zero"].unsqueeze(-1).to(torch.float32)
            return (codes * fields["scale"].unsqueeze(-1)).flatten(-2)

        levels = torch.arange(2**bits, dtype=torch.float32) - half
        zero = "" if grid.symmetric else "zero"
        return CacheCode(
            packed, unpacked, direct=(Direct("codes", "scale", "", bits, levels, group, 0, head, zero),)
        )


def _grid(text: str) -> InputGrid:
    grid = find_inputs(text)
    if grid is None:
        raise ValueError(f"{text} rounds no keys or values")
    return grid
