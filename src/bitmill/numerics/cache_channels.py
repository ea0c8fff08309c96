"""Channels of a head in two parts that are stored apart: those that stand out among the first tokens, and
the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bitmill.core.caches import CacheCode, Direct, Fields, Layout

ORDER = "order"


class Piece(Protocol):
    """What stores some of the channels."""

    @property
    def width(self) -> int:
        """How many."""

    @property
    def fields(self) -> Fields:
        """What is stored of them."""

    @property
    def basis(self) -> Tensor:
        """``coordinates width`` float32."""

    @property
    def direct(self) -> tuple[Direct, ...]:
        """How compiled loops read it."""

    def pack(self, x: Tensor) -> dict[str, Tensor]:
        """Of ``… width`` float32."""

    def unpack(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Coordinates in the basis."""


def pieces_layout(pieces: Sequence[Piece]) -> Layout:
    """What is stored of a head: of one piece, or of two with the order of its channels."""
    if len(pieces) == 1:
        return Layout(1, pieces[0].fields)
    fields = {f"{i}.{name}": kind for i, piece in enumerate(pieces) for name, kind in piece.fields.items()}
    head = sum(piece.width for piece in pieces)
    return Layout(1, fields, {ORDER: (torch.int16, (head,))})


def learned_order(x: Tensor) -> dict[str, Tensor]:
    """Channels of each head by their size among these tokens (``batch heads tokens head``), largest first."""
    size = x.to(torch.float32).square().mean((0, 2))
    return {ORDER: size.argsort(dim=-1, descending=True, stable=True).to(torch.int16)}


def pieces_code(pieces: Sequence[Piece], learned: Mapping[str, Tensor]) -> CacheCode:
    """What packs a :func:`pieces_layout`.

    Raises:
        ValueError: the order is none.
    """
    if len(pieces) == 1:
        return CacheCode(pieces[0].pack, pieces[0].unpack, pieces[0].basis, pieces[0].direct)
    widths = [piece.width for piece in pieces]
    order = learned[ORDER].to(torch.int64)
    every = torch.arange(sum(widths), device=order.device)
    if not torch.equal(order.sort(-1).values, every.expand_as(order)):
        raise ValueError("the order of the channels names some twice or none at all")
    whole = torch.block_diag(*(piece.basis for piece in pieces)).to(order.device)
    places = order.argsort(-1)
    basis = whole[:, places].movedim(1, 0).contiguous()

    def pack(x: Tensor) -> dict[str, Tensor]:
        index = order[:, None, :].expand(*x.shape[:-3], -1, x.shape[-2], -1)
        parts = x.gather(-1, index).split(widths, -1)
        packed = [piece.pack(part.contiguous()) for piece, part in zip(pieces, parts, strict=True)]
        return {f"{i}.{name}": value for i, found in enumerate(packed) for name, value in found.items()}

    def unpack(fields: Mapping[str, Tensor]) -> Tensor:
        found = [
            piece.unpack({name: fields[f"{i}.{name}"] for name in piece.fields})
            for i, piece in enumerate(pieces)
        ]
        return torch.cat(found, -1)

    return CacheCode(pack, unpack, basis, _direct(pieces))


def _direct(pieces: Sequence[Piece]) -> tuple[Direct, ...]:
    found: list[Direct] = []
    first = 0
    for i, piece in enumerate(pieces):
        for part in piece.direct:
            low = f"{i}.{part.low}" if part.low else ""
            codes, step = f"{i}.{part.codes}", f"{i}.{part.step}"
            found.append(replace(part, codes=codes, step=step, low=low, first=first + part.first))
        first += len(piece.basis)
    return tuple(found)
