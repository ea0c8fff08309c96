"""Reading bitsandbytes folders, whoever wrote them: a layer's kind, its blocks, its codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import parse_object, read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, check_parts, from_quantized
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.checkpoint.safetensors_write import Planned
from bitmill.core.errors import BadFile, Refused
from bitmill.core.inputs import LOUD, llm_int8_inputs
from bitmill.core.types import Inputs, Quantized
from bitmill.grids.llm_int8 import LlmInt8
from bitmill.grids.table import Table
from bitmill.numerics.floats import dynamic_map

KINDS = ("nf4", "fp4")
NESTED = 256
"""Block scales that share an outer scale; no kernel of bitsandbytes knows another number."""

_STATE = ".quant_state.bitsandbytes__"
_SCALE = ".SCB"
_LONGEST_STATE = 4096
_LARGEST = 1 << 31
_MOST_BLOCK = 1 << 16
_STORAGE = ("U8", "I8", "F16", "BF16", "F32")
_LOUDEST = 1000.0
_NEAR = 1e-6  # tables were once computed, and differ in the last place


def open_folder(path: Path) -> PackedFolder:
    """The folder as a checkpoint.

    Raises:
        Refused: layouts of old versions, or tables that bitsandbytes itself does not look at.
        BadFile: a part of a layer is missing, or does not fit the others.
    """
    folder, config = TensorFolder(path), read_config(path)
    packed: dict[str, Packed] = {}
    inputs: dict[str, Inputs] = {}
    rounds = _rounds(config["quantization_config"], path)
    for name in folder.records:
        whole, state, kind = name.partition(_STATE)
        if state:
            if whole in packed:
                raise BadFile(f"{whole!r} is described twice", where=str(path))
            packed[whole] = _table(folder, whole, kind)
        elif name.endswith(_SCALE):
            module = name.removesuffix(_SCALE)
            packed[f"{module}.weight"] = _integers(folder, module)
            if ".layers." in module:  # a quantized head rounds its inputs as well, which nothing here does
                inputs[f"{module}.weight"] = rounds
    for record in folder.records.values():
        if record.dtype == "I8" and record.name not in packed:
            raise BadFile(f"{record.name!r} has no scales beside it", where=str(record.path))
    return PackedFolder(folder, config, packed, (), inputs)


def _rounds(settings: Mapping[str, Any], path: Path) -> Inputs:
    """What 8-bit layers do to their inputs."""
    threshold = settings.get("llm_int8_threshold", LOUD)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < _LOUDEST:
        raise BadFile(f"llm_int8_threshold is {threshold!r}", where=str(path / "config.json"))
    return Inputs(llm_int8_inputs(float(threshold)))


def _integers(folder: TensorFolder, module: str) -> Packed:
    weight, layout = folder.record(f"{module}.weight"), f"{module}.weight_format"
    if weight.dtype != "I8" or len(weight.shape) != 2 or 0 in weight.shape:
        what = f"{weight.name!r} is {weight.dtype} {list(weight.shape)}, not a matrix of I8"
        raise BadFile(what, where=str(weight.path))
    check_parts(folder, {f"{module}{_SCALE}": ("F32", weight.shape[:1])})
    names = [weight.name, f"{module}{_SCALE}"]
    if layout in folder.records:
        record = folder.record(layout)
        if record.dtype != "U8" or record.bytes_ != 1:
            raise BadFile(f"{layout!r} is not one byte", where=str(record.path))
        if int(folder.read(layout)) != 0:
            raise Refused(
                "its rows are tiled for a kind of GPU, which bitsandbytes itself gave up",
                where=layout,
                fix="save it again with bitsandbytes 0.45 or newer, or give the original model",
            )
        names.append(layout)
    shape = (weight.shape[0], weight.shape[1])

    def unpacked() -> Quantized:
        absmax = folder.read(names[1])[:, None]
        return Quantized(LlmInt8(), folder.read(weight.name), {"absmax": absmax}, shape)

    return from_quantized(shape, tuple(names), unpacked)


def _table(folder: TensorFolder, name: str, kind: str) -> Packed:
    key = f"{name}{_STATE}{kind}"
    where = f"{key} in {folder.path}"
    if kind not in KINDS:
        raise Refused(f"tables of the kind {kind!r} cannot be read here", where=where)
    record = folder.record(key)
    if record.dtype != "U8" or not 0 < record.bytes_ <= _LONGEST_STATE:
        raise BadFile(f"it is {record.dtype} {list(record.shape)}, not a short text", where=where)
    state = parse_object(folder.read(key).numpy().tobytes(), where, "the state of the layer")
    shape, width = _shape(state, where), state.get("blocksize")
    if type(width) is not int or not 0 < width <= _MOST_BLOCK:
        raise BadFile(f"its blocks have {width!r} values", where=where)
    if state.get("quant_type") != kind:
        raise BadFile(f"it is {kind} by name and {state.get('quant_type')!r} by its text", where=where)
    values = shape[0] * shape[1]
    blocks = -(-values // width)
    double = f"{name}.nested_absmax" in folder.records
    parts: dict[str, Planned] = {
        f"{name}.absmax": ("U8" if double else "F32", (blocks,)),
        f"{name}.quant_map": ("F32", (16,)),
    }
    if double:
        parts[f"{name}.nested_absmax"] = ("F32", (-(-blocks // NESTED),))
        parts[f"{name}.nested_quant_map"] = ("F32", (NESTED,))
    if not double and "nested_offset" in state:
        raise BadFile("its block scales are quantized, and their scales are missing", where=where)
    check_parts(folder, parts)
    weight = folder.record(name)
    if weight.dtype not in _STORAGE or weight.bytes_ != (values + 1) // 2:
        raise BadFile(f"{weight.bytes_} bytes of {weight.dtype} are not {shape} codes", where=where)
    grid = Table.parse(f"{kind}-b{width}{'-dq' if double else ''}")
    if grid is None:
        raise BadFile(f"blocks of {width} values are no grid", where=where)
    offset = _offset(state, where) if double else 0.0
    _check_tables(folder, name, grid)
    flat = partial(_flat, folder, name, grid, values, offset)
    rowwise = shape[1] % width == 0
    return Packed(
        shape,
        (name, key, *parts),
        lambda: flat().dense().reshape(shape),
        lambda: _by_rows(flat(), shape) if rowwise else None,
    )


def _shape(state: dict[str, Any], where: str) -> tuple[int, int]:
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 < size < _LARGEST for size in shape)
    ):
        raise BadFile(f"its shape is {shape!r}, not two sizes", where=where)
    return shape[0], shape[1]


def _offset(state: dict[str, Any], where: str) -> float:
    if state.get("nested_blocksize") != NESTED:
        raise Refused(f"outer scales of {state.get('nested_blocksize')!r} blocks cannot be read", where=where)
    offset: Any = state.get("nested_offset")
    known = isinstance(offset, float | int) and not isinstance(offset, bool) and math.isfinite(offset)
    if not known or abs(offset) > torch.finfo(torch.float32).max:
        raise BadFile(f"the offset of its block scales is {offset!r}", where=where)
    return float(offset)


def _check_tables(folder: TensorFolder, name: str, grid: Table) -> None:
    """The tables in the file must be the well-known ones: the kernels take those whatever the file says."""
    wanted = {"quant_map": torch.tensor(grid.levels)}
    if grid.double:
        wanted["nested_quant_map"] = dynamic_map()
    for part, table in wanted.items():
        if not bool(((folder.read(f"{name}.{part}") - table).abs() <= _NEAR).all()):
            raise Refused(
                f"its table is not that of {grid}, and bitsandbytes would not look at it",
                where=f"{name}.{part} in {folder.path}",
            )


def _flat(folder: TensorFolder, name: str, grid: Table, values: int, offset: float) -> Quantized:
    """The weight as one row, as it is stored: blocks do not know where rows end."""
    octets = folder.read(name).reshape(-1).view(torch.uint8)
    codes = torch.stack((octets >> 4, octets & 15), 1).reshape(1, -1)[:, :values]
    absmax = folder.read(f"{name}.absmax")[None]
    params: dict[str, Tensor] = {"absmax": absmax}
    if grid.double:
        scale = folder.read(f"{name}.nested_absmax")
        params = {"absmax_code": absmax, "absmax_scale": scale, "absmax_offset": torch.tensor(offset)}
    return Quantized(grid, codes, params, (1, values))


def _by_rows(flat: Quantized, shape: tuple[int, int]) -> Quantized:
    params = {key: v.reshape(shape[0], -1) if v.dim() == 2 else v for key, v in flat.params.items()}
    return Quantized(flat.grid, flat.codes.reshape(shape), params, shape)
