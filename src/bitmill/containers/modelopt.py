"""Folders of NVIDIA's ModelOpt in FP8, MXFP8 and NVFP4, which TensorRT-LLM, vLLM and SGLang load. Read only.

An NVFP4 value is element · ``weight_scale`` · ``weight_scale_2`` (one over compressed-tensors' global scale);
an FP8 value is element · ``weight_scale``. Inputs of layers are rounded as its runtimes do it, in ``measure``
and ``load`` too: to FP8 or NVFP4 by the ``input_scale`` beside the weight, where there is one; as they come,
to FP8 a token where a weight has a scale a channel, and to ``mxfp8-ceil`` where it is MXFP8. So are
keys and values of an FP8 cache, by ``k_scale`` and ``v_scale`` or, where none is stored, by 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from bitmill.checkpoint.hf_folder import read_config, read_object
from bitmill.checkpoint.packed_folder import (
    Packed,
    PackedFolder,
    checked_inputs,
    from_quantized,
    one_number,
    quantization_config,
    stored_cache,
)
from bitmill.checkpoint.read_only import ReadOnly
from bitmill.checkpoint.safetensors import Record, TensorFolder
from bitmill.core.axes import Checkpoint
from bitmill.core.cache_words import parse_cache
from bitmill.core.errors import BadFile, Refused
from bitmill.core.inputs import parse_inputs
from bitmill.core.types import Inputs, Quantized
from bitmill.families.base import describe, traits
from bitmill.grids.minifloat import Minifloat
from bitmill.numerics.bits import unpack
from bitmill.numerics.cache import KEYS, VALUES

METHOD = "modelopt"

_BESIDE = "hf_quant_config.json"
_READ = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
    None,
)
_ASIDE = re.compile(r"\.(?:input_scale|output_scale|[kqv]_scale)$")
_WEIGHT = ".weight"


@final
@dataclass(frozen=True)
class Modelopt(ReadOnly):
    """A source: layers in FP8 by tensor or channel, in MXFP8 and in NVFP4, mixed as they come."""

    single_file: ClassVar[bool] = False

    @property
    def why(self) -> str:
        return (
            "ModelOpt's folders are read, not written: their readers want calibrated scales of activations, "
            "and a GPU to check with; write > compressed-tensors, which the same engines load"
        )

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Older exports say so beside config.json only."""
        if quantization_config(path, METHOD) is not None:
            return True
        beside = path / _BESIDE
        if not path.is_dir() or not beside.is_file() or not (path / "config.json").is_file():
            return False
        return "quantization_config" not in read_config(path) and "quantization" in read_object(beside)

    def open(self, path: Path) -> Checkpoint:
        """The folder as a checkpoint.

        Raises:
            Refused: a layout that is not read here, or inputs that are scaled before a layer.
            BadFile: parts do not fit together.
        """
        folder, config = TensorFolder(path), read_config(path)
        settings = config.get("quantization_config")
        if settings is None:
            settings = read_object(path / _BESIDE).get("quantization")
        if not isinstance(settings, dict):
            raise BadFile("the quantization is not described", where=str(path / _BESIDE))
        _refuse(settings, folder, path)
        packed, inputs = {}, {}
        family = describe(config)
        for name, record in folder.records.items():
            if name.endswith(_WEIGHT) and f"{name}_scale" in folder.records:
                packed[name], grid = _weight(folder, record)
                told = _inputs(folder, name, grid) if family.role(name)[0] != "embed" else None
                if told is not None:
                    inputs[name] = told
        aside = {name for name in folder.records if _ASIDE.search(name)}
        whole = {**config, "quantization_config": settings}
        cache = _cache(folder, settings, traits(config)["kv_heads"])
        return PackedFolder(folder, whole, packed, aside, inputs, cache=cache)


def _cache(folder: TensorFolder, settings: Mapping[str, Any], heads: int) -> dict[str, Inputs]:
    """How keys and values are rounded; a scale that is not stored is 1, as its runtimes take it.

    Raises:
        Refused: in a way that is not known here.
        BadFile: a scale is none.
    """
    about = settings.get("kv_cache_scheme")
    said = about if isinstance(about, dict) else {}
    float8 = (said.get("num_bits"), said.get("type"), said.get("dynamic", False)) == (8, "float", False)
    algorithm = settings.get("kv_cache_quant_algo", "FP8" if float8 else about)
    if algorithm is None:
        return {}
    if algorithm != "FP8":
        raise Refused(
            f"keys and values rounded as {algorithm!r} cannot be simulated here",
            where=f"{folder.path}: kv_cache_quant_algo",
            fix="give the original model; without that key in its settings the weights can be read",
        )
    grid = parse_cache("fp8")
    ends = (".k_proj.weight", ".v_proj.weight")
    plain = Inputs(grid, {"scale": torch.ones(1)})
    attentions = {
        name.rpartition(".")[0].rpartition(".")[0] for name in folder.records if name.endswith(ends)
    }
    unstored = {f"{path}.{part}": plain for path in attentions for part in (KEYS, VALUES)}
    return {**unstored, **stored_cache(folder, grid, heads)}


