"""HQQ folders: what the hqq package saves as safetensors, and transformers 4 loads with it (Badri and Shaji,
"Half-Quadratic Quantization of Large Machine Learning Models", 2023).

Codes are packed by halves, quarters or tenths of the groups; everything else that a layer needs is a small
tensor of its own beside them. Readers decode in the type they compute in: in single precision to the very
values, in 16 bits with each of the two operations rounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    quantized_folder,
    to_bytes,
)
from bitmill.containers._hqq_read import METHOD, PACKINGS, is_hqq, open_folder, pack_parts, packed_shape
from bitmill.core.axes import Checkpoint, Container, Grid, torch_dtype
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer
from bitmill.grids.integer_down import IntegerDown

_WEIGHT = ".weight"
_BITS = (2, 3, 4, 5, 6, 8)
_NAMES = {"f32": "torch.float32", "f16": "torch.float16", "bf16": "torch.bfloat16"}


@final
@dataclass(frozen=True)
class Hqq(Container):
    """A Hugging Face folder for hqq 0.2.8 and transformers 4: integers with real zero points, grouped along
    the inputs (``int4-g64-fz``, hqq's axis 1) or down the outputs (``int4-r64-fz``, axis 0)."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return is_hqq(path)

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if role not in LINEAR_ROLES | {"head"}:
            return f"its readers take only linear layers quantized, not the {role}"
        if not isinstance(grid, Integer | IntegerDown):
            return (
                f"it holds integer grids with real zero points only, not {grid}; > bitmill holds nearly all"
            )
        if isinstance(grid, Integer) and (grid.zero != "fz" or grid.group == -1):
            return f"its zero points are real numbers, one a group: say int{grid.bits}-g64-fz, not {grid}"
        if grid.bits not in _BITS:
            return f"it has {', '.join(map(str, _BITS))} bits, not {grid.bits}"
        reason = grid.refuses(shape)
        if reason is not None:
            return reason
        _, width, groups = _grouping(grid, (shape[0], shape[1]))
        parts = PACKINGS[grid.bits].parts
        across = width if isinstance(grid, IntegerDown) else groups
        if width % 8:
            return f"its groups are multiples of 8, not {width}"
        if grid.bits != 3 and across % parts:
            return (
                f"{across} are not a multiple of the {parts} that it packs into one byte; take another group"
            )
        return None

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Readers hold scales and zeros in the model's own type; single precision holds any, and 16 bits are
        enough."""
        if not isinstance(grid, Integer | IntegerDown) or (isinstance(grid, Integer) and grid.zero != "fz"):
            return grid
        free = "f16" if grid.scale == "auto" else grid.scale
        return replace(grid, scale=free if dtype == "f32" else dtype)

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: experts of a mixture.
        """
        return quantized_folder(source, rows, _planned, _settings(rows), notes)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        grid = _integer(row.grid)
        axis, width, groups = _grouping(grid, quantized.shape)
        codes = quantized.codes.reshape((groups, width) if axis else (width, groups))
        dtype = torch_dtype(_scale(grid))
        parts = {
            "W_q": pack_parts(codes, PACKINGS[grid.bits]),
            "scale": exactly(quantized.params["scale"], dtype),
            "zero": exactly(quantized.params["zero"], dtype),
            **_about(grid, quantized.shape),
        }
        module = row.name.removesuffix(_WEIGHT)
        return {f"{module}.{name}": to_bytes(value) for name, value in parts.items()}


def _integer(grid: Grid) -> Integer | IntegerDown:
    if not isinstance(grid, Integer | IntegerDown):
        raise ValueError(f"no layout holds {grid}")
    return grid


def _scale(grid: Integer | IntegerDown) -> str:
    return "f16" if grid.scale == "auto" else grid.scale


def _grouping(grid: Integer | IntegerDown, shape: tuple[int, int]) -> tuple[int, int, int]:
    """hqq's axis, the weights in a group, the number of groups."""
    width = grid.group or shape[1]
    return int(isinstance(grid, Integer)), width, prod(shape) // width


def _planned(row: Row) -> dict[str, Planned]:
    if isinstance(row.grid, Dense):
        return {row.name: (DENSE_DTYPES[str(row.grid)], row.shape)}
    if not row.name.endswith(_WEIGHT):
        raise Refused(f"only weights of layers can be on {row.grid}", where=row.name, fix="keep this tensor")
    grid, shape = _integer(row.grid), (row.shape[0], row.shape[1])
    axis, width, groups = _grouping(grid, shape)
    packing = PACKINGS[grid.bits]
    rows, columns = (groups, width) if axis else (width, groups)
    numbers: Planned = (DENSE_DTYPES[_scale(grid)], (groups, 1) if axis else (1, groups))
    parts: dict[str, Planned] = {
        "W_q": (packing.dtype, packed_shape(rows, columns, packing)),
        "scale": numbers,
        "zero": numbers,
    }
    spelled = {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64"}
    for name, value in _about(grid, shape).items():
        parts[name] = (spelled[value.dtype], tuple(value.shape))
    module = row.name.removesuffix(_WEIGHT)
    return {f"{module}.{name}": planned for name, planned in parts.items()}


def _about(grid: Integer | IntegerDown, shape: tuple[int, int]) -> dict[str, Tensor]:
    """What hqq keeps beside a weight, as it encodes it: flags and texts in bytes."""
    axis, width, _ = _grouping(grid, shape)
    packing = PACKINGS[grid.bits]
    words = {
        "packing": packing.name,
        "unpack_view_dtype": "torch.int32" if packing.dtype == "I32" else "torch.uint8",
        "compute_dtype": _NAMES[_scale(grid)],
    }
    flags = {
        **dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta", "round_zero"), 0),
        **dict.fromkeys(("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize"), 1),
    }
    return {
        "nbits": torch.tensor(grid.bits, dtype=torch.int32),
        "group_size": torch.tensor(width, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "shape": torch.tensor(shape, dtype=torch.int64),
        **{name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in words.items()},
        **{name: torch.tensor(flag, dtype=torch.uint8) for name, flag in flags.items()},
    }


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized."""
    placed = [row for row in rows if not isinstance(row.grid, Dense)]
    if not placed:
        return {}
    for row in placed:
        if is_expert(row.name):
            raise Refused(
                "experts of a mixture were never loaded from an HQQ folder here",
                where=row.name,
                fix="> gguf, or > bitmill",
            )
    chosen = {row.name.removesuffix(_WEIGHT) for row in placed}
    linear = [r.name.removesuffix(_WEIGHT) for r in rows if len(r.shape) == 2 and r.role != "embed"]
    skipped = [module for module in linear if module not in chosen]
    if "lm_head" not in linear:
        skipped.append("lm_head")  # tied: the module exists, its weight is the embedding's
    usual = Counter((row.grid, row.shape[1]) for row in placed).most_common(1)[0][0]
    grid = _integer(usual[0])
    weights = {
        "nbits": grid.bits,
        "channel_wise": True,
        "group_size": grid.group or None,
        "optimize": True,
        "round_zero": False,
        "axis": int(isinstance(grid, Integer)),
        "view_as_float": False,
    }  # of most layers; what stands beside each of them is what counts
    return {
        "quant_method": METHOD,
        "quant_config": {
            "weight_quant_params": weights,
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": skipped,
    }
