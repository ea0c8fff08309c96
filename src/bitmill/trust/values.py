"""Numbers that are none: NaN and infinities in what is stored, found piece by piece, whatever its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

from bitmill.checkpoint.gguf import GgufFile, GgufTensor
from bitmill.checkpoint.safetensors import Record, TensorFolder
from bitmill.core.errors import BadFile
from bitmill.trust.findings import Finding
from bitmill.trust.sums import Tell

_PIECE = 16 << 20  # bytes looked at together
_NUMBERS = 1 << 22  # of a GGUF tensor decoded together

Counts = tuple[int, int, int]
"""NaN, infinities, and numbers that are not zero."""


def look_through(path: Path, gguf: bool, tell: Tell) -> tuple[Finding, ...]:
    """Every tensor of a file or folder that holds NaN or infinity, and every matrix that is all zeros.

    Args:
        tell: called before each tensor.
    """
    return tuple(_of_gguf(GgufFile(path), tell) if gguf else _of_folder(TensorFolder(path), tell))


def _of_folder(folder: TensorFolder, tell: Tell) -> Iterator[Finding]:
    records = list(folder.records.values())
    for at, record in enumerate(records, 1):
        tell("values", at, len(records), record.name)
        count = _COUNTS.get(record.dtype)
        if record.dtype == "U8" and record.name.endswith(("_scale", ".scales")):
            count = _e8m0
        if count is not None and record.bytes_:
            yield from _said(
                record.name, f"{record.path}: {record.name}", record.shape, _summed(record, count)
            )


def _summed(record: Record, count: Callable[[np.ndarray], Counts]) -> Counts:
    """Counts of a whole tensor, read in pieces."""
    width = np.dtype(_WIDTHS[record.dtype]).itemsize
    step = _PIECE // width * width
    total = (0, 0, 0)
    with record.path.open("rb") as file:
        file.seek(record.offset)
        left = record.bytes_
        while left:
            raw = file.read(min(step, left))
            if not raw:
                raise BadFile(f"the file ends inside {record.name!r}", where=str(record.path))
            left -= len(raw)
            found = count(np.frombuffer(raw, dtype=_WIDTHS[record.dtype]))
            total = (total[0] + found[0], total[1] + found[1], total[2] + found[2])
    return total


def _bits(exponent: int, fraction: int) -> Callable[[np.ndarray], Counts]:
    """Counts for a floating-point type with infinities, by its bits."""

    def count(words: np.ndarray) -> Counts:
        magnitude = words & words.dtype.type(exponent | fraction)
        edge = words.dtype.type(exponent)
        return int((magnitude > edge).sum()), int((magnitude == edge).sum()), int(np.count_nonzero(magnitude))

    return count


def _e4m3(words: np.ndarray) -> Counts:
    """E4M3 as it is used for weights: no infinity, one NaN of either sign."""
    return int((words & 0x7F == 0x7F).sum()), 0, int(np.count_nonzero(words & 0x7F))


def _e8m0(words: np.ndarray) -> Counts:
    """Powers of two, of which none is zero; the last byte is NaN, in a block scale of E4M3 as well."""
    return int((words == 0xFF).sum()), 0, words.size


_WIDTHS: Mapping[str, str] = MappingProxyType(
    {
        "F64": "<u8",
        "F32": "<u4",
        "F16": "<u2",
        "BF16": "<u2",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "F8_E8M0": "u1",
    }
)
_COUNTS: Mapping[str, Callable[[np.ndarray], Counts]] = MappingProxyType(
    {
        "F64": _bits(0x7FF << 52, (1 << 52) - 1),
        "F32": _bits(0xFF << 23, (1 << 23) - 1),
        "F16": _bits(0x1F << 10, (1 << 10) - 1),
        "BF16": _bits(0xFF << 7, (1 << 7) - 1),
        "F8_E5M2": _bits(0x1F << 2, 3),
        "F8_E4M3": _e4m3,
        "F8_E8M0": _e8m0,
    }
)


def _of_gguf(file: GgufFile, tell: Tell) -> Iterator[Finding]:
    tensors = list(file.tensors.values())
    for at, tensor in enumerate(tensors, 1):
        tell("values", at, len(tensors), tensor.name)
        total = (0, 0, 0)
        try:
            for piece in _pieces(tensor):
                values = file.dense(piece).float().numpy()
                nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
                total = (total[0] + nan, total[1] + infinite, total[2] + int(np.count_nonzero(values)))
        except BadFile as error:
            yield Finding("note", "values", error.what, error.where or "", "")
            continue
        yield from _said(tensor.name, f"{file.path}: {tensor.name}", tensor.shape, total)


def _pieces(tensor: GgufTensor) -> Iterator[GgufTensor]:
    """A tensor in runs of whole rows."""
    columns = tensor.shape[-1] if tensor.shape else 1
    rows = prod(tensor.shape) // columns
    row_bytes = tensor.bytes_ // rows
    step = max(1, _NUMBERS // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield replace(
            tensor,
            shape=(count, columns),
            offset=tensor.offset + start * row_bytes,
            bytes_=count * row_bytes,
        )


def _said(name: str, where: str, shape: tuple[int, ...], total: Counts) -> Iterator[Finding]:
    nan, infinite, real = total
    if nan or infinite:
        what = " and ".join(
            text for text in (f"{nan:,} NaN" * bool(nan), f"{infinite:,} infinities" * bool(infinite)) if text
        )
        yield Finding(
            "error", "values", f"{what} among {prod(shape):,} numbers", where, "fetch or quantize it again"
        )
    elif not real and len(shape) > 1 and name.endswith(("weight", "weight_scale", "scales")):
        yield Finding("warning", "values", f"all {prod(shape):,} numbers are zero", where, "")
