"""Bitmill's own folder: grids exactly as they were solved, above all those no runtime's file can hold.

Codes are a bit stream a row (U8, least significant bit first), parameters are tensors, and the grid's text
stands in the safetensors metadata; it reads back bit for bit, and any container can be written from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import parse_object, read_config
from bitmill.checkpoint.packed_folder import (
    Packed,
    PackedFolder,
    cache_name,
    check_parts,
    checked_inputs,
    from_quantized,
    known_cache,
    quantization_config,
)
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    folder_images,
    model_config,
    to_bytes,
)
from bitmill.core.axes import Checkpoint, Grid
from bitmill.core.cache_words import parse_cache, refuses_heads
from bitmill.core.errors import BadFile, BadRecipe
from bitmill.core.inputs import InputGrid, parse_inputs
from bitmill.core.online import OnlineContainer
from bitmill.core.registry import parse_grid
from bitmill.core.types import FileImage, Inputs, Quantized, Row
from bitmill.families.base import attentions, head_dim, traits
from bitmill.grids.biased import Biased
from bitmill.grids.dense import Dense
from bitmill.grids.ggml_floats import GgmlFloat
from bitmill.grids.integer import Integer
from bitmill.grids.integer_down import IntegerDown
from bitmill.grids.kquant import KQuant
from bitmill.grids.lattice import Lattice
from bitmill.grids.llm_int8 import LlmInt8
from bitmill.grids.minifloat import Minifloat
from bitmill.grids.nonlinear import Nonlinear
from bitmill.grids.qoq import Qoq, fits_int8
from bitmill.grids.spqr import Spqr
from bitmill.grids.table import Table
from bitmill.grids.ternary import Ternary
from bitmill.numerics import hadamard
from bitmill.numerics.bits import pack, packed_words, unpack
from bitmill.numerics.floats import ELEMENTS
from bitmill.numerics.linear_maps import Hadamard
from bitmill.numerics.outliers import filled, rows_of, sparse
from bitmill.numerics.tiles import PARTS, SIDE, TOP

METHOD = "bitmill"
VERSION = 1

_WEIGHTS = "bitmill.weights"
"""Key of the map from a weight's name to its grid and dimensions, the grid of its inputs if that is told, and
the order of the Hadamard matrix that its inputs are multiplied by if they are."""

_LARGEST = 1 << 31
_TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}
_OUTLIERS = ("outlier_offsets", "outlier_columns", "outlier_values")
_KQUANT_BITS = {
    "q4_0": 4,
    "q4_1": 4,
    "q5_0": 5,
    "q5_1": 5,
    "q2_k": 2,
    "q3_k": 3,
    "q4_k": 4,
    "q5_k": 5,
    "q6_k": 6,
    "tq1_0": 2,
    "tq2_0": 2,
}


@dataclass(frozen=True)
class _Layout:
    """How one weight is stored.

    Attributes:
        codes: dimensions of the codes.
        bits: of a code; 0 stores the codes as signed bytes.
        params: element type and dimensions of each parameter.
    """

    codes: tuple[int, int]
    bits: int
    params: Mapping[str, Planned]


@final
@dataclass(frozen=True)
class Bitmill(OnlineContainer):
    """A Hugging Face folder that holds grids exactly; those of llama.cpp's codebooks only GGUF holds."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        """Read it back.

        Raises:
            BadFile: the grids named and the tensors stored do not fit together.
        """
        folder = TensorFolder(path)
        weights = parse_object(folder.metadata.get(_WEIGHTS, "{}").encode(), str(path), "the map of weights")
        rows = {name: _row(name, entry, str(path)) for name, entry in weights.items()}
        packed = {name: _packed(folder, row) for name, row in rows.items()}
        inputs = {
            name: _inputs(folder, name, row.inputs, row.turn) for name, row in rows.items() if row.inputs
        }
        config = read_config(path)
        cache = _cache(folder, config, [*folder.records, *packed])
        aside = {name for name in folder.records if cache_name(name) in cache}
        return PackedFolder(folder, config, packed, aside, inputs, cache=cache)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if _layout(grid, (1, 256)) is None:
            return f"the layout of {grid} is not known to it; > gguf holds it"
        if parse_grid(str(grid)) != grid:
            return f"the text {str(grid)!r} does not say everything about this grid"
        return grid.refuses(shape)

    def refuses_inputs(self, grid: Grid, inputs: InputGrid) -> str | None:
        return "it tells of the inputs of quantized weights only" if isinstance(grid, Dense) else None

    def refuses_cache(self, grid: InputGrid) -> str | None:
        return None

    def refuses_rotation(self, space: str, order: int) -> str | None:
        return None

    def implied_inputs(self, rows: Sequence[Row]) -> Mapping[str, InputGrid]:
        return {}

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        return grid

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        tensors = {name: planned for row in rows for name, planned in _planned(row).items()}
        weights = {
            row.name: _entry(row)
            for row in rows
            if row.cache is None and (row.turn or not isinstance(row.grid, Dense))
        }
        config = model_config(source, rows)
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            "grids": sorted({str(grid) for grid, *_ in weights.values()}),
        }
        caches = [(str(row.cache), row.turn) for row in rows if row.cache is not None]
        if caches:
            config["quantization_config"] |= {"cache": caches[0][0], "keys": max(turn for _, turn in caches)}
        metadata = {_WEIGHTS: json.dumps(weights), **{f"bitmill.{k}": v for k, v in notes.items()}}
        return folder_images(source, tensors, config, metadata)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        layout = _layout(row.grid, quantized.shape)
        if layout is None:
            raise ValueError(f"the layout of {row.grid} is not known")
        codes = pack(quantized.codes, layout.bits, 8) if layout.bits else quantized.codes
        parts = {f"{row.name}.codes": to_bytes(codes)}
        params = _sparse_params(row.grid, quantized) if isinstance(row.grid, Spqr) else quantized.params
        for name, (dtype, _) in layout.params.items():
            parts[f"{row.name}.{name}"] = to_bytes(exactly(params[name], _TORCH[dtype]))
        for name in row.inputs.fixed if row.inputs else ():
            parts[f"{row.name}.inputs.{name}"] = to_bytes(quantized.inputs[name].to(torch.float32))
        return parts


def _entry(row: Row) -> list[str | int]:
    """What the map says of a weight."""
    inputs = "" if row.inputs is None else str(row.inputs)
    more = [inputs, row.turn] if row.turn else [inputs] if inputs else []
    return [str(row.grid), *row.shape, *more]


def _planned(row: Row) -> dict[str, Planned]:
    if row.cache is not None and not row.cache.static:
        return {}
    if isinstance(row.grid, Dense):
        return {row.name: (DENSE_DTYPES[str(row.grid)], row.shape)}
    layout = _layout(row.grid, (row.shape[0], row.shape[1]))
    if layout is None:
        raise ValueError(f"the layout of {row.grid} is not known")
    rows, columns = layout.codes
    width = packed_words(columns, layout.bits, 8) if layout.bits else columns
    parts: dict[str, Planned] = {f"{row.name}.codes": ("U8" if layout.bits else "I8", (rows, width))}
    parts.update({f"{row.name}.{name}": planned for name, planned in layout.params.items()})
    parts.update(
        {f"{row.name}.inputs.{name}": ("F32", (1,)) for name in (row.inputs.fixed if row.inputs else ())}
    )
    return parts


def _layout(grid: Grid, shape: tuple[int, int]) -> _Layout | None:
    out, columns = shape
    if isinstance(grid, Integer):
        groups = {-1: (1, 1), 0: (out, 1)}.get(grid.group, (out, columns // max(grid.group, 1)))
        scale = "F16" if grid.scale == "auto" else DENSE_DTYPES[grid.scale]
        params: dict[str, Planned] = {"scale": (scale, groups)}
        if grid.zero != "sym":
            params["zero"] = ("U8" if grid.zero == "asym" else scale, groups)
        return _Layout(shape, grid.bits, params)
    if isinstance(grid, IntegerDown):
        scale = "F16" if grid.scale == "auto" else DENSE_DTYPES[grid.scale]
        return _Layout(
            shape, grid.bits, dict.fromkeys(("scale", "zero"), (scale, (out // grid.group, columns)))
        )
    if isinstance(grid, Biased):
        scale = "F16" if grid.scale == "auto" else DENSE_DTYPES[grid.scale]
        each: Planned = (scale, (out, columns // grid.group))
        return _Layout(shape, grid.bits, {"scale": each, "bias": each})
    if isinstance(grid, Qoq):
        steps: Planned = ("U8", (out, columns // grid.group))
        return _Layout(shape, 4, {"scale": ("F16", (out, 1)), "step": steps, "zero": steps})
    if isinstance(grid, GgmlFloat):
        return _Layout(shape, 4, _ggml_float_params(str(grid), shape))
    if isinstance(grid, Minifloat):
        return _Layout(shape, ELEMENTS[grid.element].bits, _minifloat_params(grid, shape))
    if isinstance(grid, Table):
        return _Layout(shape, 4, _table_params(grid, shape))
    if isinstance(grid, KQuant):
        return _Layout(shape, _KQUANT_BITS.get(str(grid), 0), _kquant_params(str(grid), shape))
    if isinstance(grid, Nonlinear):
        blocks: dict[str, Planned] = {"d": ("F16", (out, columns // grid.block[1]))}
        runs: dict[str, Planned] = {"scales": ("I8", (out, columns // 32))}
        return _Layout(shape, 4, blocks | runs if str(grid) == "iq4_xs" else blocks)
    if isinstance(grid, LlmInt8):
        return _Layout(shape, 0, {"absmax": ("F32", (out, 1))})
    if isinstance(grid, Spqr):
        return _Layout(shape, grid.bits, _spqr_params(grid, shape))
    if isinstance(grid, Ternary):
        return _Layout(shape, 2, {"scale": ("F32", (1, 1))})
    if isinstance(grid, Lattice):
        return _Layout((out, columns // 8), 16, {"scale": ("F32", (out, 1))})
    return None


def _minifloat_params(grid: Minifloat, shape: tuple[int, int]) -> Mapping[str, Planned]:
    out, columns = shape
    if grid.scaling == "mx":
        return {"exponent": ("U8", (out, columns // 32))}
    if grid.scaling == "nv":
        return {"scale": ("F8_E4M3", (out, columns // 16)), "gain": ("F32", ())}
    tiles = (-(-out // 128), -(-columns // 128))
    return {"scale": ("F32", {"channel": (out, 1), "tensor": (1, 1)}.get(grid.scaling, tiles))}


def _ggml_float_params(kind: str, shape: tuple[int, int]) -> Mapping[str, Planned]:
    out, columns = shape
    if kind == "mxfp4-floor":
        return {"exponent": ("U8", (out, columns // 32))}
    return {"scale": ("F8_E4M3", (out, columns // 16))}


def _kquant_params(kind: str, shape: tuple[int, int]) -> Mapping[str, Planned]:
    out, columns = shape
    if kind in ("q2_k", "q4_k", "q5_k"):
        wide, narrow = (out, columns // 256), (out, columns // (16 if kind == "q2_k" else 32))
        return {"d": ("F16", wide), "dmin": ("F16", wide), "scales": ("U8", narrow), "mins": ("U8", narrow)}
    if kind in ("q3_k", "q6_k"):
        return {"d": ("F16", (out, columns // 256)), "scales": ("I8", (out, columns // 16))}
    blocks = (out, columns // (256 if kind.startswith("tq") else 32))
    return dict.fromkeys(("d", "m") if kind.endswith("_1") else ("d",), ("F16", blocks))


def _table_params(grid: Table, shape: tuple[int, int]) -> Mapping[str, Planned]:
    out, columns = shape
    blocks = (out, columns // grid.width)
    if not grid.double:
        return {"absmax": ("F32", blocks)}
    count = blocks[0] * blocks[1]
    return {
        "absmax_code": ("U8", blocks),
        "absmax_scale": ("F32", (-(-count // 256),)),
        "absmax_offset": ("F32", ()),
    }


def _spqr_params(grid: Spqr, shape: tuple[int, int]) -> Mapping[str, Planned]:
    out, columns = shape
    params: dict[str, Planned] = dict.fromkeys(("scale", "zero"), ("U8", (out, columns // SIDE)))
    params.update(dict.fromkeys(PARTS, ("F16", (out // SIDE, columns // SIDE))))
    count = grid.apart(shape)
    params |= dict(zip(_OUTLIERS, (("I32", (out + 1,)), ("I32", (count,)), ("F16", (count,))), strict=True))
    return {**params, "order": ("I32", (1, columns))} if grid.act else params


def _sparse_params(grid: Spqr, quantized: Quantized) -> Mapping[str, Tensor]:
    """Outliers as rows of entries."""
    entries = sparse(quantized.params["outlier"], grid.apart(quantized.shape))
    return {**quantized.params, **dict(zip(_OUTLIERS, entries, strict=True))}


def _dense_params(params: dict[str, Tensor], shape: tuple[int, int], where: str) -> dict[str, Tensor]:
    """Inverse of :func:`_sparse_params`.

    Raises:
        BadFile: entries outside the matrix, codes of more than three bits, or an order that is none.
    """
    if int(torch.maximum(params["scale"].max(), params["zero"].max())) > TOP:
        raise BadFile("codes of its scales and zero points have three bits", where=where)
    offsets, columns, values = (params.pop(name) for name in _OUTLIERS)
    order = params.get("order")
    if order is not None and not torch.equal(order[0].sort().values, torch.arange(shape[1]).to(order.dtype)):
        raise BadFile("its order is none of its columns", where=where)
    try:
        if int(offsets[-1]) != len(columns):
            raise ValueError(f"offsets end at {int(offsets[-1])} of {len(columns)}")
        return {**params, "outlier": filled(rows_of(offsets), columns, values, shape)}
    except ValueError as error:
        raise BadFile(f"its outliers: {error}", where=where) from error


def _row(name: str, entry: object, where: str) -> Row:
    """What the map says about the weight ``name``, once it can be."""
    if not isinstance(entry, list) or len(entry) not in (3, 4, 5) or not isinstance(entry[0], str):
        raise BadFile(f"the entry of {name!r} is not a grid and two sizes", where=where)
    text, sizes, inputs = entry[0], entry[1:3], (entry[3] or None) if len(entry) > 3 else None
    turn = entry[4] if len(entry) == 5 else 0
    if not all(type(size) is int and 0 < size < _LARGEST for size in sizes):
        raise BadFile(f"{name!r} has the impossible shape {sizes}", where=where)
    try:
        grid = parse_grid(text)
        rounded = None if inputs is None else parse_inputs(str(inputs))
    except BadRecipe as error:
        raise BadFile(f"the grid {text!r} of {name!r} is not known", where=where) from error
    shape = (sizes[0], sizes[1])
    _check_turn(turn, sizes[1], f"{name} in {where}")
    if (
        (isinstance(grid, Dense) and not turn)
        or grid.refuses(shape)
        or (rounded is not None and rounded.refuses(sizes[1]))
    ):
        raise BadFile(f"{text} cannot hold {name!r} of shape {sizes}", where=where)
    return Row(name, "", None, shape, grid, True, "", None, rounded, turn=turn)


def _check_turn(turn: object, width: int, where: str) -> None:
    """Whether ``turn`` is the order of a matrix for runs of ``width`` channels, or 0.

    Raises:
        BadFile: it is not.
    """
    fits = type(turn) is int and 0 <= turn <= width and (turn == 0 or width % turn == 0)
    if not fits or (turn and hadamard.factors(int(str(turn))) is None):
        raise BadFile(f"{turn!r} is the order of no rotation of {width} channels", where=where)


def _packed(folder: TensorFolder, row: Row) -> Packed:
    """A weight, once every part's type and dimensions are certain."""
    shape = (row.shape[0], row.shape[1])
    if isinstance(row.grid, Dense):
        check_parts(folder, _planned(row))
        return Packed(shape, (row.name,), lambda: _unturned(folder.read(row.name), row.turn), _nothing)
    layout = _layout(row.grid, shape)
    if layout is None:
        raise BadFile(f"the layout of {row.grid} is not known", where=f"{row.name} in {folder.path}")
    parts = _planned(row)
    check_parts(folder, parts)

    def stored() -> Quantized:
        return _unpacked(folder, row.name, row.grid, shape, layout)

    if row.turn:
        return Packed(shape, tuple(parts), lambda: _unturned(stored().dense(), row.turn), _nothing)
    return from_quantized(shape, tuple(parts), stored)


