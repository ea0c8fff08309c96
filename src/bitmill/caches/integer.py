"""Whole numbers with a step and a smallest value a group: of channels of one token, or of tokens of one
channel (Liu et al., KIVI, arXiv 2402.02750, measures both)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bitmill.core.caches import STEP, CacheCode, CacheMethod, Layout
from bitmill.numerics.cache_integers import channel_code, channel_layout, token_code, token_layout

_TEXT = re.compile(r"int([2-8])(-channel)?(?:-g([1-9]\d{0,2}))?")
_CHANNELS, _TOKENS = 64, 32


@final
@dataclass(frozen=True)
class IntegerCache(CacheMethod):
    """Values ``low + step · code``, both numbers in half precision.

    Attributes:
        bits: 2 to 8.
        group: channels of a token that share them or, where ``channel``, tokens.
        channel: whether it is tokens of one channel that share them; the last ones wait in 16 bits until
            they are ``group`` tokens.
    """

    bits: int = 4
    group: int = _CHANNELS
    channel: bool = False

    @classmethod
    def parse(cls, text: str) -> IntegerCache | None:
        """``int4``, ``int4-g32``, ``int2-channel``, ``int2-channel-g64``."""
        found = _TEXT.fullmatch(text)
        if found is None:
            return None
        channel = found[2] is not None
        group = int(found[3] or (_TOKENS if channel else _CHANNELS))
        if (channel and STEP % group) or group * int(found[1]) % 8:
            return None
        return cls(int(found[1]), group, channel)

    @classmethod
    def examples(cls) -> tuple[IntegerCache, ...]:
        return (
            *(cls(bits) for bits in (8, 4, 2)),
            cls(4, 32),
            *(cls(bits, _TOKENS, True) for bits in (8, 4, 2)),
        )

    def __str__(self) -> str:
        usual = _TOKENS if self.channel else _CHANNELS
        group = "" if self.group == usual else f"-g{self.group}"
        return f"int{self.bits}{'-channel' if self.channel else ''}{group}"

    @property
    def window(self) -> int:
        return 0

    def refuses(self, head: int) -> str | None:
        if self.channel or head % self.group == 0:
            return None
        fits = next(g for g in range(min(self.group, head), 0, -1) if head % g == 0)
        return (
            f"a head of {head} numbers is not made of groups of {self.group}: int{self.bits}-g{fits} would go"
        )

    def layout(self, part: str, head: int) -> Layout:
        made = channel_layout if self.channel else token_layout
        return made(head, self.bits, self.group)

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        made = channel_code if self.channel else token_code
        return made(head, self.bits, self.group)
