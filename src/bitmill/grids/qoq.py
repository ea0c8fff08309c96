"""Four bits inside eight: a group's integers are spread over the int8 values of its row, so that a kernel
makes one from the other with whole numbers alone (QServe's QoQ, progressive group quantization, Lin et al.,
arXiv 2405.04532).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import Affine, AffineGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.search import spread, stored, weights_of

PROTECTED = 119
"""A row's scale maps its largest weight to this: 127 less half a step of 15 levels over 8 bits, so that what
a group rounds it to is still an int8 value."""

_TEXT = re.compile(r"int4-g([1-9]\d{0,5})-qoq")
_TOP = 15
_WIDEST = 16  # the largest step of which 15 fit into int8, with one zero point only


@final
@dataclass(frozen=True)
class Qoq(AffineGrid):
    """Values ``scale · step · (code - zero)``, where ``step · (code - zero)`` is an int8 value for every
    code.

    Codes are uint8 ``out in``, 0 to 15. Parameters, float32: ``scale`` (f16) ``out 1``, ``step`` ``out
    groups``, whole numbers from 1 to 16, and ``zero`` ``out groups``, whole numbers from 0 to 15.

    Attributes:
        group: columns that share a step and a zero point.
    """

    group: int = 128

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group {self.group} is no number of columns")

    @property
    def block(self) -> tuple[int, int]:
        return (1, self.group)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @classmethod
    def parse(cls, text: str) -> Qoq | None:
        """``int4-g128-qoq``."""
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(int(found[1]))

    @classmethod
    def examples(cls) -> tuple[Qoq, ...]:
        return (cls(128), cls(64), cls(32))

    def __str__(self) -> str:
        return f"int4-g{self.group}-qoq"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        if shape[1] % self.group:
            return f"{shape[1]} columns are not a multiple of the group of {self.group}"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        return out * columns * 4 + 16 * (out * columns // self.group) + 16 * out

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """The plain rule: a step for the range of a group, and the zero point that puts 0 on a code. With
        ``importance``, the best of the steps and zero points around those."""
        w = w.to(torch.float32)
        scale = stored(w.abs().amax(1, keepdim=True) / PROTECTED, "f16")
        blocks = (w / scale).reshape(w.shape[0], -1, self.group)
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        step = ((high - low) / _TOP).round().clamp(1, _WIDEST)
        zero = _held(-low / step, step)
        if importance is not None:
            u = weights_of(importance, w).expand_as(w).reshape(blocks.shape)
            step, zero = _searched(blocks, u, low, step, zero)
        return {"scale": scale, "step": step, "zero": zero}

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        step, zero = self._columns(params, at, w.shape[1])
        return (w.to(torch.float32) / step).add_(zero).round_().clamp_(0, _TOP).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        step, zero = self._columns(params, at, codes.shape[1])
        return (codes.to(torch.float32) - zero).mul_(step)

    def eight(self, codes: Tensor, params: Params) -> Tensor:
        """What a kernel multiplies inputs with: int8 ``out in``, exact."""
        whole = {**params, "scale": torch.ones_like(params["scale"])}
        return self.decode(codes, whole).to(torch.int8)

    def scales(self) -> tuple[str, ...]:
        return ("scale",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return stored(values, "f16")

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        return self._columns(params, at, columns)[0].abs().expand(-1, columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        """Steps are whole numbers, and the nearest one is taken; the zero point moves as little as it
        must."""
        step = (params["step"] * factor).round().clamp(1, _WIDEST)
        return {**params, "step": step, "zero": _held(params["zero"], step)}

    def affine(self, params: Params, columns: Tensor) -> Affine:
        groups = columns // self.group
        step = params["scale"] * params["step"][:, groups]
        return Affine(step, params["zero"][:, groups], step.new_zeros(1, 1), 0, _TOP)

    def with_zero(self, params: Params, zero: Tensor) -> Params | None:
        return {**params, "zero": _held(zero, params["step"])}

    def _columns(self, params: Params, at: int, columns: int) -> tuple[Tensor, Tensor]:
        step = spread(params["step"], self.group, at, columns)
        return params["scale"] * step, spread(params["zero"], self.group, at, columns)


def fits_int8(step: Tensor, zero: Tensor) -> bool:
    """Whether every code of every group stands for an int8 value."""
    whole = bool((step >= 1).all() and (zero >= 0).all() and (zero <= _TOP).all())
    return whole and bool((zero * step <= 128).all() and ((_TOP - zero) * step <= 127).all())


def _held(zero: Tensor, step: Tensor) -> Tensor:
    """The nearest zero point with which all codes stand for int8 values."""
    lowest = (_TOP - (127 / step).floor()).clamp(min=0)
    return torch.minimum(torch.maximum(zero.round(), lowest), (128 / step).floor().clamp(max=_TOP))


def _searched(blocks: Tensor, u: Tensor, low: Tensor, step: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Of a few steps and zero points, the pair with the least weighted error of each group."""

    def error(step: Tensor, zero: Tensor) -> Tensor:
        code = (blocks / step[..., None] + zero[..., None]).round_().clamp_(0, _TOP)
        return ((code - zero[..., None]) * step[..., None] - blocks).square_().mul_(u).sum(-1)

    least = error(step, zero)
    best, base = (step, zero), step
    for finer, off in product((-3, -2, -1, 0, 1), (-1, 0, 1)):
        tried = (base + finer).clamp(1, _WIDEST)
        held = _held(-low / tried + off, tried)
        found = error(tried, held)
        better = found < least
        least = torch.where(better, found, least)
        best = (torch.where(better, tried, best[0]), torch.where(better, held, best[1]))
    return best