def _unturned(stored: Tensor, turn: int) -> Tensor:
    """The weight for inputs that are not rotated, of one that is stored for rotated ones."""
    return Hadamard.plain(turn).undo(stored)


def _nothing() -> None:
    """No grid has values that were rotated after they were quantized."""


def _cache(folder: TensorFolder, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Inputs]:
    """How keys and values are rounded, if the settings say that they are."""
    text, turn = (config["quantization_config"].get(key) for key in ("cache", "keys"))
    if text is None:
        return {}
    head, where = head_dim(config), str(folder.path)
    _check_turn(turn or 0, head, f"keys in {where}")
    try:
        grid = parse_cache(str(text))
    except BadRecipe as error:
        raise BadFile(f"no cache is stored on {text!r}", where=where) from error
    reason = refuses_heads(grid, head)
    if reason is not None:
        raise BadFile(reason, where=where)
    basis = partial(Hadamard.plain, turn) if turn else None
    return known_cache(folder, grid, traits(config)["kv_heads"], attentions(config, names), basis)


def _inputs(folder: TensorFolder, name: str, grid: InputGrid, turn: int) -> Inputs:
    fixed = {key: folder.read(f"{name}.inputs.{key}") for key in grid.fixed}
    how = checked_inputs(grid, fixed, f"{name} in {folder.path}")
    return replace(how, basis=partial(Hadamard.plain, turn)) if turn else how


def _unpacked(
    folder: TensorFolder, name: str, grid: Grid, shape: tuple[int, int], layout: _Layout
) -> Quantized:
    codes = folder.read(f"{name}.codes")
    if layout.bits:
        codes = unpack(codes, layout.bits, layout.codes[1])
    params: dict[str, Tensor] = {}
    for key in layout.params:
        value = folder.read(f"{name}.{key}")
        whole = key in ("zero", "step") and not isinstance(grid, Spqr)
        params[key] = value.to(torch.float32) if value.is_floating_point() or whole else value
    if isinstance(grid, Spqr):
        params = _dense_params(params, shape, f"{name} in {folder.path}")
    if isinstance(grid, Qoq) and not fits_int8(params["step"], params["zero"]):
        raise BadFile("its steps and zero points lead out of int8", where=f"{name} in {folder.path}")
    return Quantized(grid, codes, params, shape)
