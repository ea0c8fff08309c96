"""A linear layer that is ternary from the first step on, and its inputs of eight bits (Ma et al., arXiv
2402.17764): dense weights behind it learn as if nothing had been rounded (Bengio et al., arXiv 1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.core.inputs import InputGrid
from bitmill.core.types import Inputs
from bitmill.grids.ternary import Ternary
from bitmill.numerics.inputs import straight

_GRID = Ternary()


class TernaryLinear(nn.Linear):
    """Multiplies by what the file will hold, and rounds its inputs as the runtime will.

    Args:
        linear: whose dense weight it starts from, and whose bias it keeps.
        inputs: what inputs are rounded to.
    """

    def __init__(self, linear: nn.Linear, inputs: InputGrid) -> None:
        out, columns = linear.weight.shape
        super().__init__(columns, out, bias=False, device="meta")
        self.weight = nn.Parameter(linear.weight.detach().float().clone())
        self.bias = linear.bias
        self._inputs = Inputs(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """``round(x) ternary(W)ᵀ + b``."""
        values = _Ternary.apply(self.weight).to(x.dtype)
        return nn.functional.linear(straight(self._inputs, x), values, self.bias)


class _Ternary(torch.autograd.Function):
    """The nearest ternary weight forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return _GRID.round(weight).dense()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
