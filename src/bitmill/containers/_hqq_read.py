"""Reading HQQ folders, whoever wrote them: what stands beside a weight, its groups, its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, check_parts, quantization_config
from bitmill.checkpoint.safetensors import DENSE, DTYPE_BYTES, TensorFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Quantized
from bitmill.grids.integer import Integer
from bitmill.grids.integer_down import IntegerDown

METHOD = "hqq"

_CODES = ".W_q"
_NEEDED = ("nbits", "group_size", "axis", "shape", "packing")
_ALSO = (
    *("unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
_LARGEST = 1 << 31
_LONGEST = 64
"""Bytes of the longest thing beside a weight."""


@dataclass(frozen=True)
class Packing:
    """How codes are put together: ``parts`` equal parts of the rows, the first in the highest bits.

    Attributes:
        name: hqq's.
        bits: of a code in a word.
        parts: codes in a word.
        dtype: of a word.
    """

    name: str
    bits: int
    parts: int
    dtype: str = "U8"


_BYTES = Packing("8bit_u8", 8, 1)
PACKINGS: Mapping[int, Packing] = MappingProxyType(
    {
        8: _BYTES,
        6: _BYTES,
        5: _BYTES,
        4: Packing("4bit_u8", 4, 2),
        3: Packing("3bit_32", 3, 10, "I32"),
        2: Packing("2bit_u8", 2, 4),
        1: Packing("1bit_u8", 1, 8),
    }
)
"""By bits of a code; those of 5 and 6 bits fill a byte."""


def packed_shape(rows: int, columns: int, packing: Packing) -> tuple[int, int]:
    """Dimensions of ``rows columns`` codes, packed."""
    return -(-rows // packing.parts), columns


def pack_parts(codes: Tensor, packing: Packing) -> Tensor:
    """Words of ``rows columns`` codes; rows that are missing for equal parts are zeros."""
    rows, columns = packed_shape(codes.shape[0], codes.shape[1], packing)
    whole = torch.nn.functional.pad(codes.to(torch.int32), (0, 0, 0, rows * packing.parts - len(codes)))
    words = torch.zeros(rows, columns, dtype=torch.int32)
    for part in whole.split(rows):
        words = words << packing.bits | part
    return words if packing.dtype == "I32" else words.to(torch.uint8)


def unpack_parts(words: Tensor, packing: Packing, rows: int) -> Tensor:
    """The first ``rows`` rows of codes, uint8: inverse of :func:`pack_parts`."""
    shifts = [packing.bits * k for k in reversed(range(packing.parts))]
    mask = 2**packing.bits - 1
    return torch.cat([(words >> shift & mask).to(torch.uint8) for shift in shifts])[:rows]


def is_hqq(path: Path) -> bool:
    """Whether a folder says so, or, as hqq itself writes them, says nothing and has the tensors."""
    if quantization_config(path, METHOD) is not None:
        return True
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    if "quantization_config" in read_config(path) or not any(path.glob("*.safetensors")):
        return False
    return any(name.endswith(_CODES) for name in TensorFolder(path).records)


def open_folder(path: Path) -> PackedFolder:
    """The folder as a checkpoint.

    Raises:
        Refused: scales that are quantized themselves, or one for a whole tensor.
        BadFile: a part of a layer is missing, or does not fit the others.
    """
    folder, config = TensorFolder(path), read_config(path)
    modules = [name.removesuffix(_CODES) for name in folder.records if name.endswith(_CODES)]
    packed = {f"{module}.weight": _weight(folder, module) for module in modules}
    return PackedFolder(folder, {"quantization_config": {"quant_method": METHOD}, **config}, packed)


@dataclass(frozen=True)
class _About:
    """What stands beside a weight, checked.

    Attributes:
        bits: whole bits of a code.
        exact: whether codes use all of them (hqq's 1.58 bits do not).
        axis: 1 where groups run along the inputs.
        width: weights in a group.
        shape: of the dense weight.
    """

    bits: int
    exact: bool
    axis: int
    width: int
    shape: tuple[int, int]

    @property
    def groups(self) -> int:
        return self.shape[0] * self.shape[1] // self.width

    @property
    def grouped(self) -> tuple[int, int]:
        """Dimensions of the codes before they were packed."""
        return (self.groups, self.width) if self.axis else (self.width, self.groups)


def _weight(folder: TensorFolder, module: str) -> Packed:
    about = _about(folder, module)
    packing = PACKINGS[about.bits]
    rows, columns = about.grouped
    if packing.dtype == "U8" and rows % packing.parts:
        raise BadFile(f"{rows} rows of codes do not come in {packing.parts} equal parts", where=module)
    words = packed_shape(rows, columns, packing)
    record = folder.record(f"{module}{_CODES}")
    if record.bytes_ != words[0] * words[1] * DTYPE_BYTES[packing.dtype]:
        raise BadFile(
            f"{record.name!r} has {record.bytes_} bytes, which are not {rows} × {columns} codes",
            where=str(record.path),
        )
    numbers = folder.record(f"{module}.scale").dtype
    if numbers not in DENSE or numbers == "F64":
        raise Refused(f"its scales are stored as {numbers}, which cannot be read here", where=module)
    wanted = (about.groups, 1) if about.axis else (1, about.groups)
    check_parts(folder, {f"{module}.{part}": (numbers, wanted) for part in ("scale", "zero")})
    beside = [f"{module}.{part}" for part in (*_NEEDED, *_ALSO)]
    names = (record.name, f"{module}.scale", f"{module}.zero", *(n for n in beside if n in folder.records))
    read = partial(_read, folder, module, about)
    return Packed(
        about.shape,
        names,
        lambda: _dense(*read()).reshape(about.shape),
        lambda: _stored(*read(), about, DENSE[numbers]),
    )


def _about(folder: TensorFolder, module: str) -> _About:
    where = f"{module} in {folder.path}"
    for flag in ("quant_scale", "quant_zero", "offload_meta"):
        if _number(folder, module, flag, 0):
            raise Refused("its scales or zeros are quantized or kept elsewhere", where=where)
    if not _number(folder, module, "channel_wise", 1):
        raise Refused("it has one scale for a whole tensor", where=where)
    bits, width, axis = (_number(folder, module, part) for part in ("nbits", "group_size", "axis"))
    exact = float(bits).is_integer()
    whole = int(bits) if exact else 2
    if whole not in PACKINGS or not (exact or abs(bits - 1.58) < 1e-3):
        raise Refused(f"weights of {bits:g} bits cannot be read here", where=where)
    name = _small(folder, module, "packing").numpy().tobytes().decode("ascii", "replace")
    if name != PACKINGS[whole].name:
        raise BadFile(f"{bits:g} bits are not packed as {name!r}", where=where)
    sizes = _small(folder, module, "shape").tolist()
    if len(sizes) != 2 or not all(isinstance(size, int) and 0 < size < _LARGEST for size in sizes):
        raise BadFile(f"its shape is {sizes}, not two sizes", where=where)
    if axis not in (0, 1) or type(width) is not int or width < 1 or (sizes[0] * sizes[1]) % width:
        raise BadFile(f"groups of {width} on axis {axis} do not fill {sizes}", where=where)
    return _About(whole, exact, int(axis), int(width), (sizes[0], sizes[1]))


def _small(folder: TensorFolder, module: str, part: str) -> Tensor:
    record = folder.record(f"{module}.{part}")
    if not 0 < record.bytes_ <= _LONGEST or len(record.shape) > 1:
        raise BadFile(f"{record.name!r} is {record.dtype} {list(record.shape)}", where=str(record.path))
    return folder.read(record.name)


def _number(folder: TensorFolder, module: str, part: str, default: int | None = None) -> Any:
    if default is not None and f"{module}.{part}" not in folder.records:
        return default
    value = _small(folder, module, part)
    if value.numel() != 1:
        raise BadFile(f"{part} is not one number", where=f"{module} in {folder.path}")
    return value.item()


def _read(folder: TensorFolder, module: str, about: _About) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as they were grouped, scales and zeros that broadcast to them. Words may be stored as wider
    numbers, for training in shards; their bytes are the same."""
    packing = PACKINGS[about.bits]
    rows, columns = about.grouped
    words = folder.read(f"{module}{_CODES}").reshape(-1)
    words = words.view(torch.int32 if packing.dtype == "I32" else torch.uint8).reshape(-1, columns)
    scale, zero = (folder.read(f"{module}.{part}").to(torch.float32) for part in ("scale", "zero"))
    return unpack_parts(words, packing, rows), scale, zero


def _dense(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes.to(torch.float32) - zero).mul_(scale)


def _stored(codes: Tensor, scale: Tensor, zero: Tensor, about: _About, dtype: str) -> Quantized | None:
    """On the grid of the layout, when it has one: no group crosses a row, and codes fill their bits."""
    (out, columns), width = about.shape, about.width
    if not about.exact or about.bits < 2 or (columns if about.axis else out) % width:
        return None
    if int(codes.max()) >> about.bits:  # a byte holds more than 5 or 6 bits
        return None
    codes = codes.reshape(about.shape)
    if about.axis:
        params = {"scale": scale.reshape(out, -1), "zero": zero.reshape(out, -1)}
        return Quantized(
            Integer(about.bits, 0 if width == columns else width, "fz", dtype), codes, params, about.shape
        )
    params = {"scale": scale.reshape(-1, columns), "zero": zero.reshape(-1, columns)}
    return Quantized(IntegerDown(about.bits, width, dtype), codes, params, about.shape)
