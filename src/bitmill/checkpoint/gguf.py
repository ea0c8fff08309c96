"""The GGUF container, read lazily and suspiciously: every count, length and offset is checked against the
bytes that are really there before anything is allocated for it.

Byte layout (little endian, versions 2 and 3): magic, version, counts, key-value pairs, tensor records,
padding, data. A file split as ``name-00001-of-00003.gguf`` is read as one, whichever of its parts is named.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from bitmill.core.errors import BadFile

MAGIC = b"GGUF"
ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
"""Value type ids to :mod:`struct` letters."""

_MOST_KEYS = 1 << 16
_MOST_TENSORS = 1 << 20
_MOST_ELEMENTS = (
    1 << 23
)  # of all arrays together; the largest vocabularies hold a quarter of a million tokens
_LONGEST_STRING = 64 << 20
_LONGEST_NAME = 63  # llama.cpp keeps names in 64 bytes with a terminator
_LARGEST = 1 << 63
_SMALLEST_KEY, _SMALLEST_TENSOR = 13, 24  # bytes of the shortest possible records
_SPLIT = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")
_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor record.

    Attributes:
        name: as in the file (``blk.0.attn_q.weight``).
        shape: outermost first, as torch has it (the file stores the reverse).
        type: ggml's storage type.
        offset: of the data in ``part``, from the start of that file.
        bytes_: stored size without padding.
        part: which file of a split model.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    bytes_: int
    part: int = 0


class Cursor:
    """Reads primitives at a moving position and refuses to pass the end of the file."""

    def __init__(self, data: mmap.mmap | bytes, path: Path, size: int | None = None) -> None:
        self.data, self.path, self.at = data, path, 0
        self.size = len(data) if size is None else size
        self.elements = 0

    def bad(self, what: str, at: int | None = None, fix: str | None = None) -> BadFile:
        place = self.at if at is None else at
        return BadFile(what, where=f"{self.path}, byte {place}", fix=fix)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self.bad(
                f"the file ends inside {what}: {count} bytes are announced, {self.size - self.at} are left",
                fix="the file is truncated or damaged; download it again",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter), what))[0]

    def string(self, what: str, longest: int = _LONGEST_STRING) -> str:
        start = self.at
        length = self.number("Q", f"the length of {what}")
        if length > longest:
            raise self.bad(f"{what} claims to be {length} bytes long; at most {longest} make sense", start)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8 ({error.reason})", start) from error

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            raise self.bad(f"{what} has value type {kind}, which GGUF does not define")
        return self.number(SCALARS[kind], what)

    def array(self, what: str) -> list[Any]:
        start = self.at
        kind = self.number("I", f"the element type of {what}")
        count = self.number("Q", f"the length of {what}")
        if kind == ARRAY:
            raise self.bad(f"{what} is an array of arrays, which no GGUF reader accepts", start)
        if kind != STRING and kind not in SCALARS:
            raise self.bad(f"{what} has elements of type {kind}, which GGUF does not define", start)
        smallest = 8 if kind == STRING else struct.calcsize("<" + SCALARS[kind])
        if count * smallest > self.size - self.at:
            raise self.bad(f"{what} announces {count} elements, more than the file has bytes for", start)
        self.elements += count
        if self.elements > _MOST_ELEMENTS:
            raise self.bad(f"the arrays up to {what} hold {self.elements} elements, an absurd number", start)
        if kind == STRING:
            return [self.string(f"an element of {what}") for _ in range(count)]
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", self.take(count * smallest, what)))


@dataclass(frozen=True, eq=False)
class _Part:
    """One file of a model: its map, keys (value and exact bytes), tensor records."""

    path: Path
    data: mmap.mmap
    version: int
    alignment: int
    header_bytes: int
    keys: Mapping[str, Any]
    raw_keys: Mapping[str, bytes]
    tensors: Mapping[str, GgufTensor]


class GgufFile:
    """A GGUF file or set of split files, mapped read-only.

    Attributes:
        path: the first file.
        metadata: key to value: numbers, strings, lists.
        raw_keys: key to its exact bytes in the file, from the value type on: what a copy writes.
        tensors: name to record, in file order.

    Raises:
        BadFile: anything that does not add up, with file and byte offset.
    """

    def __init__(self, path: Path) -> None:
        paths = _part_paths(_first_part(Path(path)))
        self.path = paths[0]
        self._parts = tuple(_parse(p, index) for index, p in enumerate(paths))
        first = self._parts[0]
        self.version, self.alignment = first.version, first.alignment
        self.metadata: Mapping[str, Any] = first.keys
        self.raw_keys: Mapping[str, bytes] = first.raw_keys
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(self._merged())

    def _merged(self) -> dict[str, GgufTensor]:
        merged: dict[str, GgufTensor] = {}
        count = len(self._parts)
        for index, part in enumerate(self._parts):
            said = part.keys.get("split.count", 0), part.keys.get("split.no", 0)
            if count == 1 and said not in ((0, 0), (1, 0)):
                raise BadFile(
                    f"this is part {said[1]} of {said[0]}, counted from 0, and not named so",
                    where=str(part.path),
                    fix="give it its name back, <stem>-00001-of-0000N.gguf, and put all parts in one folder",
                )
            if count > 1 and said != (count, index):
                raise BadFile(
                    f"this part says it is number {said[1]} of {said[0]}; its name says {index} of {count}",
                    where=str(part.path),
                )
            twice = merged.keys() & part.tensors.keys()
            if twice:
                raise BadFile(f"tensor {min(twice)!r} is in two parts", where=str(part.path))
            merged.update(part.tensors)
        if count > 1 and self.metadata.get("split.tensors.count", len(merged)) != len(merged):
            announced = self.metadata["split.tensors.count"]
            raise BadFile(
                f"the parts hold {len(merged)} tensors together; {announced} are announced",
                where=str(self.path),
            )
        return merged

    @property
    def bytes_(self) -> int:
        """Size of all parts."""
        return sum(len(part.data) for part in self._parts)

    def record(self, name: str) -> GgufTensor:
        """The tensor called ``name``.

        Raises:
            BadFile: there is none.
        """
        if name not in self.tensors:
            raise BadFile(f"there is no tensor called {name!r}", where=str(self.path))
        return self.tensors[name]

    def raw(self, name: str | GgufTensor) -> np.ndarray:
        """The stored bytes of a tensor, or of a part of one: a read-only uint8 view of the mapped file."""
        tensor = self.record(name) if isinstance(name, str) else name
        data = self._parts[tensor.part].data
        return np.frombuffer(data, dtype=np.uint8, count=tensor.bytes_, offset=tensor.offset)

    def dense(self, name: str | GgufTensor) -> Tensor:
        """Values of a tensor, or of a part of one: float16 and bfloat16 as stored, all else float32."""
        tensor, raw = self.record(name) if isinstance(name, str) else name, self.raw(name)
        kind = tensor.type.name
        if kind in _DENSE:
            return torch.from_numpy(raw.copy()).view(_DENSE[kind]).reshape(tensor.shape)
        try:
            values = dequantize(
                raw.reshape(-1, tensor.bytes_ // max(prod(tensor.shape[:-1]), 1)), tensor.type
            )
        except NotImplementedError as error:
            raise BadFile(
                f"tensor {tensor.name!r} is stored as {kind}: it cannot be decoded here",
                where=str(self.path),
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(tensor.shape)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the sizes, the whole headers, and 4 KiB at the start, middle and end of every tensor.

        Hashing all of a 40 GB file would take longer than quantizing a block of it; a different quantization
        of the same model differs in every sampled piece.
        """
        found = hashlib.sha256()
        for part in self._parts:
            found.update(struct.pack("<Q", len(part.data)))
            found.update(part.data[: part.header_bytes])
            for t in part.tensors.values():
                last = t.offset + t.bytes_
                for at in (t.offset, t.offset + t.bytes_ // 2, max(t.offset, last - 4096)):
                    found.update(part.data[at : min(at + 4096, last)])
        return found.hexdigest()


def first_parts(folder: Path) -> list[Path]:
    """The files of a folder that are, by name, the first of several."""
    return sorted(p for p in folder.glob("*-00001-of-?????.gguf") if _SPLIT.match(p.name))


def _first_part(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = first_parts(path)
    if len(found) != 1:
        raise BadFile(
            f"{len(found)} models in parts are in this folder", where=str(path), fix="name a part of one"
        )
    return found[0]


def _part_paths(path: Path) -> list[Path]:
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["part"]) <= count:
        raise BadFile(f"{path.name!r} is part {int(match['part'])} of {count}", where=str(path))
    paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    present = {p.name for p in path.parent.iterdir()}
    missing = [p.name for p in paths if p.name not in present or not p.is_file()]
    if missing:
        raise BadFile(
            f"{len(missing)} of the {count} parts of this model are missing, the first is {missing[0]}",
            where=str(path.parent),
            fix="put all parts in one folder",
        )
    return paths


def planned_file(head: bytes, bytes_: int) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
    """Keys and tensors of a file to come, from its head and its size; the head is one of ours."""
    _, _, _, keys, _, tensors = _read_head(Cursor(head, Path("planned.gguf"), bytes_), 0)
    return keys, tensors


def parse_header(data: bytes, path: Path) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
    """Keys and tensors of a whole file that is in memory, verified as any file is.

    Raises:
        BadFile: anything does not add up, with the byte it was met at.
    """
    _, _, _, keys, _, tensors = _read_head(Cursor(data, path), 0)
    return keys, tensors


def _parse(path: Path, index: int) -> _Part:
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise BadFile("the file is too short to hold a GGUF header", where=str(path))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadFile(f"cannot read the file: {error.strerror}", where=str(path)) from error
    return _Part(path, data, *_read_head(Cursor(data, path), index))


_Head = tuple[int, int, int, Mapping[str, Any], Mapping[str, bytes], Mapping[str, GgufTensor]]
"""Version, alignment, bytes, keys, their exact bytes, tensors."""


def _read_head(cursor: Cursor, index: int) -> _Head:
    """Everything before the data, verified; ``index`` is of the part of a split file."""
    version, tensor_count, key_count = _preamble(cursor)
    keys, raw = _read_keys(cursor, key_count)
    alignment = _alignment(cursor, keys, raw)
    records = [_read_record(cursor) for _ in range(tensor_count)]
    header_bytes = cursor.at
    tensors = _place(cursor, records, alignment, index)
    return version, alignment, header_bytes, MappingProxyType(keys), MappingProxyType(raw), tensors


def _preamble(cursor: Cursor) -> tuple[int, int, int]:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise cursor.bad(f"the file starts with {magic!r}, not with {MAGIC!r}: this is not a GGUF file", 0)
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.bad("the file is big endian", 4, fix="convert it with gguf-convert-endian first")
    if version not in (2, 3):
        raise cursor.bad(f"GGUF version {version} is not one of 2, 3", 4)
    tensors = cursor.number("Q", "the tensor count")
    keys = cursor.number("Q", "the key count")
    left = cursor.size - cursor.at
    if keys > min(_MOST_KEYS, left // _SMALLEST_KEY):
        raise cursor.bad(f"the header announces {keys} keys, more than the file can hold", 16)
    if tensors > min(_MOST_TENSORS, left // _SMALLEST_TENSOR):
        raise cursor.bad(f"the header announces {tensors} tensors, more than the file can hold", 8)
    return version, tensors, keys


def _read_keys(cursor: Cursor, count: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    keys: dict[str, Any] = {}
    raw: dict[str, bytes] = {}
    for _ in range(count):
        start = cursor.at
        name = cursor.string("a key", 1 << 16)
        if not name or name in keys:
            raise cursor.bad(f"key {name!r} is empty or appears twice", start)
        start = cursor.at
        kind = cursor.number("I", f"the value type of {name!r}")
        keys[name] = cursor.value(kind, repr(name))
        raw[name] = cursor.data[start : cursor.at]
    return keys, raw


def _alignment(cursor: Cursor, keys: Mapping[str, Any], raw: Mapping[str, bytes]) -> int:
    if "general.alignment" not in keys:
        return ALIGNMENT
    value = keys["general.alignment"]
    if raw["general.alignment"][:4] != struct.pack("<I", 4):
        raise cursor.bad("general.alignment is not a 32-bit unsigned number")
    if not 8 <= value <= 1 << 16 or value & (value - 1):
        raise cursor.bad(f"general.alignment is {value}; it must be a power of two from 8 to 65536")
    return int(value)


def _read_record(cursor: Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int, int]:
    """Name, shape, type, bytes, announced offset, and where in the header the record stands."""
    start = cursor.at
    name = cursor.string("a tensor's name", _LONGEST_NAME)
    rank = cursor.number("I", f"the rank of {name!r}")
    if not name:
        raise cursor.bad("a tensor has no name", start)
    if rank > 4:
        raise cursor.bad(f"tensor {name!r} has {rank} dimensions; ggml knows at most 4", start)
    stored = [cursor.number("q", f"a dimension of {name!r}") for _ in range(rank)]
    kind = cursor.number("I", f"the type of {name!r}")
    offset = cursor.number("Q", f"the offset of {name!r}")
    if any(size <= 0 for size in stored) or prod(stored) >= _LARGEST:
        raise cursor.bad(f"tensor {name!r} has the impossible shape {stored}", start)
    try:
        type_ = GGMLQuantizationType(kind)
    except ValueError as error:
        raise cursor.bad(f"tensor {name!r} has type {kind}, which ggml does not define", start) from error
    block, block_bytes = GGML_QUANT_SIZES[type_]
    columns = stored[0] if stored else 1
    if columns % block:
        raise cursor.bad(
            f"rows of {name!r} have {columns} elements, not a multiple of {type_.name}'s block of {block}",
            start,
        )
    bytes_ = prod(stored) // block * block_bytes
    if bytes_ > cursor.size:
        raise cursor.bad(f"tensor {name!r} needs {bytes_} bytes; the whole file has {cursor.size}", start)
    return name, tuple(reversed(stored)), type_, bytes_, offset, start


def _place(
    cursor: Cursor,
    records: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int, int, int]],
    alignment: int,
    part: int,
) -> Mapping[str, GgufTensor]:
    """Check that the tensors tile the data exactly, in order, and end where the file does."""
    data_start = padded(cursor.at, alignment)
    tensors: dict[str, GgufTensor] = {}
    running = end = 0
    for name, shape, type_, bytes_, offset, start in records:
        if name in tensors:
            raise cursor.bad(f"tensor {name!r} appears twice", start)
        if offset != running:
            raise cursor.bad(
                f"tensor {name!r} says its data is at {offset}; the tensors before it end at {running}", start
            )
        end, running = running + bytes_, padded(running + bytes_, alignment)
        if data_start + end > cursor.size:
            raise cursor.bad(
                f"the data of {name!r} ends at byte {data_start + end}; the file has only {cursor.size}",
                start,
                fix="the file is truncated; download it again",
            )
        tensors[name] = GgufTensor(name, shape, type_, data_start + offset, bytes_, part)
    if cursor.size > data_start + running:
        extra = cursor.size - data_start - running
        raise cursor.bad(f"{extra} bytes follow the last tensor and belong to nothing", data_start + running)
    return MappingProxyType(tensors)


def scale_of(name: str, kind: str = "scale") -> str:
    """Where the scale of a whole tensor stands, when its type has one: NVFP4."""
    return f"{name.removesuffix('.weight')}.{kind}"


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment
