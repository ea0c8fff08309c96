"""One number as every kind of number keeps it, bit by bit: floats of 32 to 4 bits, blocks that share a scale.

IEEE 754 for the wide ones; the small ones are :mod:`bitmill.numerics.floats`, and the blocks are the very
grids that weights are put on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitmill.core.axes import AffineGrid, Grid, LevelGrid
from bitmill.core.errors import Refused, Unsolvable
from bitmill.core.registry import parse_grid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.floats import ELEMENTS, Element, decode, encode
from bitmill.studio.asked import Asked

FIELDS = ("text", "largest")

_NUMBER = re.compile(r"[-+−]?(?:\d{1,40}\.?\d{0,60}|\.\d{1,60})(?:[eE][-+]?\d{1,3})?")
_LONGEST = 100
_LARGEST = 1e30


@dataclass(frozen=True)
class _Float:
    """A kind of float: bits of its exponent and mantissa, and how a number becomes its bits and back."""

    name: str
    exponent: int
    mantissa: int
    bias: int
    endless: bool
    bits_of: Callable[[float], int]
    value_of: Callable[[int], float]


def number(asked: Asked) -> dict[str, Any]:
    """The answer to ``number``: the number in every kind, the widest first.

    Raises:
        Refused: the text is no number.
    """
    text = asked.word("text", _LONGEST).strip()
    if not _NUMBER.fullmatch(text):
        raise Refused(f"{text!r} is not a number", where="text", fix="for example 0.1, -3, or 2.5e-3")
    x = float(text.replace("−", "-"))
    if not math.isfinite(x):
        raise Refused("this number is beyond every kind of float here", where="text", fix="a smaller one")
    largest = asked.number("largest", 0.0, _LARGEST, 1.0)
    floats = [_float(kind, x) for kind in _floats()]
    if abs(x) > _LARGEST:
        return {"x": x, "largest": None, "rows": floats}
    reach = max(largest, abs(x))
    blocks = [_shared(name, x, reach) for name in _BLOCKS]
    return {"x": x, "largest": reach, "rows": [*floats, *blocks]}


def _floats() -> list[_Float]:
    wide = [
        _ieee("fp32", torch.float32, torch.int32, 8, 23),
        _ieee("fp16", torch.float16, torch.int16, 5, 10),
        _ieee("bf16", torch.bfloat16, torch.int16, 8, 7),
    ]
    return wide + [_small(element) for element in ELEMENTS.values()]


def _ieee(name: str, dtype: torch.dtype, whole: torch.dtype, exponent: int, mantissa: int) -> _Float:
    width = 1 + exponent + mantissa

    def bits_of(x: float) -> int:
        stored = torch.tensor([x], dtype=torch.float64).to(dtype)
        return int(stored.view(whole)) & (1 << width) - 1

    def value_of(bits: int) -> float:
        signed = bits - (1 << width) if bits >> (width - 1) else bits
        return float(torch.tensor([signed], dtype=whole).view(dtype))

    return _Float(name, exponent, mantissa, (1 << exponent - 1) - 1, True, bits_of, value_of)


def _small(element: Element) -> _Float:
    def bits_of(x: float) -> int:
        return int(encode(torch.tensor([x], dtype=torch.float32), element))

    def value_of(bits: int) -> float:
        return float(decode(torch.tensor([bits], dtype=torch.uint8), element))

    name = f"fp{element.bits} {element.name}"
    return _Float(name, element.exponent, element.mantissa, element.bias, False, bits_of, value_of)


def _float(kind: _Float, x: float) -> dict[str, Any]:
    bits = kind.bits_of(x)
    value = kind.value_of(bits)
    note = "" if math.isfinite(value) else "beyond its largest number: infinity"
    if not kind.endless and math.isfinite(value) and abs(x) > abs(value) and bits == kind.bits_of(x * 2):
        note = "held at its largest number"
    if x and not value:
        note = "below half of its smallest number: zero"
    return {
        "name": kind.name,
        "bpw": 1 + kind.exponent + kind.mantissa,
        "parts": _parts(bits, kind.exponent, kind.mantissa),
        "value": _plain(value),
        "off": _off(x, value),
        "made": _made(kind, bits) if math.isfinite(value) else "all bits of the exponent are set",
        "note": note,
    }


def _parts(bits: int, exponent: int, mantissa: int) -> list[list[str]]:
    """Names and digits of a float's parts, the sign first."""
    digits = f"{bits:0{1 + exponent + mantissa}b}"
    cut = 1 + exponent
    return [["sign", digits[0]], ["exponent", digits[1:cut]], ["mantissa", digits[cut:]]]


def _made(kind: _Float, bits: int) -> str:
    """The arithmetic behind the bits."""
    field = bits >> kind.mantissa & (1 << kind.exponent) - 1
    fraction, parts = bits & (1 << kind.mantissa) - 1, 1 << kind.mantissa
    sign = "−" if bits >> (kind.exponent + kind.mantissa) else ""
    power = max(field, 1) - kind.bias
    inside = f"{fraction}/{parts}" if fraction else "0"
    if field:
        inside = f"(1 + {inside})" if fraction else "1"
    return f"{sign}{inside} × 2^{power}".replace("^-", "^−")


