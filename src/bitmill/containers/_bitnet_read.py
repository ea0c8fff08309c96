"""BitNet folders, read: codes of two bits, and a scale that one of transformers' layers multiplies by and the
other divides by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, from_quantized, one_number
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import BadFile, Refused
from bitmill.core.inputs import parse_inputs
from bitmill.core.types import Inputs, Quantized
from bitmill.grids.ternary import Ternary

RUN = 4
"""Rows of codes in a row of bytes: row ``i · out/4 + r`` at bits ``2i`` of row ``r``."""
ROUNDS = parse_inputs("bitnet-int8")
"""What every such layer rounds its inputs to."""

_LINEAR = {"bitlinear": True, "autobitlinear": False}  # whether it divides by weight_scale


def pack_rows(codes: Tensor) -> Tensor:
    """Codes ``out in`` as bytes ``out/4 in``."""
    parts = codes.to(torch.uint8).reshape(RUN, -1, codes.shape[1])
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def unpack_rows(octets: Tensor) -> Tensor:
    """The inverse of :func:`pack_rows`."""
    return torch.cat([octets >> shift & 3 for shift in (0, 2, 4, 6)])


def open_folder(path: Path) -> Checkpoint:
    """A folder of ternary weights, as transformers runs it.

    Raises:
        Refused: norms stand inside its linears, or its weights are rounded when it runs.
        BadFile: a tensor is not what it must be.
    """
    config = read_config(path)
    settings = config["quantization_config"]
    divides = _divides(settings, path)
    folder = TensorFolder(path)
    packed: dict[str, Packed] = {}
    for name, record in folder.records.items():
        if not name.endswith(".weight") or record.dtype != "U8":
            continue
        module, where = name.removesuffix(".weight"), f"{name} in {path}"
        if len(record.shape) != 2:
            raise BadFile(f"its codes have shape {list(record.shape)}", where=where)
        one_number(folder, f"{module}.weight_scale")
        shape = (record.shape[0] * RUN, record.shape[1])
        packed[name] = from_quantized(
            shape, (name, f"{module}.weight_scale"), _reader(folder, module, shape, divides, where)
        )
    if not packed:
        raise BadFile("no weight of this folder is ternary", where=str(path))
    return PackedFolder(folder, config, packed, inputs=dict.fromkeys(packed, Inputs(ROUNDS)))


def _reader(
    folder: TensorFolder, module: str, shape: tuple[int, int], divides: bool, where: str
) -> Callable[[], Quantized]:
    def read() -> Quantized:
        codes = unpack_rows(folder.read(f"{module}.weight"))
        if int(codes.max()) > 2:
            raise BadFile("a code is 3; ternary codes are 0, 1 and 2", where=where)
        scale = one_number(folder, f"{module}.weight_scale").to(torch.float32).reshape(1, 1)
        scale = 1 / scale if divides else scale
        if not bool(scale.isfinite().all()) or bool((scale < 0).any()):
            raise BadFile(f"the scale {float(scale)} is no scale", where=where)
        narrow = torch.equal(scale.to(torch.bfloat16).to(torch.float32), scale)
        return Quantized(Ternary(not narrow), codes, {"scale": scale}, shape)

    return read


def _divides(settings: dict[str, Any], path: Path) -> bool:
    linear, mode = settings.get("linear_class", "bitlinear"), settings.get("quantization_mode", "offline")
    if linear not in _LINEAR:
        raise BadFile(f"linear_class {linear!r} is none of: {', '.join(_LINEAR)}", where=str(path))
    if settings.get("use_rms_norm"):
        raise Refused(
            "a norm stands inside every linear of this model, and no layer here has one",
            where=f"{path}: quantization_config.use_rms_norm",
            fix="load it with transformers",
        )
    if linear == "autobitlinear" and mode != "offline":
        raise Refused(
            "its weights are dense and rounded whenever it runs (quantization_mode online)",
            where=str(path),
            fix="remove quantization_config from a copy of its config.json, then: "
            "bitmill quantize COPY 'nearest : ternary-tensor > bitnet'",
        )
    return _LINEAR[linear]
