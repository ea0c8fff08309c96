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
        "Q2_K_S": "q2_k",
        "Q2_K": "q2_k",
        "Q3_K_S": "q3_k",
        "Q3_K_M": "q3_k",
        "Q3_K_L": "q3_k",
        "Q4_K_S": "q4_k",
        "Q4_K_M": "q4_k",
        "Q5_K_S": "q5_k",
        "Q5_K_M": "q5_k",
        "Q6_K": "q6_k",
    }
)
_SMALLER_BLOCK: Mapping[str, str] = MappingProxyType(
    {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
)
"""What rows that are not whole blocks of 256 get instead."""
_O_OF_EIGHT = frozenset({"Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"})
_O: Mapping[str, str] = MappingProxyType({"Q2_K": "q3_k", "Q3_K_M": "q4_k", "Q3_K_L": "q5_k"})
_LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down", "linear"})
_EIGHT, _MANY = 8, 4  # experts; queries that share a key
_SEVENTY_BILLION_LAYERS = 80


@final
@dataclass(frozen=True)
class Mixture(Allocation):
    """One of llama.cpp's file types.

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
        grid = _that_fits(wanted, weight.shape[-1])
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
        if weight.role in ("k", "v") and eight_experts:
            return "q8_0", f"{weight.role} of a mixture of 8 experts"
        if weight.role == "v":
            return self._v(weight, layer, default)
        if weight.role == "down":
            return self._down(weight, layer, default)
        if weight.role == "o" and eight_experts and self.name in _O_OF_EIGHT:
            return "q5_k", "o of a mixture of 8 experts"
        if weight.role == "o" and not eight_experts and self.name in _O:
            return _O[self.name], "o"
        return default, "default"

    def _v(self, weight: Weight, layer: int, default: str) -> tuple[str, str]:
        many = weight.traits.get("heads", 1) >= _MANY * weight.traits.get("kv_heads", 1)
        wanted, why = default, "default"
        if self.name in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, weight.layers):
            wanted, why = "q6_k", "v in the first and last eighth and every third block"
        elif self.name in ("Q2_K", "Q2_K_S") and many:
            wanted, why = "q4_k", "v shared between four queries or more"
        elif self.name == "Q2_K":
            wanted, why = "q3_k", "v"
        elif self.name == "Q3_K_M":
            wanted, why = ("q5_k", "v of the first two blocks") if layer < 2 else ("q4_k", "v")
        elif self.name == "Q3_K_L":
            wanted, why = "q5_k", "v"
        elif self.name == "Q4_K_S" and layer < 4:
            wanted, why = "q5_k", "v of the first four blocks"
        if wanted in ("q3_k", "q4_k") and _seventy_billion(weight):
            return "q5_k", "v of a model with 80 blocks, shared between queries"
        return wanted, why

    def _down(self, weight: Weight, layer: int, default: str) -> tuple[str, str]:
        early = layer < weight.layers // 8
        told = weight.traits.get("imatrix", 0) == 1
        if self.name in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, weight.layers):
            return "q6_k", "down in the first and last eighth and every third block"
        if self.name == "Q3_K_M":
            first = layer < weight.layers // 16
            return ("q5_k", "down in the first sixteenth") if first else ("q4_k", "down")
        if self.name in ("Q2_K", "Q3_K_L"):
            return ("q3_k" if self.name == "Q2_K" else "q5_k"), "down"
        if self.name in ("Q2_K_S", "Q4_K_S") and early:
            return ("q4_k" if self.name == "Q2_K_S" else "q5_k"), "down in the first eighth"
        if self.name in ("Q4_0", "Q5_0") and early and told:
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
    if columns % (256 if grid.endswith("_k") else 32) == 0:
        return grid
    smaller = _SMALLER_BLOCK.get(grid)
    return smaller if smaller is not None and columns % 32 == 0 else "f16"
