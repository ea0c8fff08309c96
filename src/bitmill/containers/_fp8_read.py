"""Reading FP8 folders, whoever wrote them: which scale belongs to a weight, the tiles it stands for, and what
the layers round their inputs to where they multiply in FP8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, checked_inputs, one_number
from bitmill.checkpoint.safetensors import DENSE, Record, TensorFolder
from bitmill.core.errors import BadFile
from bitmill.core.inputs import parse_inputs
from bitmill.core.types import Inputs, Quantized
from bitmill.families.base import describe
from bitmill.grids.minifloat import Minifloat
from bitmill.numerics.bits import unpack
from bitmill.numerics.floats import ELEMENTS, decode, power_of_two

_ELEMENT = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "I8": "e2m1"}
"""Stored element types; signed bytes hold two E2M1 numbers, the first in the low half."""
_POWERS = ("U8", "F8_E8M0")
_SCALES = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
"""Names of a weight's scale: DeepSeek-V3's and transformers', AutoFP8's, DeepSeek-V4's, Mistral's."""
_FIXED = (".activation_scale", ".input_scale", ".qscale_act")
"""Names of the fixed scale of a layer's inputs: transformers', AutoFP8's, Mistral's."""
_ASIDE = re.compile(r"\.(?:activation_scale|input_scale|qscale_act|output_scale|[kqv]_scale)$")


def open_folder(path: Path) -> PackedFolder:
    """The folder as a checkpoint. Scales of a cache are left aside.

    Raises:
        BadFile: settings and tensors do not fit together.
    """
    folder, config = TensorFolder(path), read_config(path)
    settings = config["quantization_config"]
    block, scheme = _declared(settings, path), _scheme(settings, path)
    family = describe(config)
    packed, inputs = {}, {}
    for name, record in folder.records.items():
        if name.endswith(".weight") and record.dtype in _ELEMENT:
            stored = _stored(folder, record, block)
            parts = (stored.weight.name, stored.scale.name)
            packed[name] = Packed(stored.shape, parts, stored.dense, stored.quantized)
            told = _inputs(stored, scheme) if scheme and family.role(name)[0] != "embed" else None
            if told is not None:
                inputs[name] = told
    aside = {name for name in folder.records if _ASIDE.search(name)}
    return PackedFolder(folder, config, packed, aside, inputs)


def _scheme(settings: Mapping[str, Any], path: Path) -> str | None:
    """``dynamic`` or ``static``: how layers round their inputs; None where weights are decoded on loading."""
    if settings.get("dequantize", False) is True:
        return None
    found = settings.get("activation_scheme", "dynamic")
    if not isinstance(found, str) or found.lower() not in ("dynamic", "static"):
        raise BadFile(f"activation_scheme is {found!r}", where=str(path / "config.json"))
    return found.lower()


def _declared(settings: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    found = settings.get("weight_block_size")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(v) is int and v > 0 for v in found):
        raise BadFile(f"weight_block_size is {found!r}, not two whole numbers", where=str(path))
    return found[0], found[1]


@dataclass(frozen=True)
class _Stored:
    """One weight: its two tensors, its shape, and the rows × columns that share a scale."""

    folder: TensorFolder
    weight: Record
    scale: Record
    shape: tuple[int, int]
    block: tuple[int, int]

    def codes(self) -> Tensor:
        """uint8 bit patterns, ``out in``."""
        stored = self.folder.read(self.weight.name).view(torch.uint8)
        return unpack(stored, 4, self.shape[1]) if self.weight.dtype == "I8" else stored

    def scales(self) -> Tensor:
        """float32, one a tile."""
        values = self.folder.read(self.scale.name).reshape(_tiles(self.shape, self.block))
        if self.scale.dtype in _POWERS:
            return power_of_two(values.view(torch.uint8))
        return values.to(torch.float32)

    def dense(self) -> Tensor:
        rows, columns = (min(tile, side) for tile, side in zip(self.block, self.shape, strict=True))
        scales = self.scales()
        values = decode(self.codes(), ELEMENTS[_ELEMENT[self.weight.dtype]])
        # a scale at a time along the rows: no second tensor of the weight's size
        for i in range(scales.shape[0]):
            wide = scales[i].repeat_interleave(columns)[: self.shape[1]]
            values[i * rows : (i + 1) * rows] *= wide
        return values

    def quantized(self) -> Quantized | None:
        element = _ELEMENT[self.weight.dtype]
        if self.block == (1, 32) and self.scale.dtype in _POWERS:
            exponent = self.folder.read(self.scale.name).view(torch.uint8)
            return Quantized(Minifloat(element, "mx"), self.codes(), {"exponent": exponent}, self.shape)
        known = {(128, 128): "b128", self.shape: "tensor", (1, self.shape[1]): "channel"}
        if self.block not in known:
            return None
        grid = Minifloat(element, known[self.block])
        return Quantized(grid, self.codes(), {"scale": self.scales()}, self.shape)


def _inputs(stored: _Stored, scheme: str) -> Inputs | None:
    """What a layer rounds its inputs to; None where no kernel multiplies with its weight in FP8.

    Raises:
        BadFile: the scale is static, and is not there or no scale.
    """
    folder, stem = stored.folder, stored.weight.name.removesuffix(".weight")
    micro = stored.block == (1, 32) and stored.scale.dtype in _POWERS
    if stored.weight.dtype == "I8" and not micro:
        return None
    if scheme == "static":
        name = next((stem + end for end in _FIXED if stem + end in folder.records), stem + _FIXED[0])
        fixed = {"scale": one_number(folder, name)}
        return checked_inputs(parse_inputs("fp8-e4m3-tensor-static"), fixed, f"{name} in {folder.path}")
    width = stored.block[1]
    extent = "token" if width >= stored.shape[1] else f"g{width}-token"
    return Inputs(parse_inputs("mxfp8-ceil" if micro else f"fp8-e4m3-{extent}"))


def _stored(folder: TensorFolder, weight: Record, declared: tuple[int, int] | None) -> _Stored:
    stem = weight.name.removesuffix(".weight")
    scale = next((folder.records[stem + end] for end in _SCALES if stem + end in folder.records), None)
    if scale is None:
        raise BadFile(f"{weight.name!r} ({weight.dtype}) has no scale", where=str(weight.path))
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise BadFile(f"{weight.name!r} has the shape {list(weight.shape)}", where=str(weight.path))
    shape = (weight.shape[0], weight.shape[1] * (2 if weight.dtype == "I8" else 1))
    if scale.dtype not in (*DENSE, *_POWERS):
        raise BadFile(f"{scale.name!r} is {scale.dtype}, which is no scale", where=str(scale.path))
    return _Stored(folder, weight, scale, shape, _block(scale, shape, declared))


def _block(scale: Record, shape: tuple[int, int], declared: tuple[int, int] | None) -> tuple[int, int]:
    """The tile of one scale: as declared where the numbers of tiles agree, smaller ones at the edges; else
    the weight cut evenly, as transformers does (experts in MXFP4 beside layers in FP8).

    Raises:
        BadFile: neither fits.
    """
    if declared is not None and scale.shape == _tiles(shape, declared):
        return declared
    if scale.shape in ((), (1,), (1, 1)):
        return shape
    if len(scale.shape) == 2 and 0 not in scale.shape:
        rows, columns = scale.shape
        if shape[0] % rows == 0 and shape[1] % columns == 0:
            return shape[0] // rows, shape[1] // columns
    raise BadFile(
        f"{scale.name!r} of shape {list(scale.shape)} does not scale a weight of {list(shape)}",
        where=f"{scale.path}: weight_block_size is {list(declared) if declared else None}",
    )


def _tiles(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
