"""Derivatives by what is stored beside the codes.

Values are linear in a scale while all else is fixed, so that doubling the scale adds its part of the values
once more: ``decode(2 s) - decode(s)`` is the derivative by a relative change of ``s``, whatever the grid.
Where values are linear in all scales at once, those parts add up to the values themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitmill.core.axes import Grid
from bitmill.core.types import Quantized

_FRACTION = 1.25  # no whole number, and held by every float type that scales are stored in


def moving(grid: Grid) -> tuple[str, ...]:
    """The scales of a grid that move by parts: those stored as whole numbers are codes of their own."""
    one = torch.full((1, 1), _FRACTION)
    return tuple(name for name in grid.scales() if torch.equal(grid.stored_scale(name, one), one))


def slopes(
    quantized: Quantized, names: Sequence[str], linear: bool, values: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Derivatives of a loss by relative changes of the scales ``names``, each of its scale's shape.

    Args:
        linear: what :func:`all_linear` says of these scales.
        values: of ``quantized``, ``out in``.
        gradient: of the loss by them.
    """
    found: dict[str, Tensor] = {}
    rest = values
    for name in names:
        if linear and name == names[-1]:
            part = rest
        else:
            part = _doubled(quantized, (name,)) - values
            rest = rest - part
        found[name] = _summed(part * gradient, quantized.params[name], quantized)
    return found


def all_linear(quantized: Quantized, names: Sequence[str]) -> bool:
    """Whether values are linear in these scales together: doubled, they double to the last bit."""
    return torch.equal(_doubled(quantized, names), 2 * quantized.dense())


def _doubled(quantized: Quantized, names: Sequence[str]) -> Tensor:
    twice = {name: 2 * quantized.params[name] for name in names}
    return quantized.grid.decode(quantized.codes, {**quantized.params, **twice})


def _summed(parts: Tensor, scale: Tensor, quantized: Quantized) -> Tensor:
    """Sums over the weights that each scale serves."""
    rows, columns = scale.shape
    high, wide = (
        _run(length, count, block)
        for length, count, block in zip(parts.shape, (rows, columns), quantized.grid.block, strict=True)
    )
    parts = pad(parts, (0, columns * wide - parts.shape[1], 0, rows * high - parts.shape[0]))
    return parts.reshape(rows, high, columns, wide).sum((1, 3))


def _run(length: int, count: int, block: int) -> int:
    """Weights along one side that share a scale: blocks, the last of which may be short, or even runs."""
    return block if block and -(-length // block) == count else length // count