_BLOCKS = ("mxfp8", "mxfp4", "nvfp4", "nf4-b64", "int8-g32-sym", "int4-g32-sym", "int4-g32-asym", "q4_0")


def _shared(name: str, x: float, largest: float) -> dict[str, Any]:
    """The number in a block whose largest number is ``largest`` and whose others are 0."""
    grid = parse_grid(name)
    width = grid.block[1]
    w = torch.zeros(1, width)
    w[0, 0], w[0, 1] = x, largest
    try:
        stored = grid.round(w)
        value = float(stored.dense()[0, 0])
    except Unsolvable:
        value = math.nan
    if not math.isfinite(value):
        much = "its scale is beyond what it is stored in, 65,504"
        return {**_NO_BITS, "name": name, "bpw": _bpw(grid), "note": much}
    code = int(stored.codes[0, 0])
    digits = math.ceil(math.log2(_values(grid, stored.params, width)))
    return {
        "name": name,
        "bpw": _bpw(grid),
        "parts": [*_code_parts(name, code, digits), *_scale_parts(name, stored)],
        "value": _plain(value),
        "off": _off(x, value),
        "made": _said(grid, stored, value),
        "note": f"{width} numbers share {_SHARED.get(name, 'a scale')}",
    }


_NO_BITS: Mapping[str, Any] = {"parts": [], "value": None, "off": None, "made": ""}
_SHARED: Mapping[str, str] = {
    "mxfp8": "a power of two",
    "mxfp4": "a power of two",
    "nvfp4": "a scale in 8 bits, and a tensor one in 32",
    "int4-g32-asym": "a scale and the code that is zero",
}


def _bpw(grid: Grid) -> float:
    """Bits of a number in a tensor that is large enough."""
    shape = (4096, 4096)
    return round(grid.storage_bits(shape) / math.prod(shape), 3)


def _values(grid: Grid, params: Params, width: int) -> int:
    """How many different codes there are."""
    columns = torch.arange(width)
    if isinstance(grid, AffineGrid):
        even = grid.affine(params, columns)
        return even.high - even.low + 1
    if isinstance(grid, LevelGrid):
        levels = grid.levels_of(params, columns, 1).levels
        return max(len(levels), 2)
    raise TypeError(f"{grid} is a grid of vectors")


def _code_parts(name: str, code: int, digits: int) -> list[list[str]]:
    element = {"mxfp8": "e4m3", "mxfp4": "e2m1", "nvfp4": "e2m1"}.get(name)
    if element is None:
        return [["code", f"{code:0{digits}b}"]]
    kind = ELEMENTS[element]
    return _parts(code, kind.exponent, kind.mantissa)


def _scale_parts(name: str, stored: Quantized) -> Sequence[list[str]]:
    """Bits of what the block shares."""
    params = stored.params
    if "exponent" in params:
        return [["scale", f"{int(params['exponent'].reshape(-1)[0]):08b}"]]
    first = next(params[key] for key in ("d", "scale", "absmax") if key in params).reshape(-1)[:1]
    if name == "nvfp4":
        return [["scale", f"{int(encode(first, ELEMENTS['e4m3'])):08b}"]]
    scale = _bits(first, torch.float32 if "absmax" in params else torch.float16)
    zero = params.get("zero")
    tail = [] if zero is None else [["zero", f"{int(zero.reshape(-1)[0]):04b}"]]
    return [["scale", scale], *tail]


def _bits(value: Tensor, dtype: torch.dtype) -> str:
    width = dtype.itemsize * 8
    whole = value.to(dtype).view(torch.int32 if width == 32 else torch.int16)
    return f"{int(whole) & (1 << width) - 1:0{width}b}"


def _said(grid: Grid, stored: Quantized, value: float) -> str:
    columns = torch.arange(stored.shape[1])
    if isinstance(grid, AffineGrid):
        even = grid.affine(stored.params, columns)
        step, zero = (float(x.reshape(-1)[0]) for x in (even.step, even.zero))
        code = round(value / step + zero) if step else round(zero)
        return f"({code} − {zero:g}) × {step:.5g}" if zero else f"{code} × {step:.5g}"
    if isinstance(grid, LevelGrid):
        scale = float(grid.levels_of(stored.params, columns, 1).scale.reshape(-1)[0])
        return f"{value / scale if scale else 0.0:.5g} × {scale:.5g}"
    raise TypeError(f"{grid} is a grid of vectors")


def _off(x: float, value: float) -> float | None:
    """Relative to the number; None for 0 and for what is not finite."""
    return _plain(abs(value - x) / abs(x)) if x and math.isfinite(value) else None


def _plain(value: float) -> float | None:
    return float(f"{value:.9g}") if math.isfinite(value) else None
