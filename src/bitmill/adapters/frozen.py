"""A linear layer whose weight stays on its grid: packed codes, and values that are made anew for every
product, forwards and backwards (Dettmers et al., "QLoRA", arXiv 2305.14314).

What goes backwards is the gradient by the layer's input, through the very values that went forwards. They are
not kept for it: one dense weight is alive at a time, whatever the model's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.core.types import Quantized

_NARROW = (torch.float16, torch.bfloat16)
_BYTE = 8


@dataclass(frozen=True, eq=False)
class _Held:
    """A tensor in as few bytes as hold its values exactly.

    Attributes:
        values: as held; of codes that are packed, ``8 // bits`` runs of columns share the bytes of one.
        dtype: what it is taken out as.
        bits: of a packed code; 0 for none.
        columns: of the tensor as it is taken out.
    """

    values: Tensor
    dtype: torch.dtype
    bits: int = 0
    columns: int = 0

    def out(self) -> Tensor:
        if not self.bits:
            return self.values.to(self.dtype)
        mask = (1 << self.bits) - 1
        runs = [(self.values >> shift) & mask for shift in range(0, _BYTE, self.bits)]
        return torch.cat(runs, -1)[..., : self.columns]

    def to(self, device: torch.device) -> _Held:
        return _Held(self.values.to(device), self.dtype, self.bits, self.columns)


def packed(codes: Tensor) -> _Held:
    """Codes of one byte in 1, 2 or 4 bits each, where those hold the largest of them; others as they are."""
    if codes.dtype is not torch.uint8 or not codes.numel():
        return _Held(codes, codes.dtype)
    most = int(codes.max())
    bits = next(b for b in (1, 2, 4, 8) if most < 1 << b)
    if bits == _BYTE:
        return _Held(codes, codes.dtype)
    runs, columns = _BYTE // bits, codes.shape[-1]
    width = -(-columns // runs)
    whole = torch.nn.functional.pad(codes, (0, runs * width - columns))
    held = torch.zeros(*codes.shape[:-1], width, dtype=torch.uint8, device=codes.device)
    for run in range(runs):
        held |= whole[..., run * width : (run + 1) * width] << (run * bits)
    return _Held(held, codes.dtype, bits, columns)


def narrowed(values: Tensor) -> _Held:
    """Parameters in the narrowest type that holds them exactly."""
    if values.dtype is torch.float32:
        if (
            values.numel()
            and values.min() >= 0
            and values.max() <= 255
            and torch.equal(values, values.round())
        ):
            return _Held(values.to(torch.uint8), values.dtype)
        for dtype in _NARROW:
            narrow = values.to(dtype)
            if torch.equal(narrow.to(values.dtype), values):
                return _Held(narrow, values.dtype)
    return _Held(values, values.dtype)


class FrozenLinear(nn.Linear):
    """A linear layer on a weight that does not move.

    Its ``weight`` is empty: it says of what type and where the layer is, which is all that adapters ask.

    Args:
        quantized: the weight.
        bias: ``out``, or None.
        dtype: what products are computed in.
        device: where.
    """

    def __init__(
        self, quantized: Quantized, bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        out, columns = quantized.shape
        super().__init__(columns, out, bias=False, device="meta")
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        self._grid = quantized.grid
        self._codes = packed(quantized.codes).to(device)
        self._params = {name: narrowed(p).to(device) for name, p in quantized.params.items()}

    @property
    def held_bytes(self) -> int:
        """Bytes that the weight takes in memory."""
        return sum(h.values.numel() * h.values.element_size() for h in (self._codes, *self._params.values()))

    def values(self, dtype: torch.dtype) -> Tensor:
        """The dense weight, ``out in``, made anew."""
        params = {name: held.out() for name, held in self._params.items()}
        return self._grid.decode(self._codes.out(), params).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``."""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """``x Wᵀ + b``; backwards ``W`` is decoded once more, and nothing but the layer is kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.values(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.values(gradient.dtype), None
