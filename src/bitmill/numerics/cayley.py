"""Descent among rotations: steps along the Cayley transform of a skew gradient, which never leave them (Wen
and Yin, "A feasible method for optimization with orthogonality constraints", 2013; Li et al., "Efficient
Riemannian optimization on the Stiefel manifold via the Cayley transform", arXiv 2002.01113).

The linear system of a step is solved, in float64, rather than iterated: the factor is small beside the model
that gave the gradient, and what comes out is orthogonal to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1e-8


def stepped(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step downhill.

    Args:
        rotation: blocks ``m n n`` of an orthogonal matrix, float64.
        gradient: of the loss by it, as if its entries were free.
        rate: of descent; a step that would turn a direction by more than a right angle or so is shortened, as
            the columns of the skew matrix are summed to at most 1.

    Returns:
        Blocks of the same shape, orthogonal as ``rotation`` is.
    """
    pull = gradient.to(rotation) @ rotation.mT
    skew = (pull.mT - pull) / 2
    norm = skew.abs().sum(-2).amax(-1)[:, None, None]
    half = skew * torch.clamp(1 / (norm + _SMALL), max=rate) / 2
    unit = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    made: Tensor = torch.linalg.solve(unit - half, (unit + half) @ rotation)
    return made.contiguous()  # as it comes back from a file: the order of sums goes by it


def off(rotation: Tensor) -> float:
    """How far blocks are from being orthogonal: the largest entry of ``RᵀR - 1``."""
    unit = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return float((rotation.mT @ rotation - unit).abs().max())


def turned(rows: Tensor, rotation: Tensor) -> Tensor:
    """``rows R``, ``… width``, with the blocks ``m n n`` of ``R`` in turn; a single one serves every run of
    ``n`` channels."""
    rotation = rotation.to(rows)
    runs = rows.unflatten(-1, (-1, rotation.shape[-1]))
    if len(rotation) == 1:
        return (runs @ rotation[0]).flatten(-2)
    return (runs.unsqueeze(-2) @ rotation).flatten(-3)
