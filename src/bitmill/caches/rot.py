"""Any of the plain methods behind a Hadamard matrix a head, which spreads what stands out over all channels
(llama.cpp PR #21038, ik_llama.cpp's ``-khad``; Ashkboos et al., QuaRot, arXiv 2404.00456)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from bitmill.core.caches import CacheCode, CacheMethod, Layout
from bitmill.core.registry import find_cache_method
from bitmill.numerics.cache_bases import hadamard_basis

_SUFFIX = "-rot"
_PLAIN = ("int", "fp8", "q4", "q5", "q8", "iq4", "kivi")
_SHOWN = ("q8_0", "q5_0", "q4_0", "int4", "int2", "fp8", "kivi-2")


@final
@dataclass(frozen=True)
class RotatedCache(CacheMethod):
    """Keys and values in the basis of a Hadamard matrix of the head's size or, where there is none, of the
    largest size that divides it.

    Attributes:
        inner: what stores them.
    """

    inner: CacheMethod = field(default_factory=lambda: _inner("q8_0"))

    @classmethod
    def parse(cls, text: str) -> RotatedCache | None:
        """``q4_0-rot``: the text of a plain method, and ``-rot``."""
        plain = text.removesuffix(_SUFFIX)
        if plain == text or plain.endswith(_SUFFIX) or not plain.startswith(_PLAIN):
            return None
        inner = find_cache_method(plain)
        return None if inner is None else cls(inner)

    @classmethod
    def examples(cls) -> tuple[RotatedCache, ...]:
        return tuple(cls(_inner(name)) for name in _SHOWN)

    def __str__(self) -> str:
        return f"{self.inner}{_SUFFIX}"

    @property
    def window(self) -> int:
        return self.inner.window

    def refuses(self, head: int) -> str | None:
        return self.inner.refuses(head)

    def layout(self, part: str, head: int) -> Layout:
        return self.inner.layout(part, head)

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        inner = self.inner.code(part, head, learned)
        basis = hadamard_basis(head)

        def pack(x: Tensor) -> dict[str, Tensor]:
            return inner.pack(x @ basis.to(x.device, torch.float32).mT)

        return CacheCode(pack, inner.unpack, basis, inner.direct)


def _inner(text: str) -> CacheMethod:
    method = find_cache_method(text)
    if method is None:
        raise ValueError(f"{text} stores no keys or values")
    return method
