"""Attention over a packed cache: scores and sums are taken a piece of the cache at a time, in the basis it is
stored in, so that never more than one piece is unpacked. One of transformers' attention functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from bitmill.core.caches import CacheCode
from bitmill.numerics.cache_kernels import MOST_QUERIES
from bitmill.numerics.cache_loops import Loops, loops_for
from bitmill.run.store import Piece, Store

NAME = "bitmill-packed"
"""What transformers calls it, in ``config._attn_implementation``."""

_SCORES = 1 << 25
"""Numbers of the largest matrix of scores; longer prompts go in shares of their queries."""


@final
class Stored:
    """The keys or the values that an attention is to see, still packed.

    Attributes:
        shape: ``batch heads tokens head``, as if they were a tensor.
        dtype, device: of what was stored last.
    """

    def __init__(self, store: Store, seen: int, like: Tensor, piece: int, settle: Callable[[], None]) -> None:
        self._store, self._seen, self._piece = store, seen, piece
        self.shape = torch.Size((*like.shape[:2], seen, like.shape[-1]))
        self.dtype, self.device = like.dtype, like.device
        self.settle = settle

    @property
    def code(self) -> CacheCode:
        """What packed them."""
        return self._store.code

    def pieces(self, *, packed: bool = True) -> Iterator[Piece]:
        """All of them, a piece at a time; ``packed=False`` leaves out what is."""
        return self._store.pieces(self._store.kept - self._seen, self._piece, packed=packed)

    @property
    def whole(self) -> tuple[Loops, Mapping[str, Tensor], int] | None:
        """Compiled loops, all packed fields and how many of their tokens there are, where there are loops
        that read those, and none of them is out of sight."""
        store, loops = self._store, loops_for(self.device)
        if store.kept > self._seen or loops is None or not loops.reads(self.code.direct):
            return None
        there = store.whole
        return None if there is None else (loops, *there)


def attend_packed(model: PreTrainedModel) -> None:
    """Let ``model`` read packed caches in place. Caches of other kinds, and none, work as before."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Stored,
    value: Tensor | Stored,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What every query (``batch heads queries head``) sees: ``batch queries heads head``, and no weights.

    Args:
        key, value: packed, or plain tensors.
        attention_mask: what may be seen (boolean), or what is added to scores; None: all, and of several
            queries each what is not behind it.
        softcap: scores go through ``softcap · tanh(score / softcap)``.
        s_aux: one more score a head, of a token that says nothing (attention sinks).
    """
    heads, count, seen = key.shape[1], query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.to(torch.float32).mul(scale).unflatten(1, (heads, -1))  # batch heads group queries head
    causal = count > 1 and (_causal(module) if is_causal is None else is_causal)
    share = max(_SCORES // (query.shape[0] * query.shape[1] * seen), 1)
    found = []
    for start in range(0, count, share):
        part = grouped[..., start : start + share, :]
        scores = _scores(part, key)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        stop = start + part.shape[-2]
        if attention_mask is not None:
            scores = _masked(scores, attention_mask[..., start:stop, :seen], heads)
        elif causal:
            scores = _behind(scores, seen - count + start)
        weights = _softmax(scores, s_aux)
        if dropout:
            weights = torch.nn.functional.dropout(weights, dropout, module.training)
        found.append(_sums(weights, value))
    out = found[0] if len(found) == 1 else torch.cat(found, -2)
    for stored in (key, value):
        if isinstance(stored, Stored):
            stored.settle()
    return out.flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous(), None


def _in_place(stored: Tensor | Stored, queries: int) -> tuple[Loops, Mapping[str, Tensor], int] | None:
    """What compiled loops read, where these many queries are for them."""
    return stored.whole if isinstance(stored, Stored) and queries <= MOST_QUERIES else None


def _pieces(stored: Tensor | Stored, packed: bool) -> Iterator[Piece]:
    if isinstance(stored, Stored):
        return stored.pieces(packed=packed)
    return iter((Piece(0, stored.to(torch.float32), False),))


def _scores(queries: Tensor, keys: Tensor | Stored) -> Tensor:
    """``batch heads group queries tokens`` of queries ``batch heads group queries head``."""
    flat = queries.flatten(2, 3)
    turned = keys.code.turned(flat) if isinstance(keys, Stored) else flat
    packed = _in_place(keys, flat.shape[2])
    found = []
    if packed is not None and isinstance(keys, Stored):
        loops, fields, tokens = packed
        found.append(loops.scores(keys.code.direct, fields, tokens, turned.contiguous()))
    found += [(turned if p.packed else flat) @ p.coordinates.mT for p in _pieces(keys, packed is None)]
    whole = found[0] if len(found) == 1 else torch.cat(found, -1)
    return whole.unflatten(2, queries.shape[2:4])


def _sums(weights: Tensor, values: Tensor | Stored) -> Tensor:
    """``batch heads group queries head``: weighted sums, taken in the basis that values are stored in."""
    flat = weights.flatten(2, 3)
    packed: Tensor | None = None
    plain: Tensor | None = None
    there = _in_place(values, flat.shape[2])
    if there is not None and isinstance(values, Stored):
        loops, fields, tokens = there
        packed = loops.sums(values.code.direct, fields, flat[..., :tokens])
    for piece in _pieces(values, there is None):
        tokens = piece.coordinates.shape[-2]
        part = flat[..., piece.first : piece.first + tokens] @ piece.coordinates
        if piece.packed:
            packed = part if packed is None else packed + part
        else:
            plain = part if plain is None else plain + part
    if packed is not None and isinstance(values, Stored):
        back = values.code.back(packed)
        plain = back if plain is None else plain + back
    if plain is None:
        raise ValueError("there are no values to sum")
    return plain.unflatten(2, weights.shape[2:4])


def _causal(module: torch.nn.Module) -> bool:
    return bool(getattr(module, "is_causal", True))


def _masked(scores: Tensor, mask: Tensor, heads: int) -> Tensor:
    mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (heads, -1))
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask.to(scores.dtype)


def _behind(scores: Tensor, first: int) -> Tensor:
    """Scores without what comes after each query; the first query's own token is at place ``first``."""
    own = torch.arange(scores.shape[-2], device=scores.device) + first
    places = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(places[None, :] > own[:, None], torch.finfo(scores.dtype).min)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return scores.softmax(-1)
    silent = sinks.to(scores.dtype).reshape(1, scores.shape[1], scores.shape[2], 1, 1)
    with_silent = torch.cat((scores, silent.expand(*scores.shape[:-1], 1)), -1)
    return with_silent.softmax(-1)[..., :-1]
