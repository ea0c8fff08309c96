"""llama.cpp's named mixtures (llama-quant.cpp) as a pure function of a tensor's role and depth.

llama.cpp walks the tensors and counts as it goes, so overriding one tensor shifts the choice for later ones; here each
choice depends on nothing but its own tensor. For models without such overrides the result is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from bitmill.core.axes import Allocation, Choice, Weight

_DEFAULT: Mapping[str, str] = {
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q8_0": "q8_0",
    "Q4_K_M": "q4_k",
    "Q6_K": "q6_k",
}
"""Type of most tensors; mixtures that need Q5_K or an I-quant come with those grids."""

_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_BLOCK = {"q4_k": 256, "q5_k": 256, "q6_k": 256}
_SMALL_BLOCK = 32
_ROLES = frozenset({"q", "k", "v", "o", "gate", "up", "down", "embed", "head", "linear"})
_EIGHT_EXPERTS = 8
_SEVENTY_BILLION_LAYERS = 80
_MATRIX = 2


@final
@dataclass(frozen=True)
class Mixture(Allocation):
    """A mixture by llama.cpp's name.

    Attributes:
        name: ``Q4_K_M``, ``Q4_0`` …
    """

    name: str = "Q4_K_M"

    def __post_init__(self) -> None:
        if self.name not in _DEFAULT:
            raise ValueError(f"mixture {self.name!r} is not one of {', '.join(_DEFAULT)}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every mixture, by llama.cpp's own spelling."""
        return tuple(_DEFAULT)

    def choose(self, weight: Weight) -> Choice | None:
        if weight.role not in _ROLES or len(weight.shape) != _MATRIX:
            return None
        wanted = self._wanted(weight)
        fitting = _fitting(wanted, weight.shape[1])
        return Choice(fitting, f"{self.name}: {weight.role}", wanted if fitting != wanted else None)

    def _wanted(self, weight: Weight) -> str:
        """The type before shapes have their say."""
        default = _DEFAULT[self.name]
        role, layer, layers = weight.role, weight.layer or 0, weight.layers
        experts = weight.traits.get("experts", 0)
        if role == "head" or (role == "embed" and weight.traits.get("tied", 0)):
            return _head(default, weight.shape[1])
        if role == "v":
            return self._value(default, layer, layers, weight.traits)
        if role == "k" and experts == _EIGHT_EXPERTS:
            return "q8_0"
        if role == "down":
            return self._down(default, layer, layers, bool(weight.traits.get("imatrix", 0)))
        if role == "o" and experts == _EIGHT_EXPERTS and default == "q4_k":
            return "q5_k"
        return default

    def _value(self, default: str, layer: int, layers: int, traits: Mapping[str, int]) -> str:
        chosen = default
        if self.name == "Q4_K_M" and more_bits(layer, layers):
            chosen = "q6_k"
        shared = traits.get("heads", 1) != traits.get("kv_heads", 1)
        if layers == _SEVENTY_BILLION_LAYERS and shared and chosen == "q4_k":
            chosen = "q5_k"
        return "q8_0" if traits.get("experts", 0) == _EIGHT_EXPERTS else chosen

    def _down(self, default: str, layer: int, layers: int, imatrix: bool) -> str:
        if self.name == "Q4_K_M" and more_bits(layer, layers):
            return "q6_k"
        if imatrix and layer < layers // 8 and self.name in ("Q4_0", "Q5_0"):
            return {"Q4_0": "q4_1", "Q5_0": "q5_1"}[self.name]
        return default


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's ``use_more_bits``: the first and last eighth, and every third layer between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _head(default: str, columns: int) -> str:
    """Output matrix, or the embedding that stands in for it."""
    if default == "q8_0" or columns % _BLOCK.get(default, _SMALL_BLOCK):
        return "q8_0"
    return "q6_k"


def _fitting(wanted: str, columns: int) -> str:
    """llama.cpp's fallback for rows that are no whole blocks: the nearest 32-block type, else half precision."""
    if columns % _BLOCK.get(wanted, _SMALL_BLOCK) == 0:
        return wanted
    fallback = _FALLBACK.get(wanted, "f16")
    return fallback if columns % _SMALL_BLOCK == 0 else "f16"
