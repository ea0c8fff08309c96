"""Whole numbers between the smallest and the largest value of a group: what most caches are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitmill.core.caches import CacheCode, Direct, Layout
from bitmill.numerics.bits import pack, packed_words, unpack

_TINY = 2.0**-24  # the smallest half-precision number: a group of equal values has some step


def token_layout(head: int, bits: int, group: int) -> Layout:
    """Groups of channels of one token: codes, then a step and a smallest value a group."""
    groups = head // group
    return Layout(
        1,
        {
            "codes": (torch.uint8, (packed_words(head, bits, 8),)),
            "step": (torch.float16, (groups,)),
            "low": (torch.float16, (groups,)),
        },
    )


def token_code(head: int, bits: int, group: int) -> CacheCode:
    """What packs a :func:`token_layout`."""

    def packed(x: Tensor) -> dict[str, Tensor]:
        runs = x.unflatten(-1, (-1, group))
        codes, step, low = _rounded(runs, -1, bits)
        return {"codes": pack(codes.flatten(-2), bits, 8), "step": step.squeeze(-1), "low": low.squeeze(-1)}

    def unpacked(fields: Mapping[str, Tensor]) -> Tensor:
        codes = unpack(fields["codes"], bits, head).unflatten(-1, (-1, group))
        return _values(codes, fields["step"].unsqueeze(-1), fields["low"].unsqueeze(-1)).flatten(-2)

    levels = torch.arange(2**bits, dtype=torch.float32)
    direct = Direct("codes", "step", "low", bits, levels, group, 0, head)
    return CacheCode(packed, unpacked, direct=(direct,))


def channel_layout(head: int, bits: int, tokens: int) -> Layout:
    """Runs of tokens of one channel: codes token by token, then a step and a smallest value a channel."""
    return Layout(
        tokens,
        {
            "codes": (torch.uint8, (tokens, packed_words(head, bits, 8))),
            "step": (torch.float16, (head,)),
            "low": (torch.float16, (head,)),
        },
    )


def channel_code(head: int, bits: int, tokens: int) -> CacheCode:
    """What packs a :func:`channel_layout`."""

    def packed(x: Tensor) -> dict[str, Tensor]:
        codes, step, low = _rounded(x.unflatten(-2, (-1, tokens)), -2, bits)
        return {"codes": pack(codes, bits, 8), "step": step.squeeze(-2), "low": low.squeeze(-2)}

    def unpacked(fields: Mapping[str, Tensor]) -> Tensor:
        codes = unpack(fields["codes"], bits, head)
        return _values(codes, fields["step"].unsqueeze(-2), fields["low"].unsqueeze(-2)).flatten(-3, -2)

    levels = torch.arange(2**bits, dtype=torch.float32)
    return CacheCode(packed, unpacked, direct=(Direct("codes", "step", "low", bits, levels, 0, 0, head),))


def _rounded(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes against what is stored: step and smallest value are rounded to half precision before."""
    most = torch.finfo(torch.float16).max
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    base = low.clamp(-most, most).to(torch.float16)
    step = ((high - base.to(x.dtype)) / (2**bits - 1)).clamp(_TINY, most).to(torch.float16)
    codes = ((x - base.to(x.dtype)) / step.to(x.dtype)).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), step, base


def _values(codes: Tensor, step: Tensor, low: Tensor) -> Tensor:
    return codes.to(torch.float32).mul_(step.to(torch.float32)).add_(low.to(torch.float32))
