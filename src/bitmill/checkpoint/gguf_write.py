"""The head of a GGUF file, to the byte, and where every tensor goes: known before any weight is read."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitmill.checkpoint.gguf import ALIGNMENT, ARRAY, MAGIC, STRING, padded
from bitmill.core.errors import Refused
from bitmill.core.types import Split

_VERSION = 3
_U16, _U32, _I32, _F32, _BOOL = 2, 4, 5, 6, 7
_MOST_PARTS = 65535


@dataclass(frozen=True)
class Planned:
    """One tensor to come.

    Attributes:
        name: llama.cpp's.
        shape: outermost first.
        type: ggml's type number.
        bytes_: stored size without padding.
        stacked: how many experts' parts follow one another in it; 0 where it is whole.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    bytes_: int
    stacked: int = 0


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


Part = tuple[dict[str, bytes], list[Planned]]


def divided(keys: Mapping[str, bytes], tensors: Sequence[Planned], split: Split) -> list[Part]:
    """Keys and tensors of every part, each as full as it may be; the first has all keys of the model.

    Raises:
        Refused: the keys, or one tensor, are more than a part may hold.
    """
    first = _size({**keys, **_split_keys(0, 0, 0)})
    rest = _size(_split_keys(0, 0, 0))
    if split.bytes_ and padded(first, ALIGNMENT) > split.bytes_:
        raise _too_small("the header", padded(first, ALIGNMENT), split)
    groups: list[list[Planned]] = [[]]
    header, data = first, 0
    for tensor in tensors:
        record, size = _record_size(tensor), padded(tensor.bytes_, ALIGNMENT)
        whole = padded(header + record, ALIGNMENT) + data + size
        if (split.bytes_ and whole > split.bytes_) or (split.tensors and len(groups[-1]) == split.tensors):
            groups.append([])
            header, data = rest, 0
            whole = padded(header + record, ALIGNMENT) + size
            if split.bytes_ and whole > split.bytes_:
                raise _too_small(f"tensor {tensor.name!r}", whole, split)
        groups[-1].append(tensor)
        header, data = header + record, data + size
    if len(groups) > _MOST_PARTS:
        raise Refused(f"{len(groups)} parts are more than GGUF can count", fix="allow larger parts")
    marks = [_split_keys(no, len(groups), len(tensors)) for no in range(len(groups))]
    return [({**(keys if no == 0 else {}), **marks[no]}, group) for no, group in enumerate(groups)]


def _split_keys(no: int, count: int, tensors: int) -> dict[str, bytes]:
    return {
        "split.no": struct.pack("<IH", _U16, no),
        "split.count": struct.pack("<IH", _U16, count),
        "split.tensors.count": struct.pack("<Ii", _I32, tensors),
    }


def _size(keys: Mapping[str, bytes]) -> int:
    """Bytes of a header before its records."""
    return 24 + sum(8 + len(name.encode()) + len(value) for name, value in keys.items())


def _record_size(tensor: Planned) -> int:
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def _too_small(what: str, needed: int, split: Split) -> Refused:
    return Refused(
        f"{what} alone makes a part of {needed} bytes; {split.bytes_} are allowed",
        fix=f"split-max-size={needed} or more",
    )


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
