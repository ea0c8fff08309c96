"""torchao folders: what ``save_pretrained`` writes of a model in torchao's types, and transformers reloads.

A weight is one of torchao's tensor classes, taken apart into ``_weight_qdata`` and its parameters; which
class it is stands as JSON in the header's metadata (Or et al., arXiv 2507.16099). Weights only, in those
layouts that reload without a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.packed_folder import quantization_config
from bitmill.checkpoint.patterns import patterns
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    folder_images,
    model_config,
    to_bytes,
)
from bitmill.containers._torchao_read import open_folder
from bitmill.core.axes import Checkpoint, Container, Grid, torch_dtype
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer
from bitmill.grids.minifloat import Minifloat
from bitmill.numerics.bits import pack

METHOD = "torchao"

_WEIGHT = ".weight"
_FLOATS = {"e4m3": ("F8_E4M3", "float8_e4m3fn"), "e5m2": ("F8_E5M2", "float8_e5m2")}
_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}


@final
@dataclass(frozen=True)
class Torchao(Container):
    """A Hugging Face folder for torchao 0.18 or newer. Codes of fewer than 8 bits take a byte each, as
    torchao keeps them until a runtime packs them: the file is as large as with 8 bits."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        reason = _unknown(grid)
        if reason is not None:
            return reason
        if role not in LINEAR_ROLES:
            return f"its readers take only the layers of the blocks quantized, not the {role}"
        return grid.refuses(shape)

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Scales are single precision for 8 bits a row, else of the model's own type."""
        if not isinstance(grid, Integer) or grid.zero == "fz":
            return grid
        return replace(grid, scale="f32" if _by_row(grid) else dtype, zero_floor=0)

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: an expert of several is quantized, which transformers cannot put together.
        """
        config = model_config(source, rows)
        tensors = {name: planned for row in rows for name, planned in _planned(row).items()}
        # no dot in these names: the client takes a name with one for a weight's
        metadata = {f"bitmill_{key}": text for key, text in notes.items()}
        settings = _settings(rows)
        if settings:
            config["quantization_config"] = settings
            metadata |= {row.name: json.dumps(_described(row, config["dtype"])) for row in rows}
            metadata["tensor_names"] = json.dumps([row.name for row in rows])
        return folder_images(source, tensors, config, metadata)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        return {_part(row.name, name): to_bytes(value) for name, value in _parts(quantized).items()}


def _unknown(grid: Grid) -> str | None:
    """Why no layout holds ``grid``, and which container would."""
    if isinstance(grid, Integer):
        if grid.zero == "fz":
            return "its zero points are whole numbers: say -asym, or write > bitmill"
        return "it has no layout with one scale for a whole integer tensor" if grid.group == -1 else None
    if isinstance(grid, Minifloat):
        if grid.scaling == "nv" or (grid.element in _FLOATS and grid.scaling in ("channel", "tensor")):
            return None
        if grid.scaling == "mx":
            return f"torchao has no weights in {grid} without activations in it: write > compressed-tensors"
    return f"it holds integers, FP8 by channel or tensor, and NVFP4, not {grid}; > bitmill holds nearly all"


def _by_row(grid: Integer) -> bool:
    """Whether torchao's own int8 class holds it."""
    return (grid.bits, grid.group, grid.zero) == (8, 0, "sym")


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix(_WEIGHT)}._weight_{part}"


