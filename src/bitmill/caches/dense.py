"""Keys and values as numbers, in 16 bits as everybody has them, or in 32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.caches import CacheCode, CacheMethod, Layout

_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@final
@dataclass(frozen=True)
class DenseCache(CacheMethod):
    """Rounded to the nearest number of that type; what is beyond its range takes its largest.

    Attributes:
        type: ``f16``, ``bf16`` or ``f32``.
    """

    type: str = "f16"

    @classmethod
    def parse(cls, text: str) -> DenseCache | None:
        return cls(text) if text in _TYPES else None

    @classmethod
    def examples(cls) -> tuple[DenseCache, ...]:
        return tuple(cls(name) for name in _TYPES)

    def __str__(self) -> str:
        return self.type

    @property
    def window(self) -> int:
        return 0

    def refuses(self, head: int) -> str | None:
        return None

    def layout(self, part: str, head: int) -> Layout:
        return Layout(1, {"numbers": (_TYPES[self.type], (head,))})

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        dtype = _TYPES[self.type]
        most = torch.finfo(dtype).max

        def pack(x: Tensor) -> dict[str, Tensor]:
            return {"numbers": x.clamp(-most, most).to(dtype)}

        return CacheCode(pack, lambda fields: fields["numbers"].to(torch.float32))
