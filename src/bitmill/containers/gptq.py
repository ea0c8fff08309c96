"""GPTQ folders, version 1: what GPTQModel writes and vLLM, SGLang, ExLlama and transformers load.

Codes are packed down the input rows, zero points along the outputs and stored minus one (Frantar et al.,
arXiv 2210.17323; the layout is AutoGPTQ's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import Packed, PackedFolder, check_parts, quantization_config
from bitmill.checkpoint.patterns import patterns
from bitmill.checkpoint.safetensors import DENSE, TensorFolder
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    folder_images,
    json_bytes,
    model_config,
    to_bytes,
)
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer
from bitmill.numerics.bits import pack, unpack

METHOD = "gptq"

_BITS = (2, 3, 4, 8)
_GROUPS = (0, 16, 32, 64, 128, 256, 512, 1024)
_WEIGHT = ".weight"


@final
@dataclass(frozen=True)
class Gptq(Container):
    """A Hugging Face folder with one integer grid for all its layers, scales in half precision."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        return _open(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if not isinstance(grid, Integer):
            return f"it holds integer grids only, not {grid}; > bitmill holds anything"
        if grid.zero == "fz":
            return "its zero points are whole numbers: say -asym, or write > hqq"
        if grid.bits not in _BITS or grid.group not in _GROUPS:
            return f"it has 2, 3, 4 or 8 bits by groups of 16 to 1024 or by channel, not {grid}"
        if role not in LINEAR_ROLES:
            return f"its readers take only the layers of the blocks quantized, not the {role}"
        if grid.refuses(shape) is not None:
            return grid.refuses(shape)
        if shape[0] % 32 or shape[1] % 32:
            return f"both sides must be multiples of 32, and the weight is {shape[0]} × {shape[1]}"
        return None

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Scales are half precision. A zero point of 0 cannot be stored as one less, so it starts at 1."""
        if not isinstance(grid, Integer) or grid.zero == "fz":
            return grid
        return replace(grid, scale="f16", zero_floor=int(grid.zero == "asym"))

    def default_grid(self, dtype: str, role: str) -> str:
        """Kernels compute in 16 bits."""
        return "bf16" if dtype == "bf16" else "f16"

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: the layers are on several grids, or a layer is quantized in some blocks only.
        """
        config, more = model_config(source, rows), {}
        settings = _settings(rows)
        if settings:
            config["quantization_config"] = settings
            more["quantize_config.json"] = json_bytes(settings)
        tensors = {name: planned for row in rows for name, planned in _planned(row).items()}
        metadata = {f"bitmill.{key}": text for key, text in notes.items()}
        return folder_images(source, tensors, config, metadata, more)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        grid = row.grid
        if isinstance(grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        if not isinstance(grid, Integer):
            raise ValueError(f"no layout holds {grid}")
        scale = quantized.params["scale"]
        zero = quantized.params.get("zero", torch.full_like(scale, 2 ** (grid.bits - 1)))
        columns = quantized.shape[1]
        parts = {
            "qweight": pack(quantized.codes, grid.bits).T,
            "qzeros": pack(exactly(zero - 1, torch.uint8).T.contiguous(), grid.bits),
            "scales": exactly(scale, torch.float16).T,
            "g_idx": torch.arange(columns, dtype=torch.int32) // (grid.group or columns),
        }
        module = row.name.removesuffix(_WEIGHT)
        return {f"{module}.{name}": to_bytes(value) for name, value in parts.items()}


def _planned(row: Row) -> dict[str, Planned]:
    grid = row.grid
    if isinstance(grid, Dense):
        return {row.name: (DENSE_DTYPES[str(grid)], row.shape)}
    if not isinstance(grid, Integer) or not row.name.endswith(_WEIGHT):
        raise Refused(f"only weights of layers can be on {grid}", where=row.name, fix="keep this tensor")
    module = row.name.removesuffix(_WEIGHT)
    out, columns = row.shape
    groups = columns // (grid.group or columns)
    return {
        f"{module}.qweight": ("I32", (columns * grid.bits // 32, out)),
        f"{module}.qzeros": ("I32", (groups, out * grid.bits // 32)),
        f"{module}.scales": ("F16", (groups, out)),
        f"{module}.g_idx": ("I32", (columns,)),
    }


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized."""
    placed = [row for row in rows if not isinstance(row.grid, Dense)]
    if not placed:
        return {}
    grid = placed[0].grid
    if not isinstance(grid, Integer):
        raise ValueError(f"no layout holds {grid}")
    for row in placed:
        if row.grid != grid:
            raise Refused(
                f"a GPTQ folder has one grid for all its layers, not {grid} and {row.grid}",
                where=row.name,
                fix="one grid for every role, or > compressed-tensors, which holds several",
            )
    settings: dict[str, Any] = {
        "quant_method": METHOD,
        "bits": grid.bits,
        "group_size": grid.group or -1,
        "desc_act": False,
        "sym": grid.zero == "sym",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    return {**settings, **_skipped(rows, placed)}


def _skipped(rows: Sequence[Row], placed: Sequence[Row]) -> dict[str, Any]:
    """Layers of the blocks that stay dense, in both spellings that readers know.

    Raises:
        Refused: they differ from block to block.
    """
    layers = [r.name.removesuffix(_WEIGHT) for r in rows if r.role in LINEAR_ROLES and r.layer is not None]
    chosen = [row.name.removesuffix(_WEIGHT) for row in placed]
    left = [name for name in layers if name not in set(chosen)]
    if not left:
        return {}
    for name, (text, regular) in zip(left, patterns(left, layers), strict=False):
        if not regular or r"\d+" not in text:
            raise Refused(
                "a GPTQ folder keeps a layer dense in every block or in none",
                where=f"{name} and its like in other blocks",
                fix="keep=<role> for all blocks, or > compressed-tensors",
            )
    inside = list(dict.fromkeys(name.split(".layers.", 1)[1].split(".", 1)[1] for name in chosen))
    skip: dict[str, dict[str, Any]] = {f"-:{text}": {} for text, _ in patterns(left, layers)}
    return {"modules_in_block_to_quantize": [inside], "dynamic": skip}


def _open(path: Path) -> PackedFolder:
    folder, config = TensorFolder(path), read_config(path)
    settings = config["quantization_config"]
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if (
        type(bits) is not int
        or bits not in _BITS
        or layout not in ("gptq", "gptq_v2")
        or settings.get("pack_dtype", "int32") != "int32"
    ):
        raise Refused(
            f"GPTQ weights of {bits!r} bits in layout {layout!r} cannot be read here",
            where=str(path / "config.json"),
            fix="give the original model",
        )
    ends = ".qweight"
    modules = [name.removesuffix(ends) for name in folder.records if name.endswith(ends)]
    packed = {f"{m}.weight": _packed(folder, m, bits, layout == "gptq_v2") for m in modules}
    return PackedFolder(folder, config, packed)


def _packed(folder: TensorFolder, module: str, bits: int, second: bool) -> Packed:
    weight, scales = folder.record(f"{module}.qweight"), folder.record(f"{module}.scales")
    ok = weight.dtype == "I32" and len(weight.shape) == 2 and scales.dtype in DENSE and len(scales.shape) == 2
    if not ok or weight.shape[0] * 32 % bits or 0 in weight.shape + scales.shape:
        raise BadFile(f"{module!r} is not laid out as GPTQ weights are", where=str(weight.path))
    columns, out = weight.shape[0] * 32 // bits, weight.shape[1]
    groups = scales.shape[0]
    wanted: dict[str, Planned] = {
        f"{module}.qzeros": ("I32", (groups, -(-out * bits // 32))),
        f"{module}.scales": (scales.dtype, (groups, out)),
    }
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    if f"{module}.g_idx" in folder.records:
        wanted[f"{module}.g_idx"] = ("I32", (columns,))
        names.append(f"{module}.g_idx")
    check_parts(folder, wanted)
    parts = partial(_read, folder, module, bits, second)
    return Packed(
        (out, columns),
        tuple(names),
        lambda: _dense(*parts()),
        lambda: _stored(*parts(), bits, DENSE[scales.dtype]),
    )


def _read(
    folder: TensorFolder, module: str, bits: int, second: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes ``out in``, scales and zero points ``out groups``, the group of each column.

    A file that says version 1, is symmetric, and stores the middle itself is version 2 under the wrong name.
    """
    packed = folder.read(f"{module}.qweight").T.contiguous()
    codes = unpack(packed, bits, packed.shape[1] * 32 // bits)
    scale = folder.read(f"{module}.scales").to(torch.float32).T.contiguous()
    stored = unpack(folder.read(f"{module}.qzeros"), bits, scale.shape[0]).T.to(torch.int32)
    middle = 2 ** (bits - 1)
    zero = stored if second or bool((stored == middle).all()) else (stored + 1) & (2**bits - 1)
    groups, columns = scale.shape[1], codes.shape[1]
    plain = torch.arange(columns, dtype=torch.int32) // -(-columns // groups)
    index = folder.read(f"{module}.g_idx") if f"{module}.g_idx" in folder.records else plain
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise BadFile(f"{module}.g_idx points outside the {groups} groups", where=str(folder.path))
    return codes, scale, zero.to(torch.float32), index


def _dense(codes: Tensor, scale: Tensor, zero: Tensor, index: Tensor) -> Tensor:
    chosen = index.to(torch.int64)
    return (codes.to(torch.float32) - zero[:, chosen]) * scale[:, chosen]


def _stored(
    codes: Tensor, scale: Tensor, zero: Tensor, index: Tensor, bits: int, dtype: str
) -> Quantized | None:
    columns, groups = codes.shape[1], scale.shape[1]
    if columns % groups or not torch.equal(
        index, torch.arange(columns, dtype=torch.int32) // (columns // groups)
    ):
        return None
    group = 0 if groups == 1 else columns // groups
    shape = (codes.shape[0], columns)
    if bool((zero == 2 ** (bits - 1)).all()):
        return Quantized(Integer(bits, group, "sym", dtype), codes, {"scale": scale}, shape)
    grid = Integer(bits, group, "asym", dtype, int(zero.min()) if zero.min() < 1 else 1)
    return Quantized(grid, codes, {"scale": scale, "zero": zero.contiguous()}, shape)
