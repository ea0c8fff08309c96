"""Reading compressed-tensors folders, whoever wrote them: a layer's group, its grid, its codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import (
    Packed,
    PackedFolder,
    checked_inputs,
    from_quantized,
    known_cache,
    one_number,
)
from bitmill.checkpoint.patterns import compiled
from bitmill.checkpoint.rotations import Rotation, basis_of_inputs, folded, is_matrix, rotations
from bitmill.checkpoint.safetensors import DENSE, TensorFolder
from bitmill.core.axes import Grid
from bitmill.core.errors import BadFile, Refused
from bitmill.core.inputs import InputGrid, find_inputs, is_cache
from bitmill.core.types import Inputs, Quantized
from bitmill.families.base import attentions, describe, head_dim, traits
from bitmill.grids.integer import Integer
from bitmill.grids.minifloat import Minifloat
from bitmill.numerics.bits import packed_words, unpack
from bitmill.numerics.floats import ELEMENTS

_SCALE = ".weight_scale"
_ASIDE = re.compile(
    r"\.(?:input_scale|input_zero_point|input_global_scale|output_scale|[kqv]_scale|[kqv]_zero_point)$"
)
_LARGEST = 1 << 31
_FIXED = {"scale": "input_scale", "zero": "input_zero_point", "gain": "input_global_scale"}
_E4M3 = {"tensor": "tensor", "channel": "channel", "block": "b128"}


def open_folder(path: Path) -> PackedFolder:
    """The folder as a checkpoint. What the model rotates while it runs is folded into its weights, which are
    then dense to a reader.

    Raises:
        Refused: layouts that no grid here describes, rotations that cannot be folded, a cache in other ways
            than with fixed scales.
        BadFile: settings and tensors do not fit together.
    """
    folder, config = TensorFolder(path), read_config(path)
    settings = config["quantization_config"]
    asked = rotations(settings, path)
    also = settings.get("transform_config") or settings.get("kv_cache_scheme")
    groups = _checked_groups(settings, path) if settings.get("config_groups") or not also else []
    packed, inputs = {}, {}
    for name in folder.records:
        if name.endswith(_SCALE):
            module = name.removesuffix(_SCALE)
            about, rounds = _group_of(module, groups, path)
            weight = packed[f"{module}.weight"] = _weight(folder, module, about)
            if rounds is not None:
                inputs[f"{module}.weight"] = _inputs(folder, module, rounds, weight.shape[1])
    matrices = {name for name in folder.records if is_matrix(name, asked)}
    if asked:
        _fold(folder, config, asked, packed, inputs, matrices)
    aside = {name for name in folder.records if _ASIDE.search(name)}
    cache = _cache(folder, config, [*folder.records, *packed])
    if cache and any(rotation.location == "q_attn" for rotation in asked):
        raise Refused(
            "queries are rotated, and with a rounded cache its runtime rounds them, too: not simulated here",
            where=f"{path}: kv_cache_scheme",
            fix="give the original model; without that key in config.json the weights can be read",
        )
    return PackedFolder(folder, config, packed, aside, inputs, matrices, cache)


def _fold(
    folder: TensorFolder,
    config: Mapping[str, Any],
    asked: Sequence[Rotation],
    packed: dict[str, Packed],
    inputs: dict[str, Inputs],
    matrices: Collection[str],
) -> None:
    """Replace the weights of layers that are rotated while the model runs by those of one that is not; inputs
    that are rounded between rotation and product keep the basis where that is done.

    Raises:
        Refused: that basis is not orthogonal, or it is not a linear layer that is rotated.
    """
    family = describe(config)
    layers = dict.fromkeys(name.removesuffix(".weight") for name in packed)
    for name, record in folder.records.items():
        dense = record.dtype in DENSE and len(record.shape) == 2 and name not in matrices
        if dense and name.endswith(".weight") and family.role(name)[0] != "embed":
            layers[name.removesuffix(".weight")] = None

    def names(targets: Sequence[str], module: str) -> bool:
        return any(
            t in (module, "Linear") or (t.startswith("re:") and _matches(t[3:], module, folder.path))
            for t in targets
        )

    for rotation in asked:
        for target in rotation.targets:
            if not any(names((target,), module) for module in layers):
                raise Refused(
                    f"the model rotates {target!r}, which is no linear layer", where=str(folder.path)
                )
    for module in layers:
        name = f"{module}.weight"
        stored = packed.get(name)
        shape = stored.shape if stored is not None else folder.record(name).shape
        turn = folded(folder, module, (shape[0], shape[1]), asked, names)
        if turn is None:
            continue
        if name in inputs:
            basis = basis_of_inputs(folder, module, shape[1], asked, names)
            inputs[name] = replace(inputs[name], basis=basis)
        read = stored.dense if stored is not None else partial(folder.read, name)
        parts = stored.parts if stored is not None else (name,)
        packed[name] = Packed(shape, parts, partial(_turned, read, turn), _nothing)


def _turned(read: Callable[[], Tensor], turn: Callable[[Tensor], Tensor]) -> Tensor:
    return turn(read())


def _nothing() -> None:
    """No grid has values that were rotated after they were quantized, or columns in an order of their own."""


_Group = tuple[Mapping[str, Any], Mapping[str, Any] | None]
"""Descriptions of the weights and of the inputs of some layers."""


def _checked_groups(settings: Mapping[str, Any], path: Path) -> list[tuple[list[str], _Group]]:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise BadFile("quantization_config has no config_groups", where=str(path))
    checked: list[tuple[list[str], _Group]] = []
    for name, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise BadFile(f"{name} has no targets", where=str(path))
        inputs, outputs = group.get("input_activations"), group.get("output_activations")
        if outputs or (inputs and not isinstance(weights, dict)):
            what = "outputs of layers" if outputs else "inputs of layers whose weights are dense"
            raise Refused(
                f"the model rounds {what} while it runs, which is not simulated here",
                where=f"{path}: {name}",
                fix="give the original model",
            )
        if inputs and not isinstance(inputs, dict):
            raise BadFile(f"inputs described as {inputs!r} mean nothing", where=f"{path}: {name}")
        if isinstance(weights, dict):
            checked.append((targets, (weights, inputs or None)))
    return checked


def _group_of(module: str, groups: Sequence[tuple[list[str], _Group]], path: Path) -> _Group:
    """The group that names ``module``; a class name (``Linear``) stands for all the rest."""
    rest = []
    for targets, group in groups:
        for target in targets:
            if target == module or (target.startswith("re:") and _matches(target[3:], module, path)):
                return group
            if target[:1].isupper():
                rest.append(group)
    if not rest:
        raise BadFile(f"{module!r} is quantized and belongs to no group", where=f"{path}: config_groups")
    return rest[0]


def _matches(pattern: str, module: str, path: Path) -> bool:
    return compiled(pattern, f"{path}: config_groups").match(module) is not None


def _inputs(folder: TensorFolder, module: str, about: Mapping[str, Any], columns: int) -> Inputs:
    """How the inputs of ``module`` are rounded.

    Raises:
        Refused: in a way that is not known here.
        BadFile: what calibration fixed is missing, or is no scale.
    """
    grid = _input_grid(about)
    where = f"{module} in {folder.path}"
    if grid is None:
        raise Refused(f"inputs rounded as {dict(about)} cannot be simulated here", where=where)
    reason = grid.refuses(columns)
    if reason is not None:
        raise BadFile(reason, where=where)
    types = {"zero": ("I8", "U8", "I32", *DENSE)}
    fixed = {
        key: one_number(folder, f"{module}.{_FIXED[key]}", types.get(key, tuple(DENSE))) for key in grid.fixed
    }
    return checked_inputs(grid, fixed, where)


def _cache(folder: TensorFolder, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Inputs]:
    """How keys and values are rounded on their way into the cache; scales that the settings do not speak of
    are left.

    Raises:
        Refused: in a way that is not known here.
        BadFile: the scales are missing, or are none.
    """
    about, where = config["quantization_config"].get("kv_cache_scheme"), f"{folder.path}: kv_cache_scheme"
    if about is None:
        return {}
    if not isinstance(about, dict):
        raise BadFile(f"a cache described as {about!r} means nothing", where=where)
    grid, head = _input_grid(about), head_dim(config)
    if grid is None or not is_cache(grid) or grid.extent == "token" or (grid.group and head % grid.group):
        raise Refused(
            f"keys and values rounded as {about} cannot be simulated here",
            where=where,
            fix="give the original model; without that key in config.json the weights can be read",
        )
    if grid.group == head:
        grid = replace(grid, extent="token", group=0)
    return known_cache(folder, grid, traits(config)["kv_heads"], attentions(config, names))


def _input_grid(about: Mapping[str, Any]) -> InputGrid | None:
    """The input grid that a description means, or None."""
    bits, kind, width = about.get("num_bits", 8), about.get("type", "int"), about.get("group_size")
    strategy, dynamic = about.get("strategy"), about.get("dynamic", False)
    if type(bits) is not int:
        return None
    if strategy is None:
        strategy = "tensor" if width is None else "group"
    symmetric, scales = about.get("symmetric", True), about.get("scale_dtype")
    if strategy == "tensor_group":
        nested = (kind, bits, width, dynamic, symmetric) == ("float", 4, 16, "local", True)
        return find_inputs("nvfp4") if nested else None
    if (kind, strategy, width, scales, dynamic, symmetric) == (
        "float",
        "group",
        32,
        "torch.uint8",
        True,
        True,
    ):
        return find_inputs({8: "mxfp8", 6: "mxfp6-e2m3", 4: "mxfp4"}.get(bits, ""))
    if scales not in (None, "torch.float32") or type(dynamic) is not bool:
        return None
    extent = f"g{width}-token" if strategy == "group" else "head" if strategy == "attn_head" else strategy
    element = "fp8-e4m3" if (kind, bits) == ("float", 8) else f"int{bits}" if kind == "int" else ""
    return find_inputs(f"{element}-{extent}{'' if dynamic else '-static'}{'' if symmetric else '-asym'}")


def _weight(folder: TensorFolder, module: str, about: Mapping[str, Any]) -> Packed:
    grid = _grid(folder, module, about)
    whole = f"{module}.weight"
    plain = whole in folder.records
    stored = folder.record(whole if plain else f"{module}.weight_packed")
    if len(stored.shape) != 2:
        raise BadFile(f"{stored.name!r} has {len(stored.shape)} dimensions", where=str(stored.path))
    shape = _shape(folder, module, grid) if not plain else (stored.shape[0], stored.shape[1])
    reason = grid.refuses(shape)
    if reason is not None:
        raise BadFile(reason, where=f"{module} in {folder.path}")
    parts = _expected(grid, shape, plain)
    for name, (types, dimensions) in parts.items():
        record = folder.record(f"{module}.{name}")
        if record.dtype not in types or record.shape not in dimensions:
            wanted = f"{'/'.join(types)} {list(dimensions[0])}"
            raise BadFile(
                f"{record.name!r} is {record.dtype} {list(record.shape)} and must be {wanted}",
                where=str(record.path),
            )
    names = tuple(f"{module}.{name}" for name in parts)
    unpacked = partial(_unpacked, folder, module, grid, shape, plain)
    if f"{module}.weight_g_idx" not in folder.records:
        return from_quantized(shape, names, unpacked)
    order, names = _order(folder, module, grid, shape), (*names, f"{module}.weight_g_idx")
    if order is None:
        return from_quantized(shape, names, unpacked)
    return Packed(shape, names, partial(_scattered, unpacked, order), _nothing)


def _order(folder: TensorFolder, module: str, grid: Grid, shape: tuple[int, int]) -> Tensor | None:
    """The group of each column, where groups are scattered over the columns (``actorder`` by group).

    Raises:
        BadFile: it is no such list.
    """
    record = folder.record(f"{module}.weight_g_idx")
    width = grid.group if isinstance(grid, Integer) and grid.group > 0 else 0
    if record.dtype not in ("I32", "I64") or record.shape != (shape[1],) or not width:
        raise BadFile(f"{record.name!r} is not the group of each column", where=str(record.path))
    order = folder.read(record.name).to(torch.int64)
    if bool((order == -1).all()) or torch.equal(order, torch.arange(shape[1]) // width):
        return None
    if int(order.min()) < 0 or int(order.max()) >= shape[1] // width:
        raise BadFile(f"{record.name!r} names groups that do not exist", where=str(record.path))
    return order


def _scattered(unpacked: Callable[[], Quantized], order: Tensor) -> Tensor:
    stored = unpacked()
    half = 2.0 ** (stored.grid.bits - 1) if isinstance(stored.grid, Integer) else 0.0
    zero = stored.params.get("zero", torch.full_like(stored.params["scale"], half))
    return (stored.codes.to(torch.float32) - zero[:, order]) * stored.params["scale"][:, order]


def _grid(folder: TensorFolder, module: str, about: Mapping[str, Any]) -> Grid:
    """The grid that a description of weights means.

    Raises:
        Refused: none here.
    """
    scale = folder.record(f"{module}{_SCALE}").dtype
    bits, width, strategy = about.get("num_bits"), about.get("group_size"), about.get("strategy")
    if strategy is None:
        strategy = "tensor" if width is None else "channel" if width == -1 else "group"
    if type(bits) is not int or not isinstance(strategy, str):
        raise BadFile(f"weights described as {dict(about)} mean nothing", where=f"{module} in {folder.path}")
    if about.get("type", "int") == "int" and bits in range(2, 9) and scale in DENSE:
        group = {"channel": 0, "tensor": -1}.get(strategy, width)
        if type(group) is int and group >= -1 and strategy in ("channel", "tensor", "group"):
            zero = "sym" if about.get("symmetric", True) else "asym"
            return Integer(bits, group, zero, DENSE[scale])
    if about.get("type") == "float" and about.get("symmetric", True):
        element = {4: "e2m1", 6: "e2m3", 8: "e4m3"}.get(bits)
        if element and strategy == "tensor_group" and (bits, width) == (4, 16):
            return Minifloat(element, "nv")
        if element and strategy == "group" and width == 32 and scale == "U8":
            return Minifloat(element, "mx")
        square = about.get("block_structure") in ([128, 128], "128x128")
        if element == "e4m3" and strategy in _E4M3 and (strategy != "block" or square) and scale in DENSE:
            return Minifloat(element, _E4M3[strategy])
    raise Refused(f"weights stored as {dict(about)} cannot be read here", where=f"{module} in {folder.path}")


def _shape(folder: TensorFolder, module: str, grid: Grid) -> tuple[int, int]:
    if isinstance(grid, Integer):
        record = folder.record(f"{module}.weight_shape")
        if (record.dtype, record.shape) not in (("I64", (2,)), ("I32", (2,))):
            raise BadFile(f"{record.name!r} is not two whole numbers", where=str(record.path))
        rows, columns = (int(v) for v in folder.read(record.name))
    else:
        rows, width = folder.record(f"{module}.weight_packed").shape
        columns = width * 8 // ELEMENTS[grid.element].bits if isinstance(grid, Minifloat) else 0
    if not (0 < rows < _LARGEST and 0 < columns < _LARGEST):
        raise BadFile(f"{module!r} has the impossible shape {[rows, columns]}", where=str(folder.path))
    return rows, columns


Expected = dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]
"""Element types and dimensions a part may have."""


def _expected(grid: Grid, shape: tuple[int, int], plain: bool) -> Expected:
    out, columns = shape
    dense = tuple(DENSE)
    if isinstance(grid, Integer):
        groups = columns // grid.group if grid.group > 0 else 1
        scales = ((1,), (), (1, 1)) if grid.group == -1 else ((out, groups),)
        if plain:
            parts: Expected = {"weight": (("I8",), (shape,)), "weight_scale": (dense, scales)}
            return {**parts, "weight_zero_point": (("I8",), scales)} if grid.zero == "asym" else parts
        parts = {
            "weight_packed": (("I32",), ((out, packed_words(columns, grid.bits)),)),
            "weight_scale": (dense, scales),
            "weight_shape": (("I64", "I32"), ((2,),)),
        }
        zeros = ((packed_words(out, grid.bits), groups),)
        return {**parts, "weight_zero_point": (("I32",), zeros)} if grid.zero == "asym" else parts
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    bits = ELEMENTS[grid.element].bits
    codes: Expected = {"weight": (("F8_E4M3",), (shape,))}
    if bits < 8:
        codes = {"weight_packed": (("U8",), ((out, columns * bits // 8),))}
    if grid.scaling == "mx":
        return {**codes, "weight_scale": (("U8",), ((out, columns // 32),))}
    if grid.scaling == "nv":
        shared: Expected = {"weight_global_scale": (("F32",), ((1,), ()))}
        return {**codes, "weight_scale": (("F8_E4M3",), ((out, columns // 16),)), **shared}
    tiles = (-(-out // 128), -(-columns // 128))
    possible: dict[str, tuple[tuple[int, ...], ...]] = {
        "channel": ((out, 1),),
        "tensor": ((1,), (), (1, 1)),
    }
    return {**codes, "weight_scale": (dense, possible.get(grid.scaling, (tiles,)))}


def _unpacked(
    folder: TensorFolder, module: str, grid: Grid, shape: tuple[int, int], plain: bool
) -> Quantized:
    def part(name: str) -> Tensor:
        return folder.read(f"{module}.{name}")

    if isinstance(grid, Integer):
        return _integer(part, grid, shape, plain)
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    bits = ELEMENTS[grid.element].bits
    codes = part("weight").view(torch.uint8) if bits == 8 else unpack(part("weight_packed"), bits, shape[1])
    scale = part("weight_scale")
    if grid.scaling == "mx":
        return Quantized(grid, codes, {"exponent": scale}, shape)
    scale = scale.to(torch.float32)
    if grid.scaling == "nv":
        return Quantized(
            grid, codes, {"scale": scale, "gain": part("weight_global_scale").reshape(())}, shape
        )
    return Quantized(
        grid, codes, {"scale": scale.reshape(1, 1) if grid.scaling == "tensor" else scale}, shape
    )


def _integer(part: Any, grid: Integer, shape: tuple[int, int], plain: bool) -> Quantized:
    half = 2 ** (grid.bits - 1)
    scale = part("weight_scale").to(torch.float32)
    params = {"scale": scale.reshape(1, 1) if grid.group == -1 else scale}
    if plain:
        codes = (part("weight").to(torch.int16) + half).clamp(0, 2 * half - 1).to(torch.uint8)
    else:
        codes = unpack(part("weight_packed"), grid.bits, shape[1])
    if grid.zero == "asym":
        zero = part("weight_zero_point")
        zero = zero.to(torch.float32) + half if plain else unpack(zero.T.contiguous(), grid.bits, shape[0]).T
        params["zero"] = zero.reshape(params["scale"].shape).to(torch.float32)
    return Quantized(grid, codes, params, shape)
