"""SpQR's words, and reading folders of them, whoever wrote them: tiles, outliers, the order of the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, check_parts
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Params, Quantized
from bitmill.grids.spqr import Spqr
from bitmill.numerics.outliers import filled, rows_of
from bitmill.numerics.tiles import PARTS, SIDE

METHOD = "spqr"
BITS = 3
TENSORS = ("dense_weights", "row_offsets", "col_vals", "in_perm")
"""What a layer consists of, in the order that its owner lists them in."""

MOST_COLUMNS = 1 << 15
"""Columns of outliers are 16-bit numbers, and kernels read them as signed."""

_WORDS = ".dense_weights"
_HALVES = ("scale_step", "zero_step", "scale_zero", "zero_zero")
"""Second-order numbers of a tile, the lowest 16 bits of its 64 first."""

_FRAGMENT_AT, _FRAGMENT = 54, 255
_MOST_SHARE = 100


def words_of(codes: Tensor, params: Params) -> Tensor:
    """A word for each row of each tile, tile after tile along the inputs: ``out · in / 16`` int64.

    From the lowest bit: code of the scale, code of the zero point, sixteen codes, and eight bits of the
    tile's second-order numbers, each eighth of them on two neighbouring rows.

    Args:
        codes: uint8 ``out in``, columns in the order of the file.
    """
    out, columns = codes.shape
    rows, tiles = out // SIDE, columns // SIDE
    values = codes.reshape(out, tiles, SIDE).to(torch.int64)
    words = params["scale"].to(torch.int64) | params["zero"].to(torch.int64) << BITS
    for place in range(SIDE):
        words |= values[..., place] << BITS * (place + 2)
    eighths = torch.stack([_bits(params[name]) for name in _HALVES], -1)
    eighths = torch.stack((eighths & _FRAGMENT, eighths >> 8), -1).reshape(rows, tiles, SIDE // 2)
    fragments = eighths.repeat_interleave(2, 2).transpose(1, 2).reshape(out, tiles)
    words |= fragments << _FRAGMENT_AT
    return words.reshape(rows, SIDE, tiles).transpose(1, 2).reshape(-1)


def tiles_of(words: Tensor, shape: tuple[int, int], where: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and parameters of the words: inverse of :func:`words_of`.

    Raises:
        BadFile: second-order numbers that are not finite, or not the same on both rows.
    """
    out, columns = shape
    rows, tiles = out // SIDE, columns // SIDE
    words = words.reshape(rows, tiles, SIDE).transpose(1, 2).reshape(out, tiles)
    low = 2**BITS - 1
    codes = torch.stack([words >> BITS * (place + 2) & low for place in range(SIDE)], -1)
    fragments = (words >> _FRAGMENT_AT).reshape(rows, SIDE // 2, 2, tiles)
    if bool((fragments[:, :, 0] != fragments[:, :, 1]).any()) or bool((fragments >> 8).any()):
        raise BadFile("the rows of a tile do not agree on its second-order numbers", where=where)
    eighths = fragments[:, :, 0].transpose(1, 2).reshape(rows, tiles, len(_HALVES), 2)
    halves = (eighths[..., 0] | eighths[..., 1] << 8).to(torch.uint16).view(torch.float16)
    if not bool(halves.isfinite().all()):
        raise BadFile("second-order numbers of a tile are not finite", where=where)
    named = dict(zip(_HALVES, halves.to(torch.float32).unbind(-1), strict=True))
    params = {"scale": (words & low).to(torch.uint8), "zero": (words >> BITS & low).to(torch.uint8)}
    params |= {name: named[name].contiguous() for name in PARTS}
    return codes.to(torch.uint8).reshape(shape), params


def _bits(numbers: Tensor) -> Tensor:
    """The 16 bits of half precision numbers, int64."""
    return numbers.to(torch.float16).view(torch.uint16).to(torch.int64)


def open_folder(path: Path) -> PackedFolder:
    """The folder as a checkpoint.

    Raises:
        Refused: tiles or codes of other sizes than the kernels know.
        BadFile: a part of a layer is missing, or does not fit the others.
    """
    folder, config = TensorFolder(path), read_config(path)
    settings = config["quantization_config"]
    for key, known in (("bits", BITS), ("beta1", SIDE), ("beta2", SIDE)):
        if settings.get(key, known) != known:
            raise Refused(
                f"{key} is {settings.get(key)!r}, and only {known} can be read",
                where=str(path / "config.json"),
                fix="no kernel reads anything else; give the original model",
            )
    told = settings.get("shapes", {})
    if not isinstance(told, dict):
        raise BadFile(f"shapes is {told!r}, not a map", where=str(path / "config.json"))
    modules = [name.removesuffix(_WORDS) for name in folder.records if name.endswith(_WORDS)]
    packed = {f"{module}.weight": _weight(folder, module, told) for module in modules}
    return PackedFolder(folder, config, packed)


def _weight(folder: TensorFolder, module: str, told: Mapping[str, Any]) -> Packed:
    """One layer, once the sizes of its parts fit each other and what the configuration tells of them."""
    names = tuple(f"{module}.{part}" for part in TENSORS)
    records = [folder.record(name) for name in names]
    where = f"{module} in {folder.path}"
    sizes = []
    for name, record in zip(names, records, strict=True):
        if len(record.shape) != 1:
            raise BadFile(f"{name!r} has the shape {list(record.shape)}, not one size", where=where)
        if told.get(f"{name}.shape", record.shape[0]) != record.shape[0]:
            raise BadFile(
                f"{name!r} has {record.shape[0]} numbers, and shapes in config.json says "
                f"{told[f'{name}.shape']!r}",
                where=where,
            )
        sizes.append(record.shape[0])
    shape = _shape(sizes, where)
    kinds = ("I64", "I32", "I32" if sizes[2] else records[2].dtype, "I32")
    check_parts(folder, {n: (kind, (size,)) for n, kind, size in zip(names, kinds, sizes, strict=True)})
    read = partial(_read, folder, module, shape)
    return Packed(shape, names, lambda: read().dense(), lambda: _counted(read(), sizes[2]))


def _shape(sizes: list[int], where: str) -> tuple[int, int]:
    """The weight's shape, from the sizes of its parts. Offsets are of rows, or of rows of tiles."""
    words, offsets, entries, pairs = sizes
    columns = 2 * pairs
    rows = words * SIDE // columns if columns else offsets - 1
    if not columns and rows > 0:
        columns = words * SIDE // rows
    sound = rows > 0 and columns > 0 and rows % SIDE == 0 and columns % SIDE == 0
    if not sound or rows * columns != words * SIDE or offsets - 1 not in (rows, rows // SIDE):
        raise BadFile(
            f"{words} words, {offsets} offsets and {pairs} pairs of inputs are not those of one matrix",
            where=where,
        )
    if columns > MOST_COLUMNS or entries > rows * columns:
        raise BadFile(f"{entries} outliers in {columns} columns: beyond what the layout holds", where=where)
    return rows, columns


def _read(folder: TensorFolder, module: str, shape: tuple[int, int]) -> Quantized:
    words, offsets, entries, pairs = (folder.read(f"{module}.{part}") for part in TENSORS)
    where = f"{module} in {folder.path}"
    codes, params = tiles_of(words, shape, where)
    order = torch.stack((pairs & 0xFFFF, pairs >> 16 & 0xFFFF), 1).reshape(-1).to(torch.int64)
    natural = torch.arange(shape[1])
    order = order if len(order) else natural
    if not torch.equal(order.sort().values, natural):
        raise BadFile("in_perm is no order of the inputs", where=where)
    back = order.argsort()
    params["outlier"] = _outliers(offsets, entries, shape, where)[:, back]
    act = not torch.equal(order, natural)
    if act:
        params["order"] = order.to(torch.int32)[None]
    return Quantized(Spqr(BITS, _MOST_SHARE, act), codes[:, back], params, shape)


def _outliers(offsets: Tensor, entries: Tensor, shape: tuple[int, int], where: str) -> Tensor:
    """What is added to the values of codes, in the order of the file's columns."""
    if int(offsets[-1]) != len(entries):
        raise BadFile(f"offsets end at {int(offsets[-1])} of {len(entries)} outliers", where=where)
    words = entries.to(torch.int32)
    values = (words >> 16 & 0xFFFF).to(torch.uint16).view(torch.float16)
    if not bool(values.isfinite().all()):
        raise BadFile("an outlier is not finite", where=where)
    try:
        rows = rows_of(offsets)
        if len(offsets) - 1 != shape[0]:  # entries of the sixteen rows of a tile take turns
            rows = rows * SIDE + torch.arange(len(words)) % SIDE
        return filled(rows, words & 0xFFFF, values, shape)
    except ValueError as error:
        raise BadFile(f"its outliers: {error}", where=where) from error


def _counted(found: Quantized, entries: int) -> Quantized | None:
    """On the grid with room for as many outliers, in whole thousandths; None where there is none."""
    share = (entries - 1) * 1000 // (found.shape[0] * found.shape[1]) + 1 if entries else 0
    if share > _MOST_SHARE:
        return None
    grid = Spqr(BITS, share, "order" in found.params)
    return Quantized(grid, found.codes, found.params, found.shape)
