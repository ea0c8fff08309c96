"""Importance matrices, as llama.cpp's tools exchange them: sums of squares of every weight's input.

Two forms. GGUF: two tensors a weight, ``NAME.in_sum2`` and ``NAME.counts``, and three keys. The old ``.dat``:
little-endian records of means times a count of chunks, without magic number; what it does not say (how many
tokens, whose expert) cannot be had back.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from bitmill.checkpoint.gguf import MAGIC, Cursor, GgufFile, padded
from bitmill.checkpoint.gguf_write import Planned, encoded, head
from bitmill.core.errors import BadFile, Refused

KIND = "imatrix"
FORMS = ("gguf", "dat")
CHUNK = 512
"""Tokens of a chunk where a file does not say: llama.cpp's default. A power of two, so that a ``.dat`` file
that is read and written again is the same."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_OLD_SUFFIXES = (".dat", ".imatrix")
_SMALLEST_RECORD = 17  # bytes of a .dat entry with a name of one letter and one value
_LONGEST_NAME = 63
_F32 = 0
_U32 = 1 << 32
_I32 = (1 << 31) - 1
_LARGEST_COUNT = 2.0**62


@dataclass(frozen=True, eq=False)
class Entry:
    """What is known about the inputs of one weight, or of every expert's slice of it.

    Attributes:
        in_sum2: sums of ``x²`` a channel, float32 ``matrices columns``.
        counts: tokens summed over, int64 ``matrices``.
    """

    in_sum2: Tensor
    counts: Tensor

    @property
    def mean_square(self) -> Tensor:
        """Mean of ``x²`` a channel, ``matrices columns``; ones for a matrix that no token reached, as
        llama-quantize has it."""
        mean = self.in_sum2 / self.counts.clamp_min(1)[:, None]
        return torch.where(self.counts[:, None] > 0, mean, 1.0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the numbers."""
        found = hashlib.sha256(repr(tuple(self.in_sum2.shape)).encode())
        found.update(self.in_sum2.contiguous().numpy().tobytes())
        found.update(self.counts.contiguous().numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Coverage:
    """How well one weight's inputs are known.

    Attributes:
        name: of the weight, llama.cpp's.
        matrices, columns: experts (1 for an ordinary weight) and channels.
        tokens: the least and the most that a matrix has seen.
        unseen: matrices that no token reached.
        active: share of the channels, of the matrices that tokens reached, whose mean square is not 0.
        total: sum of the mean squares.
        peak: largest mean square relative to the average one.
    """

    name: str
    matrices: int
    columns: int
    tokens: tuple[int, int]
    unseen: int
    active: float
    total: float
    peak: float


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix.

    Attributes:
        entries: by llama.cpp's weight name (``blk.0.ffn_down.weight``), sorted.
        datasets: what text it was taken on.
        chunk_count, chunk_size: how many windows, of how many tokens.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names and numbers; where they come from does not count."""
        parts = (f"{name} {entry.digest}\n" for name, entry in sorted(self.entries.items()))
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def merged(self, others: Iterable[Imatrix]) -> Imatrix:
        """All of them as one: sums and counts add, data sets are listed one after the other.

        Raises:
            Refused: a weight has another shape in another file.
        """
        whole = self
        for other in others:
            entries = dict(whole.entries)
            for name, entry in other.entries.items():
                entries[name] = _added(name, entries[name], entry) if name in entries else entry
            chunks = whole.chunk_count + ceil(other.chunk_count * other.chunk_size / whole.chunk_size)
            whole = Imatrix(_sorted(entries), (*whole.datasets, *other.datasets), chunks, whole.chunk_size)
        return whole

    def coverage(self) -> tuple[Coverage, ...]:
        """How well each weight's inputs are known."""
        return tuple(_coverage(name, entry) for name, entry in self.entries.items())


def is_imatrix(path: Path) -> bool:
    """Whether this is an importance matrix: a GGUF file that says so, or one named as the old ones are."""
    if not path.is_file():
        return False
    if _magic(path) == MAGIC:
        return GgufFile(path).metadata.get("general.type") == KIND
    return path.suffix.lower() in _OLD_SUFFIXES


def read_imatrix(path: Path) -> Imatrix:
    """Read either form.

    The old form holds ``mean · calls`` and ``calls``, a count of chunks: counts come back as ``calls`` times
    :data:`CHUNK`. An expert that no token reached stands there as a mean of 1 and cannot be told from others;
    experts are one row of ``matrices · columns``.

    Raises:
        Refused: there is no such file.
        BadFile: it is no importance matrix, or its numbers make no sense.
    """
    if not path.is_file():
        raise Refused(
            f"there is no importance matrix {str(path)!r}", fix="make one: bitmill imatrix MODEL -o FILE"
        )
    return _read_gguf(path) if _magic(path) == MAGIC else _read_dat(path)


def read_imatrices(paths: Sequence[Path]) -> Imatrix:
    """Read several files as one; see :meth:`Imatrix.merged`."""
    first, *others = [read_imatrix(path) for path in paths]
    return first.merged(others)


def write_imatrix(path: Path, imatrix: Imatrix, form: str) -> None:
    """Write ``path`` whole or not at all.

    Args:
        form: ``gguf``, or ``dat`` for programs from before mid-2025: there counts become whole chunks,
        experts lose their own, and weights that no token reached are left out.

    Raises:
        Refused: the folder cannot be written to.
    """
    if form not in FORMS:
        raise ValueError(f"{form!r} is not one of {FORMS}")
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            (_write_gguf if form == "gguf" else _write_dat)(file, imatrix)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Refused(
            f"cannot write {str(path)!r}: {error.strerror}", fix="choose another -o, or free some space"
        ) from error


def _sorted(entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    return MappingProxyType(dict(sorted(entries.items())))


def _added(name: str, one: Entry, other: Entry) -> Entry:
    if one.in_sum2.shape != other.in_sum2.shape:
        shapes = " and ".join("×".join(map(str, e.in_sum2.shape)) for e in (one, other))
        raise Refused(
            f"importance matrices of different models, or forms, cannot be merged: {shapes} values",
            where=name,
            fix="an old .dat file does not tell experts apart; merge it with its like",
        )
    return Entry(one.in_sum2 + other.in_sum2, one.counts + other.counts)


def _coverage(name: str, entry: Entry) -> Coverage:
    seen = entry.counts > 0
    mean = entry.mean_square[seen].double()
    average = float(mean.mean()) if mean.numel() else 0.0
    return Coverage(
        name,
        entry.in_sum2.shape[0],
        entry.in_sum2.shape[1],
        (int(entry.counts.min()), int(entry.counts.max())),
        int((~seen).sum()),
        float((mean > 0).double().mean()) if mean.numel() else 0.0,
        float(mean.sum()),
        float(mean.max()) / average if average else 0.0,
    )


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError as error:
        raise BadFile(f"cannot read the file: {error.strerror}", where=str(path)) from error


def _entry(sums: Tensor, counts: Tensor, name: str, path: Path) -> Entry:
    for what, values in (("sums", sums), ("counts", counts)):
        bad = int((~(torch.isfinite(values) & (values >= 0))).sum())
        if bad:
            raise BadFile(
                f"{bad} of {values.numel()} {what} of {name!r} are negative or not finite",
                where=str(path),
                fix="take the importance matrix again",
            )
    if float(counts.max()) >= _LARGEST_COUNT:
        raise BadFile(f"{name!r} has seen {float(counts.max()):.3g} tokens", where=str(path))
    return Entry(sums, counts.round().to(torch.int64))


def _read_gguf(path: Path) -> Imatrix:
    file = GgufFile(path)
    kind = file.metadata.get("general.type")
    if kind != KIND:
        raise BadFile(
            f"this GGUF file is no importance matrix: its general.type is {kind!r}, not {KIND!r}",
            where=str(path),
        )
    datasets, chunk_count, chunk_size = (file.metadata.get(key) for key in _KEYS)
    if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
        raise BadFile(f"{_KEYS[0]} is not a list of names", where=str(path))
    for key, value, least in ((_KEYS[1], chunk_count, 0), (_KEYS[2], chunk_size, 1)):
        if type(value) is not int or not least <= value < _U32:
            raise BadFile(f"{key} is {value!r}", where=str(path), fix="take the importance matrix again")
    entries = {}
    for stored in file.tensors:
        if stored.endswith(_SUMS):
            name = stored.removesuffix(_SUMS)
            entries[name] = _gguf_entry(file, name)
        elif stored.endswith(_COUNTS):
            file.record(stored.removesuffix(_COUNTS) + _SUMS)
    if not entries:
        raise BadFile("the importance matrix has no entries", where=str(path))
    assert chunk_count is not None and chunk_size is not None
    return Imatrix(_sorted(entries), tuple(filter(None, datasets)), chunk_count, chunk_size)


def _gguf_entry(file: GgufFile, name: str) -> Entry:
    both = [file.record(name + ending) for ending in (_SUMS, _COUNTS)]
    for record in both:
        if record.type.value != _F32:
            raise BadFile(f"{record.name!r} is stored as {record.type.name}, not F32", where=str(file.path))
    sums, counts = (file.dense(record.name).reshape(-1) for record in both)
    columns = both[0].shape[-1] if both[0].shape else 1
    if len(counts) * columns != len(sums):
        raise BadFile(
            f"{name!r} has {len(sums)} sums in rows of {columns} and {len(counts)} counts",
            where=str(file.path),
        )
    return _entry(sums.reshape(-1, columns), counts, name, file.path)


def _read_dat(path: Path) -> Imatrix:
    size = path.stat().st_size
    if size < 4 + _SMALLEST_RECORD:
        raise BadFile(f"{size} bytes are no importance matrix", where=str(path))
    with path.open("rb") as file:
        cursor = Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
    count = cursor.number("i", "the entry count")
    if not 0 < count <= (size - 4) // _SMALLEST_RECORD:
        raise cursor.bad(
            f"neither a GGUF file nor an old importance matrix: {count} entries in {size} bytes", 0
        )
    entries: dict[str, Entry] = {}
    calls = 0
    for _ in range(count):
        name, entry = _dat_entry(cursor, entries)
        entries[name] = entry
        calls = max(calls, int(entry.counts.max()) // CHUNK)
    if cursor.at == size:  # files of the first years end here
        return Imatrix(_sorted(entries), (), calls, CHUNK)
    chunks, length = cursor.number("i", "the chunk count"), cursor.number("i", "the length of the data set")
    if chunks < 0 or length < 0:
        raise cursor.bad(f"a data set of {chunks} chunks with a name of {length} bytes", cursor.at - 8)
    dataset = cursor.take(length, "the name of the data set").decode("utf-8", "replace")
    if cursor.at != size:
        raise cursor.bad(f"{size - cursor.at} bytes follow the last entry and belong to nothing")
    return Imatrix(_sorted(entries), (dataset,) if dataset else (), chunks, CHUNK)


def _dat_entry(cursor: Cursor, known: Mapping[str, Entry]) -> tuple[str, Entry]:
    start = cursor.at
    length = cursor.number("i", "the length of a name")
    if not 0 < length <= _LONGEST_NAME:
        raise cursor.bad(f"a name of {length} bytes; weights' names have 1 to {_LONGEST_NAME}", start)
    try:
        name = cursor.take(length, "a name").decode("utf-8")
    except UnicodeDecodeError as error:
        raise cursor.bad(f"a name is not UTF-8 ({error.reason})", start) from error
    calls, columns = cursor.number("i", f"the calls of {name!r}"), cursor.number("i", f"the size of {name!r}")
    if name in known or calls < 0 or columns < 1:
        raise cursor.bad(f"{name!r} is there twice, or has {calls} calls and {columns} values", start)
    raw = np.frombuffer(cursor.take(4 * columns, f"the values of {name!r}"), dtype="<f4")
    sums = torch.from_numpy(raw.astype(np.float32))[None] * (CHUNK if calls else 0)
    return name, _entry(sums, torch.tensor([float(calls) * CHUNK], dtype=torch.float64), name, cursor.path)


def _write_gguf(file: BinaryIO, imatrix: Imatrix) -> None:
    keys: dict[str, Any] = {
        "general.type": KIND,
        _KEYS[0]: imatrix.datasets or ("",),  # an empty list would be one of numbers
        _KEYS[1]: min(imatrix.chunk_count, _U32 - 1),
        _KEYS[2]: imatrix.chunk_size,
    }
    parts = dict(_gguf_tensors(imatrix))
    planned = [Planned(name, tuple(part.shape), _F32, part.numel() * 4) for name, part in parts.items()]
    header, _, _ = head({key: encoded(value) for key, value in keys.items()}, planned)
    file.write(header)
    for part in parts.values():
        data = part.contiguous().numpy().astype("<f4").tobytes()
        file.write(data.ljust(padded(len(data)), b"\0"))


def _gguf_tensors(imatrix: Imatrix) -> Iterator[tuple[str, Tensor]]:
    for name, entry in sorted(imatrix.entries.items()):
        yield name + _SUMS, entry.in_sum2
        yield name + _COUNTS, entry.counts.to(torch.float32)[:, None]


def _write_dat(file: BinaryIO, imatrix: Imatrix) -> None:
    seen = {name: entry for name, entry in sorted(imatrix.entries.items()) if int(entry.counts.max()) > 0}
    file.write(struct.pack("<i", len(seen)))
    for name, entry in seen.items():
        raw = name.encode()
        calls = min(ceil(int(entry.counts.max()) / imatrix.chunk_size), _I32)
        values = (entry.mean_square * calls).reshape(-1)
        file.write(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values)))
        file.write(values.numpy().astype("<f4").tobytes())
    source = ", ".join(imatrix.datasets).encode()
    file.write(struct.pack("<ii", min(imatrix.chunk_count, _I32), len(source)) + source)
