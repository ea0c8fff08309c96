"""llama.cpp's mixtures: more bits where its authors found that they count (``llama-quantize``'s type names).

The rules are the program's, as a table and a pure function of a tensor's role, depth and model: there,
counters advance as tensors go by, and overriding one tensor moves the choice for later ones; here each tensor
stands alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
        "IQ1_S": "iq1_s",
        "IQ1_M": "iq1_m",
        "IQ2_XXS": "iq2_xxs",
        "IQ2_XS": "iq2_xs",
        "IQ2_S": "iq2_xs",
        "IQ2_M": "iq2_s",
        "IQ3_XXS": "iq3_xxs",
        "IQ3_XS": "iq3_s",
        "IQ3_S": "iq3_s",
        "IQ3_M": "iq3_s",
        "IQ4_NL": "iq4_nl",
        "IQ4_XS": "iq4_xs",
        "TQ1_0": "tq1_0",
        "TQ2_0": "tq2_0",
        "MXFP4_MOE": "mxfp4-floor",
    }
)
_SMALLER_BLOCK: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"), "iq4_nl"),
        **dict.fromkeys(("iq3_xxs", "iq3_s", "iq4_xs"), "iq4_nl"),
        **dict.fromkeys(("q2_k", "q3_k", "tq1_0", "tq2_0"), "q4_0"),
        "q4_k": "q5_0",
        "q5_k": "q5_1",
        "q6_k": "q8_0",
    }
)
"""The types with blocks of 256, and what rows that are not whole blocks get instead: blocks of 32."""
_DENSE = frozenset({"f32", "f16", "bf16"})
_LINEAR = frozenset({"q", "k", "v", "o", "gate", "up", "down", "linear"})
_STACKED = 3  # dimensions of a stack of experts
_EIGHT, _MANY, _SHARING = 8, 4, 4  # experts, experts, queries that share a key
_SEVENTY_BILLION_LAYERS = 80
_BLIND_TYPES = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})


@final
@dataclass(frozen=True)
class _When:
    """A condition on a tensor, and how a reason says it."""

    said: str
    holds: Callable[[Weight], bool]

    def __and__(self, other: _When) -> _When:
        return _When(f"{self.said}, {other.said}", lambda w: self.holds(w) and other.holds(w))


def _shared(w: Weight) -> bool:
    return w.traits.get("heads", 1) >= _SHARING * w.traits.get("kv_heads", 1)


def _experts(w: Weight) -> int:
    return w.traits.get("experts", 0)


def _at(w: Weight) -> int:
    return w.layer or 0


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


_ALWAYS = _When("", lambda w: True)
_OF_EIGHT = _When("of a mixture of 8 experts", lambda w: _experts(w) == _EIGHT)
_NOT_OF_EIGHT = _When("", lambda w: _experts(w) != _EIGHT)
_SHARED = _When("shared between four queries or more", _shared)
_SHARED_OR_MANY = _When(
    "shared between four queries or more, or of four experts or more",
    lambda w: _shared(w) or _experts(w) >= _MANY,
)
_TOLD = _When("when the inputs are known", lambda w: w.traits.get("imatrix", 0) == 1)
_BLIND = _When("when the inputs are unknown", lambda w: w.traits.get("imatrix", 0) != 1)
_FIRST_TWO = _When("of the first two blocks", lambda w: _at(w) < 2)
_FIRST_FOUR = _When("of the first four blocks", lambda w: _at(w) < 4)
_SIXTEENTH = _When("in the first sixteenth", lambda w: _at(w) < w.layers // 16)
_EIGHTH = _When("in the first eighth", lambda w: _at(w) < w.layers // 8)
_MIDDLE = _When(
    "between the first and the last eighth", lambda w: w.layers // 8 <= _at(w) < 7 * w.layers // 8
)
_MORE = _When("in the first and last eighth and every third block", lambda w: _more_bits(_at(w), w.layers))

_LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_ALL = tuple(_DEFAULT)
_Rule = tuple[tuple[str, ...], str, _When]
_RULES: Mapping[str, tuple[_Rule, ...]] = MappingProxyType(
    {
        "v": (
            (_LOW, "q4_k", _SHARED_OR_MANY),
            (("IQ2_S", "IQ2_M"), "iq3_s", _ALWAYS),
            (_LOW, "q2_k", _ALWAYS),
            (_ALL, "q8_0", _OF_EIGHT),
            (("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), "q4_k", _SHARED),
            (("Q2_K",), "q3_k", _ALWAYS),
            (("IQ3_XXS",), "iq3_s", _BLIND),
            (("Q3_K_M",), "q5_k", _FIRST_TWO),
            (("Q3_K_M", "IQ3_M"), "q4_k", _ALWAYS),
            (("Q3_K_L",), "q5_k", _ALWAYS),
            (("Q4_K_S",), "q5_k", _FIRST_FOUR),
            (("IQ4_NL", "IQ4_XS"), "q5_k", _SHARED),
            (("Q4_K_M", "Q5_K_M"), "q6_k", _MORE),
        ),
        "k": (
            (_LOW, "q4_k", _OF_EIGHT),
            (_ALL, "q8_0", _OF_EIGHT),
            (("IQ3_XXS",), "iq2_s", _ALWAYS),
            (("IQ3_XS",), "iq3_xxs", _ALWAYS),
        ),
        "q": (
            (("IQ3_XXS",), "iq2_s", _ALWAYS),
            (("IQ3_XS",), "iq3_xxs", _ALWAYS),
        ),
        "o": (
            ((*_LOW, "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"), "q5_k", _OF_EIGHT),
            (("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"), "q5_k", _OF_EIGHT),
            (("IQ1_S", "IQ1_M"), "iq2_xxs", _ALWAYS),
            (("IQ2_S", "IQ2_M", "IQ3_XXS"), "iq3_s", _ALWAYS),
            (("Q2_K",), "q3_k", _ALWAYS),
            (("Q3_K_M", "IQ3_M"), "q4_k", _ALWAYS),
            (("Q3_K_L",), "q5_k", _NOT_OF_EIGHT),
        ),
        "down": (
            (("IQ2_S", "IQ2_M"), "iq3_s", _EIGHTH),
            (_LOW, "q2_k", _EIGHTH),
            (("Q2_K_S", "IQ3_M"), "q4_k", _EIGHTH),
            (("IQ3_M",), "q4_k", _MORE & _OF_EIGHT),
            (("IQ3_XXS",), "q4_k", _EIGHTH & _BLIND),
            (("IQ3_XXS",), "q3_k", _BLIND),
            (("Q2_K",), "q3_k", _ALWAYS),
            (("Q3_K_M",), "q5_k", _SIXTEENTH),
            (("Q3_K_M",), "q4_k", _ALWAYS),
            (("Q3_K_L",), "q5_k", _ALWAYS),
            (("Q4_K_S",), "q5_k", _EIGHTH),
            (("IQ4_NL", "IQ4_XS"), "q5_k", _EIGHTH & _BLIND),
            (("Q4_K_M", "Q5_K_M"), "q6_k", _MORE),
            (("Q4_0",), "q4_1", _EIGHTH & _TOLD),
            (("Q5_0",), "q5_1", _EIGHTH & _TOLD),
        ),
        "gate": ((("IQ3_XS",), "iq3_xxs", _MIDDLE),),
        "up": ((("IQ3_XS",), "iq3_xxs", _MIDDLE),),
        "embed": (
            (("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "q2_k", _ALWAYS),
            (("IQ2_S", "IQ2_M", "IQ3_XXS"), "iq3_s", _ALWAYS),
            (("TQ1_0", "TQ2_0"), "q4_k", _ALWAYS),
        ),
    }
)
"""By role: mixtures, the type they give it, and when; the first that holds, or else the default type."""


@final
@dataclass(frozen=True)
class Mixture(Allocation):
    """One of llama.cpp's file types, with what ``llama-quantize`` lets one change about it.

    Attributes:
        name: one of :meth:`names`, upper-case.
        pure: the default type for every tensor, embedding and head too.
        tensors: regular expressions searched in the stored name, each with a type; the first that is found
            decides, before every rule and before ``pure``.
        output: type of an embedding that is also the head, where no pattern and no ``pure`` decides.
    """

    name: str
    pure: bool = False
    tensors: tuple[tuple[str, str], ...] = ()
    output: str | None = None

    def __post_init__(self) -> None:
        if self.name not in _DEFAULT:
            raise ValueError(f"mixture {self.name!r} is not one of {', '.join(_DEFAULT)}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Every mixture."""
        return tuple(_DEFAULT)

    def choose(self, weight: Weight) -> Choice | None:
        """The type for a matrix of a block, the embedding or the head; None for norms, routers, others."""
        if weight.role not in ("embed", "head") and (weight.role not in _LINEAR or weight.layer is None):
            return None
        wanted, why = self._named(weight) or self._rule(weight)
        grid = _that_fits(wanted, weight.shape[-1])
        return Choice(grid, f"{self.name}: {why}", None if grid == wanted else wanted)

    def _named(self, weight: Weight) -> tuple[str, str] | None:
        for pattern, grid in self.tensors:
            if re.search(pattern, weight.stored):
                return grid, f"/{pattern}/"
        return (_DEFAULT[self.name], "pure") if self.pure else None

    def _rule(self, weight: Weight) -> tuple[str, str]:
        default = _DEFAULT[self.name]
        if weight.role == "head":
            return self._head(weight), "the head"
        if weight.role == "embed" and weight.traits.get("tied", 0) == 1:
            return self.output or self._head(weight), "the embedding is also the head"
        if self.name == "MXFP4_MOE":
            stacked = len(weight.shape) == _STACKED and weight.shape[0] > 1
            return (default, "experts") if stacked else ("q8_0", "no experts")
        for names, grid, when in _RULES.get(weight.role, ()):
            if self.name in names and when.holds(weight):
                return self._unless_large(weight, grid, f"{weight.role} {when.said}".strip())
        return self._unless_large(weight, default, "default")

    def _head(self, weight: Weight) -> str:
        if self.name in ("MXFP4_MOE", "Q8_0"):
            return "q8_0"
        whole = weight.shape[-1] % _block(_DEFAULT[self.name]) == 0
        return "q5_k" if whole and self.name in (*_LOW, "IQ3_XXS") else "q6_k"

    def _unless_large(self, weight: Weight, grid: str, why: str) -> tuple[str, str]:
        """70B of Llama and 72B of Qwen2: keys are shared, so that more bits for v cost next to nothing."""
        shared = weight.traits.get("heads", 1) != weight.traits.get("kv_heads", 1)
        large = weight.layers == _SEVENTY_BILLION_LAYERS and shared and self.name not in _LOW
        if weight.role == "v" and large and grid in ("q3_k", "q4_k"):
            return "q5_k", "v of a model with 80 blocks, shared between queries"
        return grid, why


def demands_importance(mixture: str, role: str, grid: str) -> bool:
    """Whether ``llama-quantize`` refuses this type for this role when nothing is known of the inputs."""
    small = grid in _BLIND_TYPES or (mixture, grid) == ("Q2_K_S", "q2_k")
    return small and role in _LINEAR


def _block(grid: str) -> int:
    return 1 if grid in _DENSE else 256 if grid in _SMALLER_BLOCK else 32


def _that_fits(grid: str, columns: int) -> str:
    """llama.cpp's answer to rows that are not whole blocks: a type with blocks of 32, or none at all."""
    if columns % _block(grid) == 0:
        return grid
    smaller = _SMALLER_BLOCK.get(grid)
    return smaller if smaller is not None and columns % 32 == 0 else "f16"
