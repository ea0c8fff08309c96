"""llama.cpp's mixtures: more bits where its authors found that they count (``llama-quantize``'s type names).

The rules are the program's, as a pure function of a tensor's role and depth: there, counters advance as
tensors go by, and overriding one tensor moves the choice for later ones; here each tensor stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from bitmill.core.axes import Allocation, Choice, Weight

_DEFAULT: Mapping[str, str] = MappingProxyType(
    {
        "Q4_0": "q4_0",
        "Q4_1": "q4_1",
        "Q5_0": "q5_0",
        "Q5_1": "q5_1",
        "Q8_0": "q8_0",
        "Q4_K_M": "q4_k",
        "Q6_K": "q6_k",
    }
)
_BLOCK: Mapping[str, int] = MappingProxyType({"q4_k": 256, "q6_k": 256})
_SMALLER_BLOCK: Mapping[str, str] = MappingProxyType({"q4_k": "q5_0", "q6_k": "q8_0"})
_LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down", "linear"})
_EIGHT = 8
_SEVENTY_BILLION_LAYERS = 80


@final
@dataclass(frozen=True)
class Mixture(Allocation):
    """One of llama.cpp's file types.

    Where its rules ask for ``q5_k``, which no grid holds, ``q6_k`` is taken (in models of 80 layers or 8
    experts only) and the choice says so.

    Attributes:
        name: one of :meth:`names`, upper-case.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _DEFAULT:
            raise ValueError(f"mixture {self.name!r} is not one of {', '.join(_DEFAULT)}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every mixture."""
        return tuple(_DEFAULT)

    def choose(self, weight: Weight) -> Choice | None:
        """The type for a matrix of a block, the embedding or the head; None for norms, routers, others."""
        rule = self._rule(weight)
        if rule is None:
            return None
        wanted, why = rule
        grid = _that_fits("q6_k" if wanted == "q5_k" else wanted, weight.shape[-1])
        return Choice(grid, f"{self.name}: {why}", None if grid == wanted else wanted)

    def _rule(self, weight: Weight) -> tuple[str, str] | None:
        default = _DEFAULT[self.name]
        tied = weight.traits.get("tied", 0) == 1
        if weight.role == "head" or (weight.role == "embed" and tied):
            why = "the head" if weight.role == "head" else "the embedding is also the head"
            return (default if default == "q8_0" else "q6_k"), why
        if weight.role == "embed":
            return default, "default"
        if weight.role not in _LINEAR or weight.layer is None:
            return None
        return self._in_block(weight, weight.layer, default)

    def _in_block(self, weight: Weight, layer: int, default: str) -> tuple[str, str]:
        eight_experts = weight.traits.get("experts", 0) == _EIGHT
        early = layer < weight.layers // 8
        if weight.role in ("k", "v") and eight_experts:
            return "q8_0", f"{weight.role} of a mixture of 8 experts"
        if self.name == "Q4_K_M":
            if weight.role in ("v", "down") and _more_bits(layer, weight.layers):
                return "q6_k", f"{weight.role} in the first and last eighth and every third block"
            if weight.role == "v" and _seventy_billion(weight):
                return "q5_k", "v of a model with 80 blocks, shared between queries"
            if weight.role == "o" and eight_experts:
                return "q5_k", "o of a mixture of 8 experts"
        told = weight.traits.get("imatrix", 0) == 1
        if self.name in ("Q4_0", "Q5_0") and weight.role == "down" and early and told:
            return default.replace("_0", "_1"), "down in the first eighth, when the inputs are known"
        return default, "default"


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _seventy_billion(weight: Weight) -> bool:
    shared = weight.traits.get("heads", 1) != weight.traits.get("kv_heads", 1)
    return weight.layers == _SEVENTY_BILLION_LAYERS and shared


def _that_fits(grid: str, columns: int) -> str:
    """llama.cpp's answer to rows that are not whole blocks: a type with blocks of 32, or none at all."""
    if columns % _BLOCK.get(grid, 32) == 0:
        return grid
    smaller = _SMALLER_BLOCK.get(grid)
    return smaller if smaller is not None and columns % 32 == 0 else "f16"
