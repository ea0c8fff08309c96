"""Small floats with a scale: FP8, FP6, FP4, the OCP microscaling (MX) types and NVFP4.

Open Compute Project, "Microscaling Formats (MX) Specification" v1.0; Micikevicius et al., arXiv 2209.05433;
the choice of block scale by error follows Cook et al., "Four Over Six", arXiv 2512.02010.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitmill.core.axes import LevelGrid, Levels
from bitmill.core.types import Params, Quantized
from bitmill.numerics.floats import ELEMENTS, Element, decode, encode, power_of_two, round_to
from bitmill.numerics.search import search_scale, spread, stored, weights_of

_PLAIN = re.compile(r"fp([468])-(e\dm\d)-(channel|tensor|b128)")
_MX = {
    "mxfp8": "e4m3",
    "mxfp8-e4m3": "e4m3",
    "mxfp8-e5m2": "e5m2",
    "mxfp6-e2m3": "e2m3",
    "mxfp6-e3m2": "e3m2",
    "mxfp4": "e2m1",
    "mxfp4-e2m1": "e2m1",
}
_BLOCKS = {"channel": (1, 0), "tensor": (0, 0), "b128": (128, 128), "mx": (1, 32), "nv": (0, 16)}
_E4M3 = ELEMENTS["e4m3"]
_SMALLEST = 2.0**-9
"""Smallest E4M3 above 0. A block scale of 0 would lose the block, and divide by nothing."""


@final
@dataclass(frozen=True)
class Minifloat(LevelGrid):
    """Values ``element · scale`` for floating-point elements of 4 to 8 bits.

    Codes are uint8 ``out in``: the element's bit pattern, sign highest. Parameters by scaling:

    * ``channel tensor b128``: ``scale`` float32, ``out 1``, ``1 1`` or ``ceil(out/128) ceil(in/128)``.
    * ``mx``: ``exponent`` uint8 ``out in/32``; the scale is ``2**(exponent - 127)`` (E8M0).
    * ``nv``: ``scale`` float32 ``out in/16`` (E4M3 numbers) and ``gain`` float32 ``()``, shared by the whole
      tensor, so the block has 0 rows; value = element · (scale / gain).

    Attributes:
        element: ``e4m3 e5m2 e2m3 e3m2 e2m1``.
        scaling: ``channel tensor b128 mx nv``.
    """

    element: str = "e4m3"
    scaling: str = "channel"

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ValueError(f"element {self.element!r} is not one of {', '.join(ELEMENTS)}")
        if self.scaling not in _BLOCKS:
            raise ValueError(f"scaling {self.scaling!r} is not one of {', '.join(_BLOCKS)}")
        if self.scaling == "nv" and self.element != "e2m1":
            raise ValueError(f"NVFP4 scales E2M1 elements, not {self.element}")

    @property
    def block(self) -> tuple[int, int]:
        return _BLOCKS[self.scaling]

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> Minifloat | None:
        """``fp8-e4m3-channel``, ``fp4-e2m1-b128``, ``mxfp8``, ``mxfp6-e3m2``, ``nvfp4`` …"""
        if text == "nvfp4":
            return cls("e2m1", "nv")
        if text in _MX:
            return cls(_MX[text], "mx")
        found = _PLAIN.fullmatch(text)
        if found is None or found[2] not in ELEMENTS or ELEMENTS[found[2]].bits != int(found[1]):
            return None
        return cls(found[2], found[3])

    @classmethod
    def examples(cls) -> tuple[Minifloat, ...]:
        plain = [("e4m3", "channel"), ("e4m3", "tensor"), ("e4m3", "b128"), ("e5m2", "channel")]
        small = [("e2m3", "channel"), ("e3m2", "channel"), ("e2m1", "channel")]
        return tuple(cls(*x) for x in [*plain, *small, *((e, "mx") for e in ELEMENTS), ("e2m1", "nv")])

    def __str__(self) -> str:
        bits = self._kind.bits
        if self.scaling == "nv":
            return "nvfp4"
        if self.scaling == "mx":
            return f"mxfp{bits}" if self.element in ("e4m3", "e2m1") else f"mxfp{bits}-{self.element}"
        return f"fp{bits}-{self.element}-{self.scaling}"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        width = {"mx": 32, "nv": 16}.get(self.scaling, 1)
        if shape[1] % width:
            return f"{shape[1]} columns are not a multiple of {self}'s block of {width}"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        scales = {
            "channel": 32 * out,
            "tensor": 32,
            "b128": 32 * -(-out // 128) * -(-columns // 128),
            "mx": 8 * out * (columns // 32),
            "nv": 8 * out * (columns // 16) + 32,
        }
        return out * columns * self._kind.bits + scales[self.scaling]

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Scales by the largest magnitude; MX exponents by least squared error of the two next to it. With
        ``importance``, the best in weighted error of a handful around those, the plain one included."""
        w = w.to(torch.float32)
        u = None if importance is None else weights_of(importance, w)
        if self.scaling == "mx":
            return {"exponent": self._exponents(w, u)}
        if self.scaling == "nv":
            return self._nested(w, u)
        return {"scale": self._scales(w, u)}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        scale = self._columns(params, at, w.shape[1], w.shape[0])
        return encode(w.to(torch.float32) / scale, self._kind)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        scale = self._columns(params, at, codes.shape[1], codes.shape[0])
        return decode(codes, self._kind) * scale

    def scales(self) -> tuple[str, ...]:
        """MX exponents are no factors."""
        return () if self.scaling == "mx" else ("scale",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return _block_scale(values) if self.scaling == "nv" else stored(values, "f32")

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        """Spacing just below half of the largest value. It is wider above, and halves towards 0.
        (For ``b128`` one row stands for the 128 that share it: ``ceil(out/128) columns``.)"""
        gap = 2.0 ** (self._kind.highest - 1 - self._kind.mantissa)
        if self.scaling == "b128":
            scale = spread(params["scale"], 128, at, columns)
        else:
            scale = self._columns(params, at, columns, 1)
        return (scale * gap).expand(scale.shape[0], columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        """E8M0 exponents move by whole powers of two; NVFP4's gain stays."""
        if self.scaling == "mx":
            moved = params["exponent"].to(torch.float32) + factor.log2()
            return {"exponent": moved.round().clamp(1, 254).to(torch.uint8)}
        scale = params["scale"] * factor
        if self.scaling == "nv":
            return {**params, "scale": _block_scale(scale)}
        return {"scale": stored(scale, "f32")}

    def levels_of(self, params: Params, columns: Tensor, rows: int) -> Levels:
        codes = torch.arange(2**self._kind.bits, dtype=torch.uint8, device=columns.device)
        values = decode(codes, self._kind)
        values = values[values.abs() <= self._kind.largest].unique()
        if self.scaling == "mx":
            return Levels(values, power_of_two(params["exponent"][:, columns // 32]), True)
        if self.scaling == "nv":
            return Levels(values, params["scale"][:, columns // 16] / params["gain"], True)
        if self.scaling == "b128":
            return Levels(values, params["scale"].repeat_interleave(128, 0)[:rows, columns // 128], True)
        return Levels(values, params["scale"], True)

    @property
    def _kind(self) -> Element:
        return ELEMENTS[self.element]

    def _columns(self, params: Params, at: int, columns: int, rows: int) -> Tensor:
        """The scale of every value: ``rows columns``, or a shape that broadcasts to it."""
        if self.scaling == "mx":
            return power_of_two(spread(params["exponent"], 32, at, columns))
        if self.scaling == "nv":
            return spread(params["scale"], 16, at, columns) / params["gain"]
        if self.scaling == "b128":
            tall = params["scale"].repeat_interleave(128, 0)[:rows]
            return spread(tall, 128, at, columns)
        return params["scale"]

    def _scales(self, w: Tensor, u: Tensor | None) -> Tensor:
        tiles = _tiled(w, self.scaling)
        plain = stored(tiles.abs().amax(-1, keepdim=True) / self._kind.largest, "f32")
        if u is not None:
            even = _tiled(u.expand_as(w), self.scaling) if self.scaling != "channel" else u
            low = 0.4 if self._kind.bits == 4 else 0.8
            factors = torch.cat((torch.ones(1), torch.linspace(low, 2.0, 33))).to(w.device)
            candidates = stored(plain[..., None] * factors, "f32")
            best = search_scale(tiles, even, candidates, self._kind)
            plain = candidates.gather(-1, best[..., None]).squeeze(-1)
        if self.scaling == "b128":
            return plain.reshape(-(-w.shape[0] // 128), -(-w.shape[1] // 128))
        return plain

    def _exponents(self, w: Tensor, u: Tensor | None) -> Tensor:
        largest = w.reshape(w.shape[0], -1, 32).abs().amax(-1)
        top = _ceil_log2(largest / self._kind.largest)
        bottom = _floor_log2(largest) - self._kind.highest
        choice = [bottom, top] if u is None else [bottom, top, bottom - 1]
        candidates = (torch.stack(choice, -1) + 127).clamp(1, 254).to(torch.uint8)
        even = torch.ones(1, w.shape[1], device=w.device)
        best = search_scale(w, even, power_of_two(candidates[..., :2]), self._kind)
        plain = candidates.gather(-1, best[..., None])
        if u is None:
            return plain.squeeze(-1)
        candidates = torch.cat((plain, candidates), -1)
        best = search_scale(w, u, power_of_two(candidates), self._kind)
        return candidates.gather(-1, best[..., None]).squeeze(-1)

    def _nested(self, w: Tensor, u: Tensor | None) -> Params:
        """The block's largest value goes to 6 by the plain rule; the search tries its E4M3 neighbours from
        five codes below (clipping) to seven above (it goes to 4 or less)."""
        top = _E4M3.largest * self._kind.largest
        largest = w.abs().max() if w.numel() else w.new_zeros(())
        gain = top / largest
        gain = torch.where(gain.isfinite(), gain, 1.0).to(torch.float32)
        gain = 1 / (1 / gain)  # so that a file may hold either and mean the same
        blocks = w.reshape(w.shape[0], -1, 16).abs().amax(-1)
        plain = _block_scale(blocks * gain / self._kind.largest)
        if u is None:
            return {"scale": plain, "gain": gain}
        offsets = torch.tensor([0, *range(-5, 0), *range(1, 8)], device=w.device)
        code = encode(plain, _E4M3).to(torch.int64)[..., None] + offsets
        candidates = decode(code.clamp(1, 126).to(torch.uint8), _E4M3)
        best = search_scale(w, u, candidates / gain, self._kind)
        return {"scale": candidates.gather(-1, best[..., None]).squeeze(-1), "gain": gain}


def _block_scale(scale: Tensor) -> Tensor:
    return round_to(scale, _E4M3).clamp(min=_SMALLEST)


def _tiled(w: Tensor, scaling: str) -> Tensor:
    """One row for each scale; rows and columns that 128 × 128 tiles lack are zeros."""
    if scaling == "tensor":
        return w.reshape(1, -1)
    if scaling == "channel":
        return w
    whole = pad(w, (0, -w.shape[1] % 128, 0, -w.shape[0] % 128))
    tiles = whole.reshape(whole.shape[0] // 128, 128, whole.shape[1] // 128, 128)
    return tiles.transpose(1, 2).reshape(-1, 128 * 128)


def _floor_log2(x: Tensor) -> Tensor:
    """Exact for positive normal numbers; -127 for 0."""
    return (x.contiguous().view(torch.int32) >> 23) - 127


def _ceil_log2(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    return (bits >> 23) - 127 + ((bits & 0x7FFFFF) != 0).to(torch.int32)
