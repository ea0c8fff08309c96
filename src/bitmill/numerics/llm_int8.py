"""LLM.int8(): rows of weights and rows of activations in 8-bit integers, with the few loud features of the
activations kept in 16 bits (Dettmers et al., arXiv 2208.07339).

The arithmetic is that of bitsandbytes in inference, operation by operation, so that a figure measured here is
the one its users get: activations pass through half precision, its constant for ``1/127²`` is 2 parts in
100,000 too large, and the weights of loud features are the 8-bit ones, decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.core.inputs import LOUD

LEVELS = 127
"""Codes are ``-127 … 127``."""

THRESHOLD = LOUD
"""A feature in which any activation is at least so large is kept out of the integers."""

_UNIT = 7.874015718698502e-3
_UNIT_SQUARED = 6.200124e-05
_EXACT = 1024  # products of codes that single precision adds up without rounding: 1024 · 127² < 2^24


def encode(values: Tensor, absmax: Tensor) -> Tensor:
    """Codes (int8) of ``values``, ``… n`` in any float type, in rows whose largest magnitude is ``absmax``,
    ``… 1`` float32."""
    inverse = torch.where(absmax == 0, 0.0, LEVELS / absmax)
    return (
        (values * inverse.clamp(max=torch.finfo(torch.float32).max)).round_().clamp_(-127, 127).to(torch.int8)
    )


def decode(codes: Tensor, absmax: Tensor) -> Tensor:
    """Float32 values of ``codes``: inverse of :func:`encode`."""
    return (codes * absmax).mul_(_UNIT)


def quantize_rows(x: Tensor, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor, Tensor]:
    """Activations as 8-bit rows, and the features that are too loud for them.

    Which features are loud depends on all the rows that come together: batches are not independent.

    Args:
        x: ``tokens in``, any float type.
        threshold: 0 leaves nothing out.

    Returns:
        Codes ``tokens in`` (0 in loud features), largest magnitudes ``tokens`` float32 of the rest of each
        row, and the indices of loud features.
    """
    half = x.to(torch.float16)
    loud = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    features = loud.any(0).nonzero().reshape(-1)
    absmax = half.masked_fill(loud, 0).abs().amax(1).to(torch.float32)
    codes = encode(half.masked_fill(loud, 0), absmax[:, None])
    codes[:, features] = 0
    return codes, absmax, features


def rounded(x: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """``x`` (``… tokens in``) as :func:`matmul` sees it, each sequence of tokens a batch of its own."""
    if x.dim() > 2:
        return torch.stack([rounded(part, threshold) for part in x])
    codes, absmax, loud = quantize_rows(x, threshold)
    values = decode(codes, absmax[:, None]).to(x.dtype)
    values[:, loud] = x[:, loud]
    return values


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ`` of int8 matrices ``m k`` and ``n k``: ``m n`` int32, exact."""
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for first in range(0, a.shape[1], _EXACT):
        left, right = a[:, first : first + _EXACT], b[:, first : first + _EXACT]
        total += (left.to(torch.float32) @ right.to(torch.float32).T).to(torch.int32)
    return total


def matmul(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None, threshold: float = THRESHOLD
) -> Tensor:
    """``x Wᵀ + bias`` by mixed decomposition.

    Args:
        x: ``… in``, any float type; the leading dimensions are one batch.
        codes: the weight, ``out in`` int8.
        absmax: largest magnitude of each of its rows, ``out`` float32.
        bias: ``out``.
        threshold: see :data:`THRESHOLD`; 0 keeps nothing out.

    Returns:
        ``… out`` in the type of ``x``.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows, row_absmax, loud = quantize_rows(flat, threshold)
    out = product(rows, codes) * (row_absmax[:, None] * absmax[None]) * _UNIT_SQUARED
    if bias is not None:
        out += bias
    out = out.to(x.dtype)
    if len(loud):
        out = out.addmm(flat[:, loud], decode(codes[:, loud], absmax[:, None]).to(x.dtype).T)
    return out.reshape(*x.shape[:-1], codes.shape[0])
