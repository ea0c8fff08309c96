"""PolarQuant (Han, Kacham, Karbasi, Mirrokni and Zandieh, arXiv 2502.02617): a random rotation, then sixteen
numbers as one radius and fifteen angles on the levels that are best for the density that each then has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bitmill.core.caches import CacheCode, CacheMethod, Layout
from bitmill.numerics.cache_bases import random_basis
from bitmill.numerics.cache_polar import BLOCK, polar_direct, polar_fields, polar_pack, polar_unpack

_SEED = 0


@final
@dataclass(frozen=True)
class PolarQuantCache(CacheMethod):
    """Four bits for the angle of two numbers, two for each angle between radii, half precision for the last
    radius: 3.875 bits. What is generated is stored like the prompt; the paper leaves it in 16 bits."""

    @classmethod
    def parse(cls, text: str) -> PolarQuantCache | None:
        return cls() if text == "polarquant" else None

    @classmethod
    def examples(cls) -> tuple[PolarQuantCache, ...]:
        return (cls(),)

    def __str__(self) -> str:
        return "polarquant"

    @property
    def window(self) -> int:
        return 0

    def refuses(self, head: int) -> str | None:
        if head % BLOCK:
            return f"a head of {head} numbers is not made of blocks of {BLOCK}"
        return None

    def layout(self, part: str, head: int) -> Layout:
        return Layout(1, polar_fields(head))

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        basis = random_basis(head, _SEED)

        def pack(x: Tensor) -> dict[str, Tensor]:
            return polar_pack(x @ basis.to(x.device).mT)

        return CacheCode(pack, lambda fields: polar_unpack(fields, head), basis, (polar_direct(head),))
