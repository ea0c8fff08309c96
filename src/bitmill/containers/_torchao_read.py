"""Reading torchao folders, whoever wrote them: a weight's class, its blocks, its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import parse_object, read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, from_quantized
from bitmill.checkpoint.safetensors import DENSE, Record, TensorFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Quantized
from bitmill.grids.integer import Integer
from bitmill.grids.minifloat import Minifloat
from bitmill.numerics.bits import unpack
from bitmill.numerics.floats import ELEMENTS, decode

_INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
_FLOATS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
_ASIDE = ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale")
_NOT_READ = {
    "Int4Tensor": "its packed int4 is made and multiplied on a GPU only",
    "Int4PlainInt32Tensor": "its packed int4 is laid out for one accelerator's kernel",
    "Int4TilePackedTo4dTensor": "its int4 is laid out for one kernel of a GPU",
}


def open_folder(path: Path) -> PackedFolder:
    """The folder as a checkpoint. Scales of activations are left aside.

    Raises:
        Refused: a class of tensors that is not read here, or inputs that are scaled before a layer.
        BadFile: metadata and tensors do not fit together.
    """
    folder, config = TensorFolder(path), read_config(path)
    packed, aside = {}, set()
    for name, text in folder.metadata.items():
        module, dot, kind = name.rpartition(".")
        if not dot or name in folder.records or not text.startswith("{"):
            continue
        about = parse_object(text.encode(), str(path), f"the metadata of {name!r}")
        if about.get("_type") == "Tensor":
            continue
        stem = f"{module}._{kind}_"
        if f"{stem}act_pre_scale" in folder.records:
            raise Refused(f"the input of {module!r} is scaled while the model runs", where=str(path))
        packed[name] = _weight(folder, stem, about)
        aside |= {stem + part for part in _ASIDE}
    owned = {part for weight in packed.values() for part in weight.parts}
    for record in folder.records.values():
        if record.dtype == "I8" and record.name not in owned | aside:
            raise BadFile(
                f"tensor {record.name!r} belongs to no weight", where=f"{record.path}: __metadata__"
            )
    return PackedFolder(folder, config, packed, aside)


def _weight(folder: TensorFolder, stem: str, about: Mapping[str, Any]) -> Packed:
    kind, attributes = about.get("_type"), about.get("_data")
    codes = folder.records.get(f"{stem}qdata")
    if not isinstance(attributes, dict) or codes is None:
        raise BadFile(f"{stem}qdata is missing, or its class is not described", where=str(folder.path))
    if len(codes.shape) != 2 or 0 in codes.shape:
        raise BadFile(f"{codes.name!r} has the shape {list(codes.shape)}", where=str(codes.path))
    if kind in _INTEGERS or kind == "Float8Tensor":
        return _blocks(folder, stem, str(kind), attributes, codes)
    if kind == "NVFP4Tensor":
        return _nested(folder, stem, attributes, codes)
    reason = _NOT_READ.get(str(kind), "it is none that is read here")
    raise Refused(
        f"the weight is a {kind} of torchao: {reason}", where=codes.name, fix="give the original model"
    )


@dataclass(frozen=True)
class _Blocks:
    """Codes with one scale, and perhaps one zero point, for each block of ``block`` rows and columns."""

    folder: TensorFolder
    codes: Record
    scale: Record
    zero: Record | None
    block: tuple[int, int]
    bits: int

    def spread(self, record: Record) -> Tensor:
        """The value for every row and column, float32."""
        values = self.folder.read(record.name).to(torch.float32)
        rows, columns = self.block
        return values.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def dense(self) -> Tensor:
        stored = self.folder.read(self.codes.name)
        if self.codes.dtype in _FLOATS:
            values = decode(stored.view(torch.uint8), ELEMENTS[_FLOATS[self.codes.dtype]])
        else:
            values = stored.to(torch.float32)
        if self.zero is not None:
            values -= self.spread(self.zero)
        return values.mul_(self.spread(self.scale))

    def quantized(self) -> Quantized | None:
        (rows, columns), shape = self.block, (self.codes.shape[0], self.codes.shape[1])
        stored = self.folder.read(self.codes.name)
        scale = self.folder.read(self.scale.name).to(torch.float32)
        if self.codes.dtype in _FLOATS:
            known = {shape: "tensor", (1, shape[1]): "channel", (128, 128): "b128"}
            if self.block not in known:
                return None
            grid = Minifloat(_FLOATS[self.codes.dtype], known[self.block])
            return Quantized(grid, stored.view(torch.uint8), {"scale": scale}, shape)
        half = 2 ** (self.bits - 1)
        signed = stored.to(torch.int16)
        inside = -half <= int(signed.min()) and int(signed.max()) < half
        if (rows != 1 and self.block != shape) or self.bits < 2 or not inside:
            return None
        group = -1 if rows > 1 else 0 if columns == shape[1] else columns
        codes = (signed + half).to(torch.uint8)
        zero = None if self.zero is None else self.folder.read(self.zero.name).to(torch.float32)
        precision = DENSE[self.scale.dtype]
        if zero is None or not bool(zero.any()):
            return Quantized(Integer(self.bits, group, "sym", precision), codes, {"scale": scale}, shape)
        if not bool((zero == zero.round()).all()) or float(zero.abs().max()) > half:
            return None
        grid_ = Integer(self.bits, group, "asym", precision)
        return Quantized(grid_, codes, {"scale": scale, "zero": zero + half}, shape)


def _blocks(
    folder: TensorFolder, stem: str, kind: str, attributes: Mapping[str, Any], codes: Record
) -> Packed:
    block, bits = attributes.get("block_size"), 8
    if kind == "IntxUnpackedToInt8Tensor":
        target = attributes.get("target_dtype")
        named = target.get("_data") if isinstance(target, dict) else None
        widths = {f"int{n}": n for n in range(1, 9)}
        if not isinstance(named, str) or named not in widths:
            raise BadFile(f"{codes.name!r} has the target {target!r}", where=str(codes.path))
        bits = widths[named]
    if not isinstance(block, list) or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        raise BadFile(f"{codes.name!r} has blocks of {block!r}", where=str(codes.path))
    wanted = ("I8",) if kind in _INTEGERS else tuple(_FLOATS)
    if codes.dtype not in wanted or codes.shape[0] % block[0] or codes.shape[1] % block[1]:
        raise BadFile(f"{codes.name!r} is not laid out as {kind}", where=str(codes.path))
    blocks = (codes.shape[0] // block[0], codes.shape[1] // block[1])
    scale = folder.record(f"{stem}scale")
    zero = folder.records.get(f"{stem}zero_point")
    if scale.dtype not in DENSE or scale.shape != blocks:
        raise BadFile(
            f"{scale.name!r} does not have the scales of {list(blocks)} blocks", where=str(scale.path)
        )
    if zero is not None and (zero.dtype not in (*DENSE, "I8") or zero.shape != blocks):
        raise BadFile(f"{zero.name!r} does not have {list(blocks)} zero points", where=str(zero.path))
    parts = tuple(r.name for r in (codes, scale, zero) if r is not None)
    weight = _Blocks(folder, codes, scale, zero, (block[0], block[1]), bits)
    return Packed((codes.shape[0], codes.shape[1]), parts, weight.dense, weight.quantized)


def _nested(folder: TensorFolder, stem: str, attributes: Mapping[str, Any], codes: Record) -> Packed:
    shape = (codes.shape[0], codes.shape[1] * 2)
    scale, whole = folder.record(f"{stem}scale"), folder.records.get(f"{stem}per_tensor_scale")
    tiled = attributes.get("is_swizzled_scales", False)
    wanted = (shape[0], shape[1] // 16)
    if tiled:
        wanted = (-(-shape[0] // 128) * 32, -(-shape[1] // 64) * 16)
    if codes.dtype != "U8" or shape[1] % 16 or type(tiled) is not bool:
        raise BadFile(f"{codes.name!r} is not laid out as NVFP4", where=str(codes.path))
    if (scale.dtype, scale.shape) != ("F8_E4M3", wanted):
        raise BadFile(f"{scale.name!r} is not F8_E4M3 {list(wanted)}", where=str(scale.path))
    if whole is not None and (whole.dtype, whole.shape) != ("F32", ()):
        raise BadFile(f"{whole.name!r} is not one F32", where=str(whole.path))
    parts = tuple(r.name for r in (codes, scale, whole) if r is not None)
    return from_quantized(shape, parts, partial(_nvfp4, folder, stem, shape, tiled, whole is not None))


def _nvfp4(folder: TensorFolder, stem: str, shape: tuple[int, int], tiled: bool, whole: bool) -> Quantized:
    codes = unpack(folder.read(f"{stem}qdata"), 4, shape[1])
    scale = folder.read(f"{stem}scale").to(torch.float32)
    if tiled:
        scale = _rows_of_tiles(scale, shape[0], shape[1] // 16)
    gain = 1 / folder.read(f"{stem}per_tensor_scale") if whole else torch.ones(())
    return Quantized(Minifloat("e2m1", "nv"), codes, {"scale": scale, "gain": gain}, shape)


def _rows_of_tiles(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales by row and block from the order of cuBLAS: tiles of 128 rows × 4 blocks, where the four of row
    ``r`` stand at ``16 (r mod 32) + 4 (r div 32)``."""
    down, across = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(down, across, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)[:rows, :columns].contiguous()
