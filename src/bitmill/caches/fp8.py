"""Eight-bit floats, as vLLM's and transformers' caches have them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor

from bitmill.core.caches import CacheCode, CacheMethod, Direct, Layout

_TEXT = re.compile(r"fp8(?:-(e4m3|e5m2))?(-token)?")
_TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@final
@dataclass(frozen=True)
class Fp8Cache(CacheMethod):
    """Rounded to the nearest 8-bit float, as it is (vLLM's rule where nobody has calibrated a scale), or with
    a scale for each head of a token that brings its largest number to the top of the range.

    Attributes:
        type: ``e4m3`` or ``e5m2``.
        scaled: whether there is such a scale, in half precision.
    """

    type: str = "e4m3"
    scaled: bool = False

    @classmethod
    def parse(cls, text: str) -> Fp8Cache | None:
        """``fp8``, ``fp8-e5m2``, ``fp8-token``."""
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(found[1] or "e4m3", found[2] is not None)

    @classmethod
    def examples(cls) -> tuple[Fp8Cache, ...]:
        return (cls(), cls("e5m2"), cls("e4m3", True))

    def __str__(self) -> str:
        kind = "" if self.type == "e4m3" else f"-{self.type}"
        return f"fp8{kind}{'-token' if self.scaled else ''}"

    @property
    def window(self) -> int:
        return 0

    def refuses(self, head: int) -> str | None:
        return None

    def layout(self, part: str, head: int) -> Layout:
        scale = {"scale": (torch.float16, (1,))} if self.scaled else {}
        return Layout(1, {"numbers": (torch.uint8, (head,)), **scale})

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        dtype = _TYPES[self.type]
        most = torch.finfo(dtype).max

        def bytes_of(x: Tensor) -> Tensor:
            return x.clamp(-most, most).to(dtype).view(torch.uint8)

        def pack(x: Tensor) -> dict[str, Tensor]:
            if not self.scaled:
                return {"numbers": bytes_of(x)}
            half = torch.finfo(torch.float16)
            scale = (x.abs().amax(-1, keepdim=True) / most).clamp(2.0**-24, half.max).to(torch.float16)
            return {"numbers": bytes_of(x / scale.to(x.dtype)), "scale": scale}

        def unpack(fields: Mapping[str, Tensor]) -> Tensor:
            values = fields["numbers"].contiguous().view(dtype).to(torch.float32)
            return values * fields["scale"].to(torch.float32) if self.scaled else values

        scale = "scale" if self.scaled else ""
        direct = Direct("numbers", scale, "", 8, _levels(self.type), head, 0, head)
        return CacheCode(pack, unpack, direct=(direct,))


@cache
def _levels(type_: str) -> Tensor:
    """What all bytes stand for; those of no number are never stored."""
    return torch.arange(256, dtype=torch.uint8).view(_TYPES[type_]).to(torch.float32).nan_to_num(0, 0, 0)
