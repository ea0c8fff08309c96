"""Reading MLX folders, whoever wrote them: a layer's mode, its grid, its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, check_parts, from_quantized
from bitmill.checkpoint.safetensors import DENSE, TensorFolder
from bitmill.checkpoint.safetensors_write import Planned
from bitmill.core.axes import torch_dtype
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Quantized
from bitmill.grids.biased import Biased
from bitmill.grids.ggml_floats import GgmlFloat
from bitmill.grids.integer import Integer
from bitmill.grids.minifloat import Minifloat
from bitmill.numerics.bits import unpack

_SCALES = ".scales"
_SMALL = {("mxfp4", 32, 4): "e2m1", ("mxfp8", 32, 8): "e4m3", ("nvfp4", 16, 4): "e2m1"}
_USUAL = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
"""Group and bits of a mode where a layer's own settings leave them out."""
_GGML_BLOCK = 64
STACK = ".switch_mlp."
"""Where mlx-lm keeps the experts of a block, each projection as one stack of all."""
EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""What a projection of a stack is called in Mixtral's own folders."""


def settings_of(path: Path) -> Mapping[str, Any] | None:
    """``quantization`` of an MLX folder's configuration, None for anything else.

    Raises:
        BadFile: config.json cannot be read.
    """
    if not path.is_dir() or not (path / "config.json").is_file():
        return None
    config = read_config(path)
    found, other = config.get("quantization"), config.get("quantization_config", {})
    named = isinstance(other, dict) and "quant_method" in other
    return found if isinstance(found, dict) and "group_size" in found and not named else None


def open_folder(path: Path) -> PackedFolder:
    """The folder as a checkpoint.

    Raises:
        Refused: a mode or layout that no grid here describes.
        BadFile: settings and tensors do not fit together.
    """
    folder, config = TensorFolder(path), read_config(path)
    settings = settings_of(path) or {}
    strange = next((n for n in folder.records if n.endswith(".global_scale")), None)
    if strange is not None:
        raise Refused(
            "experts that share a scale cannot be read here",
            where=f"{strange} in {path}",
            fix="give the original model",
        )
    packed: dict[str, Packed] = {}
    for name, record in folder.records.items():
        module = name.removesuffix(_SCALES)
        if name.endswith(_SCALES) and STACK in module:
            packed |= _experts(folder, module, settings)
        elif name.endswith(_SCALES):
            packed[f"{module}.weight"] = _weight(folder, module, settings)
        elif STACK in name and name.endswith(".weight") and record.dtype in DENSE and len(record.shape) == 3:
            packed |= _dense_experts(folder, name)
    stacks = {name for name in folder.records if STACK in name}
    plain = {key: value for key, value in config.items() if key != "quantization"}
    said = {
        **{k: settings[k] for k in ("group_size", "bits", "mode") if k in settings},
        "quant_method": "mlx",
    }
    return PackedFolder(folder, {**plain, "quantization_config": said}, packed, used=stacks)


def _expert(module: str, number: int) -> str:
    """Canonical name of the weight of one expert of a stack."""
    block, _, part = module.partition(STACK)
    part = EXPERT_NAMES.get(part, part) if block.endswith(".block_sparse_moe") else part
    return f"{block}.experts.{number}.{part}.weight"


def _experts(folder: TensorFolder, module: str, settings: Mapping[str, Any]) -> dict[str, Packed]:
    """The weights of all experts of a stack."""
    count = len(folder.record(f"{module}.weight").shape) == 3 and folder.record(f"{module}.weight").shape[0]
    if not count:
        raise BadFile(f"{module!r} is no stack of experts", where=str(folder.path))
    return {_expert(module, i): _weight(folder, module, settings, (i, count)) for i in range(count)}


def _dense_experts(folder: TensorFolder, name: str) -> dict[str, Packed]:
    """The weights of a stack that is not quantized."""
    record = folder.record(name)
    shape, dtype = record.shape[1:], DENSE[record.dtype]
    return {
        _expert(name.removesuffix(".weight"), i): Packed(
            shape, (), partial(_of_stack, folder, name, i), _nothing, dtype
        )
        for i in range(record.shape[0])
    }


def _of_stack(folder: TensorFolder, name: str, number: int | None) -> Tensor:
    values = folder.read(name)
    return values if number is None else values[number]


def _nothing() -> None:
    """What is dense is on no grid."""


