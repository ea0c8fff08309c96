"""Causal attention in pieces of queries, each with the keys up to its last: half the products, and matrices
that stay near the processor. Scores are kept for the way back, so this is for windows, not for documents."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 128  # queries
MOST = 2**25  # scores, in all pieces together


def is_plainly_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether :func:`causal_attention` does what torch's attention is asked for, in bounded memory."""
    if not is_causal or attn_mask is not None or dropout_p or query.dim() != 4:
        return False
    batch, heads, tokens, _ = query.shape
    alike = enable_gqa or key.shape[1] == heads
    return alike and key.shape[2] == tokens and batch * heads * tokens**2 <= MOST


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Each query's mean of the values up to its own, weighted by the softmax of its products with their keys.

    Args:
        query: ``n heads T d``.
        key, value: ``n groups T d`` and ``n groups T e``; each group serves as many heads in a row.
        scale: of the products; ``d ** -0.5`` where none is given.

    Returns:
        ``n heads T e``.
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    each = heads // groups
    scaled = (query * (width**-0.5 if scale is None else scale)).view(batch, groups, each, tokens, width)
    pieces = []
    for first in range(0, tokens, PIECE):
        last = min(first + PIECE, tokens)
        length = last - first
        future = query.new_full((length, last), -torch.inf).triu_(first + 1)
        asked = scaled[..., first:last, :].reshape(batch, groups, each * length, width)
        scores = (asked @ key[:, :, :last].mT).view(batch, heads, length, last)
        weights = torch.softmax(scores + future, -1).view(batch, groups, each * length, last)
        pieces.append((weights @ value[:, :, :last]).view(batch, heads, length, value.shape[-1]))
    return torch.cat(pieces, 2)