def _refuse(settings: Mapping[str, Any], folder: TensorFolder, path: Path) -> None:
    algorithm = settings.get("quant_algo")
    if algorithm not in _READ:
        raise Refused(
            f"ModelOpt's {algorithm!r} cannot be read here",
            where=str(path),
            fix="give the original model, or an export in FP8, MXFP8 or NVFP4",
        )
    for name in folder.records:
        if name.endswith(".pre_quant_scale") or ".weight_svd" in name or ".svdquant_lora" in name:
            raise Refused(
                f"{name!r} changes what a layer computes while the model runs",
                where=str(path),
                fix="give the original model",
            )


def _inputs(folder: TensorFolder, weight: str, grid: Minifloat) -> Inputs | None:
    """What a layer rounds its inputs to.

    Raises:
        BadFile: its fixed scale is none.
    """
    name = f"{weight.removesuffix(_WEIGHT)}.input_scale"
    if grid.scaling == "mx":
        return Inputs(parse_inputs("mxfp8-ceil"))
    if name not in folder.records:
        return Inputs(parse_inputs("fp8-e4m3-token")) if grid.scaling == "channel" else None
    scale, where = one_number(folder, name).to(torch.float32), f"{name} in {folder.path}"
    if grid.scaling == "nv":
        return checked_inputs(parse_inputs("nvfp4"), {"gain": 1 / scale}, where)
    return checked_inputs(parse_inputs("fp8-e4m3-tensor-static"), {"scale": scale}, where)


def _weight(folder: TensorFolder, weight: Record) -> tuple[Packed, Minifloat]:
    """One weight, by how it is stored, and its grid.

    Raises:
        BadFile: its parts do not have the types and shapes of any layout.
    """
    scale = folder.record(f"{weight.name}_scale")
    whole = folder.records.get(f"{weight.name}_scale_2")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise BadFile(f"{weight.name!r} has the shape {list(weight.shape)}", where=str(weight.path))
    out, columns = weight.shape
    parts = tuple(r.name for r in (weight, scale, whole) if r is not None)
    nested = ("U8", "F8_E4M3", (out, columns * 2 // 16), "F32", 1)
    if whole is not None:
        size = 1 if whole.shape in ((), (1,)) else 0
        if (weight.dtype, scale.dtype, scale.shape, whole.dtype, size) == nested and columns % 8 == 0:
            shape = (out, columns * 2)
            unpack_it = partial(_nvfp4, folder, weight.name, shape)
            return from_quantized(shape, parts, unpack_it), Minifloat("e2m1", "nv")
    elif weight.dtype == "F8_E4M3":
        grid = None
        if (scale.dtype, scale.shape) == ("U8", (out, columns // 32)) and columns % 32 == 0:
            grid = Minifloat("e4m3", "mx")
        elif scale.dtype in ("F32", "F16", "BF16") and scale.shape in ((), (1,)):
            grid = Minifloat("e4m3", "tensor")
        elif scale.dtype in ("F32", "F16", "BF16") and scale.shape in ((out,), (out, 1)):
            grid = Minifloat("e4m3", "channel")
        if grid is not None:
            return from_quantized((out, columns), parts, partial(_fp8, folder, weight.name, grid)), grid
    stored = ", ".join(f"{folder.record(p).dtype} {list(folder.record(p).shape)}" for p in parts)
    raise BadFile(f"{weight.name!r} is stored as {stored}, which no layout has", where=str(weight.path))


def _nvfp4(folder: TensorFolder, name: str, shape: tuple[int, int]) -> Quantized:
    codes = unpack(folder.read(name), 4, shape[1])
    scale = folder.read(f"{name}_scale").to(torch.float32)
    gain = 1 / folder.read(f"{name}_scale_2").reshape(())
    return Quantized(Minifloat("e2m1", "nv"), codes, {"scale": scale, "gain": gain}, shape)


def _fp8(folder: TensorFolder, name: str, grid: Minifloat) -> Quantized:
    codes, scale = folder.read(name).view(torch.uint8), folder.read(f"{name}_scale")
    shape = (codes.shape[0], codes.shape[1])
    if grid.scaling == "mx":
        return Quantized(grid, codes, {"exponent": scale}, shape)
    return Quantized(grid, codes, {"scale": scale.to(torch.float32).reshape(-1, 1)}, shape)
