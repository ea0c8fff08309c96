"""Folders of transformers' own FP8: the tiles of 128 × 128 that DeepSeek and Qwen publish, E5M2, and MXFP8.

A weight and its ``weight_scale_inv``, which in spite of the name is what the stored numbers are multiplied
by (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3). Without a GPU transformers decodes such a
folder as it loads it. With one it multiplies in FP8, which rounds the inputs of layers to FP8 as they come
(``activation_scheme`` dynamic): what is measured here is the weights alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.packed_folder import quantization_config
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    quantized_folder,
    to_bytes,
)
from bitmill.containers._fp8_read import open_folder
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert
from bitmill.grids.dense import Dense
from bitmill.grids.minifloat import Minifloat

METHODS = ("fp8", "mxfp8")

_WEIGHT = ".weight"
_ELEMENTS = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}
_SCALINGS = {"e4m3": ("b128", "tensor", "mx"), "e5m2": ("b128", "tensor", "channel", "mx")}


@final
@dataclass(frozen=True)
class Fp8(Container):
    """A Hugging Face folder with one FP8 grid for all its layers, as transformers 5 and vLLM take it."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return any(quantization_config(path, method) is not None for method in METHODS)

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if not isinstance(grid, Minifloat) or grid.scaling not in _SCALINGS.get(grid.element, ()):
            held = "FP8 by tiles of 128 × 128 (-b128) or by tensor, E5M2 also by channel, and MXFP8"
            return f"it holds {held}, not {grid}; > compressed-tensors or > bitmill may"
        if role not in LINEAR_ROLES:
            return f"its readers take only the layers of the blocks quantized, not the {role}"
        if grid.refuses(shape) is not None:
            return grid.refuses(shape)
        if grid.scaling == "b128" and any(side > 128 and side % 128 for side in shape):
            return (
                f"transformers without a GPU cuts {shape[0]} × {shape[1]} into equal tiles, not into "
                "128 × 128 with smaller ones at the edge: "
                f"say fp8-{grid.element}-tensor, or > compressed-tensors"
            )
        return None

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Scales are single precision, or powers of two: nothing is left open."""
        return grid

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: the layers are on several grids.
        """
        return quantized_folder(source, rows, _planned, _settings(rows), notes)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        return {
            row.name: to_bytes(quantized.codes),
            f"{row.name}_scale_inv": to_bytes(_scale(quantized)),
        }


def _scale(quantized: Quantized) -> Tensor:
    grid, params = quantized.grid, quantized.params
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    return params["exponent"] if grid.scaling == "mx" else params["scale"].to(torch.float32)


def _planned(row: Row) -> dict[str, Planned]:
    grid = row.grid
    if isinstance(grid, Dense):
        return {row.name: (DENSE_DTYPES[str(grid)], row.shape)}
    if not isinstance(grid, Minifloat) or not row.name.endswith(_WEIGHT):
        raise Refused(f"only weights of layers can be on {grid}", where=row.name, fix="keep this tensor")
    out, columns = row.shape
    scales: dict[str, Planned] = {
        "b128": ("F32", (-(-out // 128), -(-columns // 128))),
        "channel": ("F32", (out, 1)),
        "tensor": ("F32", ()),
        "mx": ("U8", (out, columns // 32)),
    }
    return {
        row.name: (_ELEMENTS[grid.element], row.shape),
        f"{row.name}_scale_inv": scales[grid.scaling],
    }


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized. Multiplication in FP8 knows E4M3 in
    tiles, whole tensors and MX blocks; what it does not know is marked to be decoded on loading.

    Raises:
        Refused: several grids, or experts of one block some of which stay dense.
    """
    placed = [row for row in rows if not isinstance(row.grid, Dense)]
    if not placed:
        return {}
    grid = placed[0].grid
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    for row in placed:
        if row.grid != grid:
            raise Refused(
                f"an FP8 folder has one grid for all its layers, not {grid} and {row.grid}",
                where=row.name,
                fix="one grid for every role, or > compressed-tensors, which holds several",
            )
    chosen = {row.name for row in placed}
    kept = [r.name.removesuffix(_WEIGHT) for r in rows if _is_layer(r) and r.name not in chosen]
    kept += _dense_experts(rows, chosen)
    micro = grid.scaling == "mx"
    # one factor a weight is too few for gate and up, which transformers joins in each expert
    decoded = grid.element != "e4m3" or (grid.scaling == "tensor" and any(map(is_expert, chosen)))
    return {
        "quant_method": "mxfp8" if micro else "fp8",
        "fmt": grid.element,
        "activation_scheme": "dynamic",
        "weight_block_size": {"b128": [128, 128], "mx": [1, 32]}.get(grid.scaling),
        "scale_fmt": "ue8m0" if micro else "float",
        "modules_to_not_convert": list(dict.fromkeys([*kept, "lm_head"])),
        **({"dequantize": True} if decoded else {}),
    }


def _dense_experts(rows: Sequence[Row], chosen: Collection[str]) -> list[str]:
    """Modules of experts that stay dense: transformers has one for all experts of a block.

    Raises:
        Refused: some weights of a block's experts are placed, and some are not.
    """
    found: dict[str, set[bool]] = {}
    for row in rows:
        module, inside, _ = row.name.partition(".experts.")
        if inside and len(row.shape) > 1:
            found.setdefault(f"{module}.experts", set()).add(row.name in chosen)
    for module, placed in found.items():
        if len(placed) > 1:
            raise Refused(
                "the experts of a block are in FP8 all together, or not at all",
                where=module,
                fix="keep=gate+up+down, or keep none of them",
            )
    return [module for module, placed in found.items() if placed == {False}]


def _is_layer(row: Row) -> bool:
    return len(row.shape) == 2 and row.role != "embed" and row.name.endswith(_WEIGHT)
