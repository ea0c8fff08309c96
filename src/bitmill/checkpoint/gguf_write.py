"""The head of a GGUF file, to the byte, and where every tensor goes: known before any weight is read."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitmill.checkpoint.gguf import ALIGNMENT, ARRAY, MAGIC, STRING, padded

_VERSION = 3
_U32, _I32, _F32, _BOOL = 4, 5, 6, 7


@dataclass(frozen=True)
class Planned:
    """One tensor to come.

    Attributes:
        name: llama.cpp's.
        shape: outermost first.
        type: ggml's type number.
        bytes_: stored size without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    bytes_: int


def encoded(value: Any) -> bytes:
    """A value with its type, as llama.cpp wants it: u32, f32, bool, string; arrays of string, i32, f32."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    items = list(value)
    if items and isinstance(items[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(items)) + b"".join(_string(item) for item in items)
    kind, letter = (_F32, "f") if items and isinstance(items[0], float) else (_I32, "i")
    return struct.pack(f"<IIQ{len(items)}{letter}", ARRAY, kind, len(items), *items)


def head(keys: Mapping[str, bytes], tensors: Sequence[Planned]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes padded to where the data starts, every tensor's offset in the file, and the file's size.

    Args:
        keys: key to typed value, see :func:`encoded`; written in this order.
        tensors: in the order of their data, which is tiled at multiples of 32 bytes without gaps.
    """
    pieces = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(keys))]
    for name, value in keys.items():
        pieces += [_string(name), value]
    offsets: dict[str, int] = {}
    running = 0
    for tensor in tensors:
        rank = len(tensor.shape)
        pieces.append(_string(tensor.name))
        pieces.append(struct.pack(f"<I{rank}qIQ", rank, *reversed(tensor.shape), tensor.type, running))
        offsets[tensor.name] = running
        running += padded(tensor.bytes_, ALIGNMENT)
    header = b"".join(pieces)
    start = padded(len(header), ALIGNMENT)
    return header.ljust(start, b"\0"), {n: start + at for n, at in offsets.items()}, start + running


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
