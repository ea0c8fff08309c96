"""Dense bit packing: a little-endian stream of fixed-width codes that crosses byte and word borders.

Code ``i`` occupies bits ``i·b … i·b + b - 1`` of the stream, least significant first. This is the stream of
GPTQ along its packed axis, of compressed-tensors' ``pack-quantized`` and of MLX, for every width.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_WIDTHS = (*range(1, 9), 16)


def packed_words(n: int, bits: int, word: int = 32) -> int:
    """Words of ``word`` bits that ``n`` codes of ``bits`` bits fill, the last one padded with zero bits."""
    return -(-n * bits // word)


def pack(codes: Tensor, bits: int, word: int = 32) -> Tensor:
    """The stream of ``codes`` along the last axis.

    Args:
        codes: ``… n``, any integer type, every value in ``0 … 2**bits - 1``.
        bits: width of a code: 1 to 8, or 16.
        word: width of a word of the result: 8 (uint8), 16, 32 or 64 (signed, two's complement).

    Returns:
        ``… ceil(n·bits/word)`` words.

    Raises:
        ValueError: a width that is not supported, or a code that does not fit (it would bleed into its
            neighbour).
    """
    _check(bits, word)
    n = codes.shape[-1]
    lead, words = codes.shape[:-1], packed_words(n, bits, word)
    if codes.numel() == 0:
        return torch.zeros(*lead, words, dtype=_WORDS[word], device=codes.device)
    if codes.dtype != torch.uint8 or bits < 8:
        low, high = (int(v) for v in codes.aminmax())
        if low < 0 or high >> bits:
            raise ValueError(f"codes span {low} to {high}; {bits} bits hold 0 to {2**bits - 1}")
    octets = _halves(codes) if bits == 16 else _merge(codes.to(torch.uint8), bits)
    length = words * word // 8
    whole = torch.zeros(*lead, length, dtype=torch.uint8, device=codes.device)
    used = min(length, octets.shape[-1])
    whole[..., :used] = octets[..., :used]
    return whole.view(_WORDS[word])


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The first ``n`` codes of each stream in ``words`` (``… m``, any integer type): ``… n`` uint8 (int32 for
    16 bits). Inverse of :func:`pack` for the word width of ``words``.

    Raises:
        ValueError: a width that is not supported, or a stream too short to hold ``n`` codes.
    """
    _check(bits, 8)
    if n == 0:
        dtype = torch.int32 if bits == 16 else torch.uint8
        return torch.zeros(*words.shape[:-1], 0, dtype=dtype, device=words.device)
    octets = words.contiguous().view(torch.uint8)
    if octets.shape[-1] * 8 < n * bits:
        raise ValueError(f"{octets.shape[-1] * 8} bits cannot hold {n} codes of {bits} bits")
    if bits == 16:
        pairs = octets[..., : 2 * n].clone(memory_format=torch.contiguous_format).view(torch.int16)
        return pairs.to(torch.int32) & 0xFFFF
    if bits == 8:
        return octets[..., :n].clone()
    groups = -(-n // 8)
    missing = groups * bits - octets.shape[-1]
    if missing > 0:
        octets = torch.nn.functional.pad(octets, (0, missing))
    lead = octets.shape[:-1]
    octets = octets[..., : groups * bits].reshape(*lead, groups, bits)
    codes = torch.zeros(*lead, groups, 8, dtype=torch.uint8, device=words.device)
    for j, k, shift in _overlaps(bits):
        part = octets[..., k]
        codes[..., j] |= part >> -shift if shift < 0 else part << shift
    codes &= 2**bits - 1
    return codes.reshape(*lead, groups * 8)[..., :n].contiguous()


def _merge(codes: Tensor, bits: int) -> Tensor:
    """Bytes of the stream of uint8 ``codes``: every 8 codes fill exactly ``bits`` bytes."""
    if bits == 8:
        return codes
    lead, n = codes.shape[:-1], codes.shape[-1]
    if n % 8:
        codes = torch.nn.functional.pad(codes, (0, -n % 8))
    codes = codes.reshape(*lead, -1, 8)
    octets = torch.zeros(*codes.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for j, k, shift in _overlaps(bits):
        part = codes[..., j]
        octets[..., k] |= part << -shift if shift < 0 else part >> shift
    return octets.reshape(*lead, -1)


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """``(code, byte, shift)`` wherever code ``j`` and byte ``k`` of a run of 8 codes share bits; ``shift`` is
    the position of the byte's lowest bit inside the code (negative: the code starts inside the byte)."""
    return [
        (j, k, 8 * k - j * bits)
        for j in range(8)
        for k in range(bits)
        if 8 * k < (j + 1) * bits and j * bits < 8 * (k + 1)
    ]


def _halves(codes: Tensor) -> Tensor:
    """Little-endian bytes of 16-bit codes."""
    wide = codes.to(torch.int32)
    return torch.stack((wide & 0xFF, wide >> 8), dim=-1).to(torch.uint8).flatten(-2)


def _check(bits: int, word: int) -> None:
    if bits not in _WIDTHS:
        raise ValueError(f"{bits} bits: codes are 1 to 8 or 16 bits wide")
    if word not in _WORDS:
        raise ValueError(f"{word} bits: words are 8, 16, 32 or 64 bits wide")
