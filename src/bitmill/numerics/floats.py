"""Small floating-point numbers, bit for bit: FP8, FP6 and FP4 elements and the E8M0 power of two.

Open Compute Project, "Microscaling Formats (MX) Specification" v1.0, and Micikevicius et al., "FP8 Formats
for Deep Learning", arXiv 2209.05433. Rounding is to nearest, ties to the even code; what is beyond the
largest number becomes the largest number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Element:
    """A sign bit, ``exponent`` bits and ``mantissa`` bits.

    Attributes:
        name: ``e4m3`` and the like.
        bias: of the exponent.
        largest: largest finite value; codes above it, if any, are infinities and NaNs.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    largest: float

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def lowest(self) -> int:
        """Binary exponent of the smallest normal number, hence of all the subnormal ones."""
        return 1 - self.bias

    @property
    def highest(self) -> int:
        """Binary exponent of the largest number: ``emax`` of the MX specification."""
        return math.frexp(self.largest)[1] - 1


ELEMENTS = {
    e.name: e
    for e in (
        Element("e4m3", 4, 3, 7, 448.0),
        Element("e5m2", 5, 2, 15, 57344.0),
        Element("e2m3", 2, 3, 1, 7.5),
        Element("e3m2", 3, 2, 3, 28.0),
        Element("e2m1", 2, 1, 1, 6.0),
    )
}

_NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def encode(x: Tensor, element: Element) -> Tensor:
    """Codes (uint8, sign in the highest of ``element.bits``) of the numbers nearest to ``x`` (float32)."""
    if element.name in _NATIVE:
        inside = x.clamp(-element.largest, element.largest)
        return inside.to(_NATIVE[element.name]).view(torch.uint8)
    size = x.abs().clamp_(max=element.largest).contiguous()
    exponent = ((size.view(torch.int32) >> 23) - 127).clamp_(min=element.lowest)
    inverse_quantum = ((element.mantissa + 127 - exponent) << 23).view(torch.float32)
    steps = (size * inverse_quantum).round_().to(torch.int32)
    codes = ((exponent - element.lowest) << element.mantissa) + steps
    return (codes | (torch.signbit(x).to(torch.int32) << (element.bits - 1))).to(torch.uint8)


def decode(codes: Tensor, element: Element) -> Tensor:
    """Float32 values of uint8 ``codes``."""
    if element.name in _NATIVE:
        return codes.contiguous().view(_NATIVE[element.name]).to(torch.float32)
    return _values(element).to(codes.device)[codes.to(torch.int32)]


def round_to(x: Tensor, element: Element) -> Tensor:
    """The numbers nearest to ``x``, in float32."""
    return decode(encode(x, element), element)


def power_of_two(exponents: Tensor) -> Tensor:
    """Float32 values ``2**(byte - 127)`` of E8M0 bytes; 255 is NaN."""
    wide = exponents.to(torch.int32)
    value = torch.where(wide == 0, 1 << 22, wide << 23).view(torch.float32)
    return torch.where(wide == 255, torch.nan, value)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass, no mask."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _values(element: Element) -> Tensor:
    """Value of every code of ``element``, which has no infinities or NaNs: ``2**bits`` float32."""
    half = 2 ** (element.bits - 1)
    code = torch.arange(half)
    field, fraction = code >> element.mantissa, code & (2**element.mantissa - 1)
    steps = torch.where(field > 0, fraction + 2**element.mantissa, fraction).to(torch.float64)
    value = steps * 2.0 ** (field.clamp(min=1) - element.bias - element.mantissa).to(torch.float64)
    return torch.cat((value, -value)).to(torch.float32)


def dynamic_map() -> Tensor:
    """The 256 sorted values of Dettmers' signed dynamic 8-bit type (arXiv 1511.04561) in ``[-1, 1]``.

    Decade ``10**-k`` (k = 6 … 0) between a tenth of it and itself is cut in ``2**(6-k)`` equal parts, whose
    middles are values with either sign; 0 and 1 complete the table.
    """
    values = [torch.zeros(1), torch.ones(1)]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - k) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0**-k
        values += [middles, -middles]
    return torch.cat(values).sort().values
