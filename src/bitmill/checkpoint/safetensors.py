"""Safetensors folders, read lazily: nothing in a header is believed before it adds up to the file's bytes.

The checks are those of the safetensors specification (exact tiling, no holes, no trailing bytes), made here
so that a refusal names the file and the tensor; the reading itself is the safetensors library's, which maps
the file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmill.checkpoint.hf_folder import parse_object, read_carried, read_config, weight_files
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Quantized, TensorFacts

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8,
        "F32": 4,
        "F16": 2,
        "BF16": 2,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "F8_E8M0": 1,
        "I64": 8,
        "I32": 4,
        "I16": 2,
        "I8": 1,
        "U64": 8,
        "U32": 4,
        "U16": 2,
        "U8": 1,
        "BOOL": 1,
    }
)
"""Element types by the name the header gives them, and their size."""
DENSE: Mapping[str, str] = MappingProxyType({"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"})
"""Element types of weights that are simply numbers, and what reading gives."""

_MOST_HEADER = 100_000_000
_MOST_DIMENSIONS = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Record:
    """One tensor of one file: ``bytes_`` bytes at ``offset`` of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    bytes_: int


@dataclass(frozen=True)
class Header:
    """The verified header of one file.

    Attributes:
        records: every tensor, in the order of its data.
        metadata: the free text under ``__metadata__``.
        raw: the header's bytes, length field included.
        size: bytes of the whole file.
    """

    records: tuple[Record, ...]
    metadata: Mapping[str, str]
    raw: bytes
    size: int