def _planned(row: Row) -> dict[str, Planned]:
    grid = row.grid
    if isinstance(grid, Dense):
        return {row.name: (DENSE_DTYPES[str(grid)], row.shape)}
    if not row.name.endswith(_WEIGHT) or is_expert(row.name):
        raise Refused(
            "transformers does not put experts of torchao's together, nor anything but weights",
            where=row.name,
            fix="> compressed-tensors, or keep this role",
        )
    out, columns = row.shape
    if isinstance(grid, Integer):
        groups = (out, columns // (grid.group or columns))
        parts: dict[str, Planned] = {
            "qdata": ("I8", row.shape),
            "scale": (DENSE_DTYPES[grid.scale], groups),
            "zero_point": ("I8", groups),
        }
    elif isinstance(grid, Minifloat) and grid.scaling == "nv":
        scales = ("F8_E4M3", (out, columns // 16))
        parts = {"qdata": ("U8", (out, columns // 2)), "scale": scales, "per_tensor_scale": ("F32", ())}
    elif isinstance(grid, Minifloat):
        rows = out if grid.scaling == "channel" else 1
        parts = {"qdata": (_FLOATS[grid.element][0], row.shape), "scale": ("F32", (rows, 1))}
    else:
        raise ValueError(f"no layout holds {grid}")
    return {_part(row.name, name): planned for name, planned in parts.items()}


def _parts(quantized: Quantized) -> dict[str, Tensor]:
    grid, params, codes = quantized.grid, quantized.params, quantized.codes
    if isinstance(grid, Integer):
        half = 2 ** (grid.bits - 1)
        zero = params.get("zero", torch.full_like(params["scale"], half))
        return {
            "qdata": (codes.to(torch.int16) - half).to(torch.int8),
            "scale": exactly(params["scale"], torch_dtype(grid.scale)),
            "zero_point": exactly(zero - half, torch.int8),
        }
    if isinstance(grid, Minifloat) and grid.scaling == "nv":
        scale = exactly(params["scale"], torch.float8_e4m3fn)
        return {"qdata": pack(codes, 4, 8), "scale": scale, "per_tensor_scale": 1 / params["gain"]}
    return {"qdata": codes, "scale": params["scale"].to(torch.float32)}


def _described(row: Row, dtype: str) -> dict[str, Any]:
    """What the metadata says about one tensor: the class, its attributes, its parts."""
    grid, whole = row.grid, {"_type": "torch.dtype", "_data": dtype}
    if isinstance(grid, Integer):
        block = [1, grid.group or row.shape[1]]
        parts = ["qdata", "scale", "zero_point"]
        if _by_row(grid):
            about: dict[str, Any] = {"act_quant_kwargs": None, "reduce_range": False}
            return _class("Int8Tensor", {**about, "block_size": block, "dtype": whole}, parts)
        target = {"_type": "torch.dtype", "_data": f"int{grid.bits}"}
        about = {"target_dtype": target, "block_size": block, "dtype": whole, "activation_quantization": None}
        return _class("IntxUnpackedToInt8Tensor", about, parts)
    if isinstance(grid, Minifloat) and grid.scaling == "nv":
        about = {"is_swizzled_scales": False, "use_triton_kernel": False, "act_quant_kwargs": None}
        about |= {"block_size": 16, "orig_dtype": whole}
        return _class("NVFP4Tensor", about, ["per_tensor_scale", "qdata", "scale"])
    if isinstance(grid, Minifloat):
        rows = 1 if grid.scaling == "channel" else row.shape[0]
        about = {"block_size": [rows, row.shape[1]], "mm_config": None, "act_quant_kwargs": None}
        about |= {"kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}, "dtype": whole}
        return _class("Float8Tensor", about, ["qdata", "scale"])
    return {"_type": "Tensor"}


def _class(name: str, attributes: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    return {"_type": name, "_data": dict(attributes), "_tensor_data_names": list(parts)}


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized."""
    groups: dict[Grid, list[str]] = {}
    layers = [r.name.removesuffix(_WEIGHT) for r in rows if len(r.shape) == 2 and r.role != "embed"]
    for row in rows:
        if not isinstance(row.grid, Dense):
            groups.setdefault(row.grid, []).append(row.name.removesuffix(_WEIGHT))
    if not groups:
        return {}
    chosen = {module for members in groups.values() for module in members}
    made = _config(next(iter(groups)))
    if len(groups) > 1:
        named = {
            f"re:{text}" if regular else text: _config(grid)
            for grid, members in groups.items()
            for text, regular in patterns(members, layers)
        }
        both = {"fqn_to_config": named, "module_fqn_to_config": named}
        made = {"_type": "FqnToConfig", "_version": 1, "_data": both}
    return {
        "quant_method": METHOD,
        "quant_type": {"default": made},
        "modules_to_not_convert": list(dict.fromkeys([*(m for m in layers if m not in chosen), "lm_head"])),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _config(grid: Grid) -> dict[str, Any]:
    """torchao's own configuration that would make such weights, as it writes it down."""
    if isinstance(grid, Integer) and _by_row(grid):
        about: dict[str, Any] = {"group_size": None, "granularity": _PER_ROW, "set_inductor_config": True}
        return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": about}
    if isinstance(grid, Integer):
        width: dict[str, Any] = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
        if grid.group:
            width = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": grid.group}}
        mapping = "SYMMETRIC" if grid.zero == "sym" else "ASYMMETRIC"
        about = {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{grid.bits}"},
            "granularity": width,
            "mapping_type": {"_type": "MappingType", "_data": mapping},
            "scale_dtype": None,
            "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
            "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        }
        return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": about}
    if isinstance(grid, Minifloat) and grid.scaling == "nv":
        about = {"use_dynamic_per_tensor_scale": True}
        return {"_type": "NVFP4WeightOnlyConfig", "_version": 1, "_data": about}
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    whole = {"_type": "PerTensor", "_version": 1, "_data": {}}
    about = {
        "weight_dtype": {"_type": "torch.dtype", "_data": _FLOATS[grid.element][1]},
        "granularity": _PER_ROW if grid.scaling == "channel" else whole,
        "set_inductor_config": True,
    }
    return {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": about}
