"""QJL (Zandieh, Daliri and Han, arXiv 2406.03482): of a key only the signs of random projections and its
length; its product with a query, which stays as it is, is unbiased. Values as KIVI has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bitmill.core.caches import KEYS, CacheCode, CacheMethod, Layout
from bitmill.numerics.cache_channels import learned_order, pieces_code, pieces_layout
from bitmill.numerics.cache_integers import token_code, token_layout
from bitmill.numerics.cache_sphere import Signs

_TEXT = re.compile(r"qjl(?:-([1-8]))?")
_USUAL = 2
_APART, _VALUE_BITS, _GROUP = 16, 2, 32
_SEED = 0


@final
@dataclass(frozen=True)
class QjlCache(CacheMethod):
    """Keys: ``signs`` a channel, and half as many with a length of their own for the sixteenth of the
    channels that are largest among the first tokens. Values: two bits, groups of 32 channels. At least the
    latest 128 tokens stay in 16 bits. The authors' code gives twice the signs to the first 15 layers; here a
    whole cache has one number.

    Attributes:
        signs: 1 to 8; the authors' code has 2.
    """

    signs: int = _USUAL

    @classmethod
    def parse(cls, text: str) -> QjlCache | None:
        """``qjl``, ``qjl-4``."""
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1] or _USUAL))

    @classmethod
    def examples(cls) -> tuple[QjlCache, ...]:
        return (cls(), cls(4))

    def __str__(self) -> str:
        return "qjl" if self.signs == _USUAL else f"qjl-{self.signs}"

    @property
    def window(self) -> int:
        return 128

    def refuses(self, head: int) -> str | None:
        if head % _GROUP:
            return f"a head of {head} numbers is not made of groups of {_GROUP}, as its values need"
        return None

    def layout(self, part: str, head: int) -> Layout:
        return pieces_layout(self._pieces(head)) if part == KEYS else token_layout(head, _VALUE_BITS, _GROUP)

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return learned_order(x) if part == KEYS else {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        if part == KEYS:
            return pieces_code(self._pieces(head), learned)
        return token_code(head, _VALUE_BITS, _GROUP)

    def _pieces(self, head: int) -> list[Signs]:
        apart = head // _APART
        whole = self.signs * head
        return [Signs(whole // 2, apart, _SEED), Signs(whole, head - apart, _SEED)]