def read_header(path: Path) -> Header:
    """Read and verify a safetensors header; no tensor data is touched.

    Raises:
        BadFile: anything does not add up, with the tensor it was met in.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            _check_length(path, length, size)
            text = file.read(length)
    except OSError as error:
        raise BadFile(f"cannot read the file: {error.strerror}", where=str(path)) from error
    return parse_header(length.to_bytes(8, "little") + text, size, path)


def parse_header(raw: bytes, size: int, path: Path) -> Header:
    """Verify the header that ``raw`` begins with, of a file of ``size`` bytes, on disk or to come.

    Raises:
        BadFile: anything does not add up, with the tensor it was met in.
    """
    length = int.from_bytes(raw[:8], "little")
    _check_length(path, length, size)
    text = raw[8 : 8 + length]
    if len(text) < length:
        raise _bad(path, f"the header ends after {len(text):,} of {length:,} bytes", truncated=True)
    if not text.startswith(b"{"):
        raise _bad(path, "the header does not start with '{': this is not a safetensors file")
    entries = parse_object(text, str(path), "the header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ is not a map of texts")
    records = sorted(
        (_record(path, n, e, 8 + length) for n, e in entries.items()), key=lambda r: (r.offset, r.bytes_)
    )
    _check_tiling(path, records, 8 + length, size)
    return Header(tuple(records), MappingProxyType(metadata), raw[: 8 + length], size)


def _check_length(path: Path, length: int, size: int) -> None:
    if size < 8 or length > min(size - 8, _MOST_HEADER):
        raise _bad(path, f"the header announces {length:,} bytes; the file has {size:,}", truncated=True)


def _record(path: Path, name: str, entry: Any, start: int) -> Record:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _bad(path, f"the entry of {name!r} is not made of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(path, f"tensor {name!r} has dtype {dtype!r}, which is not known here")
    if not _is_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _bad(path, f"tensor {name!r} has the impossible shape {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise _bad(path, f"tensor {name!r} has the impossible offsets {offsets!r}")
    begin, end = offsets
    wanted = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != wanted:
        raise _bad(
            path, f"tensor {name!r} of shape {shape} needs {wanted:,} bytes; its offsets give {end - begin:,}"
        )
    return Record(name, dtype, tuple(shape), path, start + begin, wanted)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _check_tiling(path: Path, records: list[Record], start: int, size: int) -> None:
    running = start
    for record in records:
        if record.offset != running:
            raise _bad(
                path,
                f"tensor {record.name!r} starts at byte {record.offset - start:,} of the data; the tensors "
                f"before it end at {running - start:,}",
            )
        running += record.bytes_
        if running > size:
            raise _bad(
                path,
                f"the data of {record.name!r} ends at byte {running:,}; the file has {size:,}",
                truncated=True,
            )
    if running != size:
        raise _bad(path, f"{size - running:,} bytes follow the last tensor and belong to nothing")


def _bad(path: Path, what: str, truncated: bool = False) -> BadFile:
    return BadFile(what, where=str(path), fix="the file is truncated; fetch it again" if truncated else None)


@final
class TensorFolder:
    """Every tensor of a folder's safetensors files, whatever its element type, by name.

    Attributes:
        path: the folder.
        records: what the headers say, in file order.
        metadata: free text of the headers.

    Raises:
        BadFile: a header does not add up, or the files and their index disagree.
        Refused: the folder has no safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        shards, places = weight_files(path)
        self._headers = {shard: read_header(shard) for shard in shards}
        records: dict[str, Record] = {}
        metadata: dict[str, str] = {}
        for shard, header in self._headers.items():
            metadata.update(header.metadata)
            for record in header.records:
                if record.name in records:
                    raise BadFile(
                        f"tensor {record.name!r} is in {records[record.name].path.name} and in {shard.name}",
                        where=str(path),
                    )
                records[record.name] = record
        for name, shard_name in places.items():
            if name not in records or records[name].path.name != shard_name:
                raise BadFile(
                    f"the index puts {name!r} into {shard_name}, which does not hold it", where=str(path)
                )
        self.records: Mapping[str, Record] = MappingProxyType(records)
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)

    def record(self, name: str) -> Record:
        """What the header says about a tensor.

        Raises:
            BadFile: there is no such tensor.
        """
        if name not in self.records:
            raise BadFile(f"there is no tensor called {name!r}", where=str(self.path))
        return self.records[name]

    def read(self, name: str) -> Tensor:
        """A tensor as stored. Its pages are read when they are looked at and let go with the tensor."""
        record = self.record(name)
        try:
            with safe_open(record.path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BadFile(f"cannot read tensor {name!r}: {error}", where=str(record.path)) from error

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors have equal type, shape and bytes."""
        a, b = self.record(one), self.record(other)
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(self.read(one), self.read(other))

    def digest(self, *more: bytes) -> str:
        """SHA-256 of ``more``, of all headers and sizes, and of 4 KiB at the start, middle and end of every
        tensor: hashing all of a large model would take longer than quantizing a block of it."""
        found = hashlib.sha256()
        for part in more:
            found.update(hashlib.sha256(part).digest())
        for path, header in self._headers.items():
            found.update(header.size.to_bytes(8, "little"))
            found.update(header.raw)
            with path.open("rb") as file:
                for r in header.records:
                    last = r.offset + r.bytes_
                    for at in (r.offset, r.offset + r.bytes_ // 2, max(r.offset, last - 4096)):
                        file.seek(at)
                        found.update(file.read(min(4096, last - at)))
        return found.hexdigest()


@final
class SafetensorsFolder(Checkpoint):
    """A Hugging Face folder of dense weights.

    Tensors of whole numbers or booleans (position ids, masks) are buffers that a runtime computes itself;
    they are left out. An ``lm_head.weight`` that repeats a tied embedding byte for byte is left out too.

    Raises:
        Refused: no model, pickled weights, weights that are already quantized.
        BadFile: a file is not what it claims to be.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        config = read_config(self.path)
        if "quantization_config" in config:
            raise Refused(
                "the weights of this folder are quantized",
                where=str(self.path),
                fix="open it with open_source",
            )
        self.folder = TensorFolder(self.path)
        self._facts = MappingProxyType(dense_facts(self.folder, config))
        self._config = MappingProxyType(settled_config(config, self._facts))

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    def read(self, name: str) -> Tensor:
        if name not in self._facts:
            raise BadFile(f"there is no tensor called {name!r}", where=str(self.path))
        values = self.folder.read(name)
        return values.to(torch.float32) if values.dtype is torch.float64 else values

    def stored(self, name: str) -> Quantized | None:
        return None

    @cached_property
    def _carried(self) -> Mapping[str, bytes]:
        return MappingProxyType(read_carried(self.path))

    @property
    def carried(self) -> Mapping[str, bytes]:
        return self._carried

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.folder.metadata

    @cached_property
    def _digest(self) -> str:
        return folder_digest(self.folder, self._config, self._carried)

    @property
    def digest(self) -> str:
        return self._digest


def dense_facts(folder: TensorFolder, config: Mapping[str, Any]) -> dict[str, TensorFacts]:
    """The dense weights of a folder.

    Raises:
        BadFile: a tensor of 8-bit floats, which means nothing without its scales.
    """
    facts = {}
    for record in folder.records.values():
        if record.dtype.startswith("F8"):
            raise BadFile(
                f"tensor {record.name!r} holds {record.dtype} numbers, and config.json does not scale them",
                where=str(record.path),
            )
        if record.dtype in DENSE:
            facts[record.name] = TensorFacts(record.name, record.shape, DENSE[record.dtype])
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    tied = config.get("tie_word_embeddings", False)
    if tied and head in facts and embed in facts and folder.same_bytes(head, embed):
        del facts[head]
    return facts


def settled_config(config: Mapping[str, Any], facts: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """``config`` with ``tie_word_embeddings`` as the file shows it: a class default is not written by
    everybody, and a head with values of its own is not tied."""
    settled = dict(config)
    if "model.embed_tokens.weight" in facts:
        has_head = "lm_head.weight" in facts
        settled["tie_word_embeddings"] = False if has_head else settled.get("tie_word_embeddings", True)
    return settled


def folder_digest(folder: TensorFolder, config: Mapping[str, Any], carried: Mapping[str, bytes]) -> str:
    """Identity of a whole model folder: configuration, carried files, headers and sampled weights."""
    texts = [part for name in sorted(carried) for part in (name.encode(), carried[name])]
    return folder.digest(repr(sorted(config.items(), key=lambda p: p[0])).encode(), *texts)
