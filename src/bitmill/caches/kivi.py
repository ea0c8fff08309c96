"""KIVI (Liu et al., arXiv 2402.02750): keys by channel, values by token, the latest tokens as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bitmill.core.caches import KEYS, CacheCode, CacheMethod, Layout
from bitmill.numerics.cache_integers import channel_code, channel_layout, token_code, token_layout

_TEXT = re.compile(r"kivi-([2-8])")
_GROUP = 32


@final
@dataclass(frozen=True)
class KiviCache(CacheMethod):
    """A step and a smallest value for 32 tokens of a channel of the keys, whose channels differ much, and for
    32 channels of a token of the values. At least the latest 128 tokens stay in 16 bits; the authors' code
    lets between 0 and 127 keys do so, which is worse just behind a border.

    Attributes:
        bits: 2 to 8; the paper has 2 and 4.
    """

    bits: int = 2

    @classmethod
    def parse(cls, text: str) -> KiviCache | None:
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1]))

    @classmethod
    def examples(cls) -> tuple[KiviCache, ...]:
        return (cls(4), cls(2))

    def __str__(self) -> str:
        return f"kivi-{self.bits}"

    @property
    def window(self) -> int:
        return 128

    def refuses(self, head: int) -> str | None:
        if head % _GROUP:
            return f"a head of {head} numbers is not made of groups of {_GROUP}, as its values need"
        return None

    def layout(self, part: str, head: int) -> Layout:
        made = channel_layout if part == KEYS else token_layout
        return made(head, self.bits, _GROUP)

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        made = channel_code if part == KEYS else token_code
        return made(head, self.bits, _GROUP)
