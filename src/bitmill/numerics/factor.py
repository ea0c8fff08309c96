"""The triangular factor of an inverse Hessian that error feedback runs on (Frantar et al., arXiv 2210.17323).

``H⁻¹ = Uᵀ U`` with ``U`` upper triangular. Instead of inverting ``H`` and factoring the inverse, ``H`` is
factored from its last row upwards, ``H = V Vᵀ`` with ``V`` upper, and ``U = V⁻¹``: one Cholesky
factorization, one triangular solve, and no inverse whose rounding could cost positive definiteness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.core.errors import Unsolvable

LADDER = (1.0, 2.0, 10.0, 20.0, 100.0)
"""Multiples of the asked damping that are tried in turn."""


@dataclass(frozen=True, eq=False)
class Factor:
    """An upper triangular ``U`` with ``Uᵀ U = (H / mean + damping · I)⁻¹``.

    Attributes:
        upper: ``in in`` float32.
        damping: the fraction that was used.
        dead: channels that no calibration token excited, ``in`` bool; nothing but damping is
            known of them, and they are uncoupled from all others.
        wide: whether float32 was not enough.
        mean: ``mean(diag H)`` over the channels that are not dead, by which ``H`` was divided.
    """

    upper: Tensor
    damping: float
    dead: Tensor
    wide: bool
    mean: float


def upper_inverse_factor(gram: Tensor, damp: float, where: str, order: Tensor | None = None) -> Factor:
    """Factor of the inverse of a damped Gram matrix.

    Args:
        gram: ``in in``, symmetric, any positive multiple of the Hessian; left as it is.
        damp: fraction of the mean of the diagonal that is added to it; raised up to a hundredfold when the
            matrix is not positive definite otherwise.
        where: named in errors.
        order: rows and columns to take, in this order; all as they are when None.

    Raises:
        Unsolvable: the Gram holds NaN or infinity, is all zeros, or stays indefinite.
    """
    _check(gram, where)
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].double().mean())
    if order is None:
        order = torch.arange(len(gram), device=gram.device)
    dead = dead[order]
    backwards = order.flip(0)
    for rung in LADDER:
        for dtype in (torch.float32, torch.float64):
            # One expression, so that nothing here holds on to a matrix that is no longer needed.
            upper = _factor(_damped(gram, backwards, dead.flip(0), mean, damp * rung, dtype))
            if upper is not None:
                return Factor(upper, damp * rung, dead, dtype == torch.float64, mean)
    raise Unsolvable(
        f"the Gram matrix of {len(diagonal)} inputs is not positive definite even with damping "
        f"{damp * LADDER[-1]:g}: it was damaged, or holds far fewer independent samples than inputs",
        where=where,
        fix="calibrate on more and different text, or ask for more damping, e.g. gptq(damp=0.1)",
    )


def _damped(
    gram: Tensor, order: Tensor, dead: Tensor, mean: float, damping: float, dtype: torch.dtype
) -> list[Tensor]:
    """The Hessian in some order, alone in a list: who takes it out is its only owner."""
    hessian = gram.index_select(0, order).index_select(1, order).to(dtype).div_(mean)
    if bool(dead.any()):
        hessian[dead, :] = 0
        hessian[:, dead] = 0
    hessian.diagonal().add_(damping)
    return [hessian]


def _factor(backwards: list[Tensor]) -> Tensor | None:
    """``U`` with ``Uᵀ U = H⁻¹``, float32, from ``H`` last row first; None where the factorization breaks
    down. Besides the input's, two matrices of its size are alive at most."""
    lower, info = torch.linalg.cholesky_ex(backwards.pop())
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    upper = inverse.flip(0, 1).to(torch.float32)
    return upper if bool(torch.isfinite(upper.diagonal()).all() and torch.isfinite(upper.sum())) else None


def _check(gram: Tensor, where: str) -> None:
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix is square, not {tuple(gram.shape)}")
    if not bool(torch.isfinite(gram).all()):
        raise Unsolvable(
            "the Gram matrix of the inputs holds NaN or infinity: an activation overflowed",
            where=where,
            fix="calibrate in float32 (--device cpu)",
        )
    if not bool((gram.diagonal() > 0).any()):
        raise Unsolvable(
            "no calibration token reached this layer: its Gram matrix is all zeros",
            where=where,
            fix="calibrate on more text, or use a solver that needs no calibration (nearest, hqq)",
        )