def _weight(
    folder: TensorFolder, module: str, settings: Mapping[str, Any], expert: tuple[int, int] | None = None
) -> Packed:
    """A weight, or the one of an expert: its number, and how many there are."""
    stack = () if expert is None else (expert[1],)
    about = settings.get(module, settings)
    if not isinstance(about, dict):
        raise BadFile(f"{module!r} is stored quantized and said to be {about!r}", where=str(folder.path))
    mode = about.get("mode", "affine")
    usual = _USUAL.get(mode, (0, 0)) if isinstance(mode, str) else (0, 0)
    group: Any = about.get("group_size", usual[0])
    bits: Any = about.get("bits", usual[1])
    whole = type(bits) is int and type(group) is int
    if not isinstance(mode, str) or not whole or not (2 <= bits <= 8 and 0 < group < 1 << 31):
        raise BadFile(
            f"mode {mode!r}, {bits!r} bits by groups of {group!r} mean nothing",
            where=f"{module} in {folder.path}",
        )
    if mode != "affine" and (mode, group, bits) not in _SMALL:
        raise Refused(
            f"weights of mode {mode!r}, {bits} bits by {group}, cannot be read here",
            where=f"{module} in {folder.path}",
            fix="give the original model",
        )
    words, scales = folder.record(f"{module}.weight"), folder.record(f"{module}{_SCALES}")
    if len(words.shape) != 2 + len(stack) or 0 in words.shape or words.shape[-1] * 32 % bits:
        raise BadFile(f"{words.name!r} has the impossible shape {list(words.shape)}", where=str(words.path))
    out, columns = words.shape[-2], words.shape[-1] * 32 // bits
    if columns % group:
        raise BadFile(
            f"{columns} columns are not whole groups of {group}", where=f"{module} in {folder.path}"
        )
    number = scales.dtype if mode == "affine" else "U8"
    if mode == "affine" and scales.dtype not in DENSE:
        raise BadFile(f"{scales.name!r} is {scales.dtype} and must be a number", where=str(scales.path))
    parts: dict[str, Planned] = {
        f"{module}.weight": ("U32", (*stack, out, words.shape[-1])),
        f"{module}{_SCALES}": (number, (*stack, out, columns // group)),
    }
    if mode == "affine":
        parts[f"{module}.biases"] = parts[f"{module}{_SCALES}"]
    check_parts(folder, parts)
    shape = (out, columns)
    unpacked = _affine if mode == "affine" else partial(_small, mode=str(mode))
    layer = _Layer(folder, module, None if expert is None else expert[0])
    return from_quantized(shape, () if expert else tuple(parts), partial(unpacked, layer, bits, group, shape))


@dataclass(frozen=True)
class _Layer:
    """Stored parts of a layer, or of one expert of a stack."""

    folder: TensorFolder
    module: str
    expert: int | None

    def part(self, name: str) -> Tensor:
        return _of_stack(self.folder, f"{self.module}.{name}", self.expert)


def _affine(layer: _Layer, bits: int, group: int, shape: tuple[int, int]) -> Quantized:
    """On the grid that says most: symmetric, with integer zero points, or with a bias a group."""
    codes = unpack(layer.part("weight"), bits, shape[1])
    scale, bias = (layer.part(name).to(torch.float32) for name in ("scales", "biases"))
    dtype = DENSE[layer.folder.record(f"{layer.module}{_SCALES}").dtype]
    zero = torch.where(scale == 0, 0.0, (-bias / scale).round())
    whole = bool((scale != 0).all()) and torch.equal(-zero * scale, bias)
    held = dtype if dtype != "f32" else next((name for name in ("bf16", "f16") if _holds(scale, name)), None)
    if whole and held is not None:  # every value is exact in single precision
        if bool((zero == 2 ** (bits - 1)).all()):
            return Quantized(Integer(bits, group, "sym", held), codes, {"scale": scale}, shape)
        if dtype == "f32" and int(zero.min()) >= 0 and int(zero.max()) < 2**bits:
            params = {"scale": scale, "zero": zero}
            return Quantized(Integer(bits, group, "asym", held), codes, params, shape)
    return Quantized(Biased(bits, group, dtype), codes, {"scale": scale, "bias": bias}, shape)


def _holds(scale: Tensor, name: str) -> bool:
    return torch.equal(scale.to(torch_dtype(name)).to(torch.float32), scale)


def _small(layer: _Layer, bits: int, group: int, shape: tuple[int, int], mode: str) -> Quantized:
    codes = unpack(layer.part("weight"), bits, shape[1])
    scales = layer.part("scales")
    if mode != "nvfp4":
        return Quantized(Minifloat(_SMALL[mode, group, bits], "mx"), codes, {"exponent": scales}, shape)
    scale = scales.view(torch.float8_e4m3fn).to(torch.float32)
    if not shape[1] % _GGML_BLOCK:
        return Quantized(GgmlFloat("nvfp4-flat"), codes, {"scale": scale}, shape)
    return Quantized(Minifloat("e2m1", "nv"), codes, {"scale": scale, "gain": torch.ones(())}, shape)
