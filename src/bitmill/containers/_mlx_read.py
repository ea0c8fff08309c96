"""Reading MLX folders, whoever wrote them: a layer's mode, its grid, its codes."""

from __future__ import annotations

from collections.abc import Mapping
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
    strange = next((n for n in folder.records if n.endswith(".global_scale") or ".switch_mlp." in n), None)
    if strange is not None:
        raise Refused(
            "experts that mlx-lm has made one tensor cannot be read here",
            where=f"{strange} in {path}",
            fix="give the original model",
        )
    packed = {}
    for name in folder.records:
        if name.endswith(_SCALES):
            module = name.removesuffix(_SCALES)
            packed[f"{module}.weight"] = _weight(folder, module, settings)
    plain = {key: value for key, value in config.items() if key != "quantization"}
    said = {
        **{k: settings[k] for k in ("group_size", "bits", "mode") if k in settings},
        "quant_method": "mlx",
    }
    return PackedFolder(folder, {**plain, "quantization_config": said}, packed)


def _weight(folder: TensorFolder, module: str, settings: Mapping[str, Any]) -> Packed:
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
    if len(words.shape) != 2 or 0 in words.shape or words.shape[1] * 32 % bits:
        raise BadFile(f"{words.name!r} has the impossible shape {list(words.shape)}", where=str(words.path))
    out, columns = words.shape[0], words.shape[1] * 32 // bits
    if columns % group:
        raise BadFile(
            f"{columns} columns are not whole groups of {group}", where=f"{module} in {folder.path}"
        )
    number = scales.dtype if mode == "affine" else "U8"
    if mode == "affine" and scales.dtype not in DENSE:
        raise BadFile(f"{scales.name!r} is {scales.dtype} and must be a number", where=str(scales.path))
    parts: dict[str, Planned] = {
        f"{module}.weight": ("U32", (out, words.shape[1])),
        f"{module}{_SCALES}": (number, (out, columns // group)),
    }
    if mode == "affine":
        parts[f"{module}.biases"] = parts[f"{module}{_SCALES}"]
    check_parts(folder, parts)
    shape = (out, columns)
    unpacked = _affine if mode == "affine" else partial(_small, mode=str(mode))
    return from_quantized(shape, tuple(parts), partial(unpacked, folder, module, bits, group, shape))


def _affine(folder: TensorFolder, module: str, bits: int, group: int, shape: tuple[int, int]) -> Quantized:
    """On the grid that says most: symmetric, with integer zero points, or with a bias a group."""
    codes = unpack(folder.read(f"{module}.weight"), bits, shape[1])
    scale, bias = (folder.read(f"{module}.{part}").to(torch.float32) for part in ("scales", "biases"))
    dtype = DENSE[folder.record(f"{module}{_SCALES}").dtype]
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


def _small(
    folder: TensorFolder, module: str, bits: int, group: int, shape: tuple[int, int], mode: str
) -> Quantized:
    codes = unpack(folder.read(f"{module}.weight"), bits, shape[1])
    scales = folder.read(f"{module}{_SCALES}")
    if mode != "nvfp4":
        return Quantized(Minifloat(_SMALL[mode, group, bits], "mx"), codes, {"exponent": scales}, shape)
    scale = scales.view(torch.float8_e4m3fn).to(torch.float32)
    if not shape[1] % _GGML_BLOCK:
        return Quantized(GgmlFloat("nvfp4-flat"), codes, {"scale": scale}, shape)
    return Quantized(Minifloat("e2m1", "nv"), codes, {"scale": scale, "gain": torch.ones(())}, shape)
