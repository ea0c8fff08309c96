"""Folders of transformers' own FP8: the tiles of 128 × 128 that DeepSeek and Qwen publish, E5M2, and MXFP8.

A weight and its ``weight_scale_inv``, which in spite of the name is what the stored numbers are multiplied
by (DeepSeek-V3 technical report, arXiv 2412.19437, section 3.3). Layers multiply in FP8, so their inputs are
rounded too, asked or not: as they come, a scale for each run of 128 channels of a token (tiles), each token
(one scale a weight) or 32 channels (MXFP8, ``mxfp8-ceil``), or by a fixed ``activation_scale`` where the
recipe says ``input=fp8-e4m3-tensor-static``. That is what transformers' kernels do on a GPU and vLLM does;
calibration, ``measure`` and ``load`` do the same. Without a GPU transformers decodes the weights as it loads
them and rounds no input, which is what it does everywhere with a folder marked ``dequantize``: E5M2, which
no kernel takes, and weights of experts with one scale each.
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
from bitmill.core.axes import Checkpoint, Grid, InputContainer
from bitmill.core.errors import Refused
from bitmill.core.inputs import InputGrid, parse_inputs
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert
from bitmill.grids.dense import Dense
from bitmill.grids.minifloat import Minifloat

METHODS = ("fp8", "mxfp8")

_WEIGHT = ".weight"
_ELEMENTS = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}
_STATIC = "fp8-e4m3-tensor-static"
_SCALINGS = {"e4m3": ("b128", "tensor", "mx"), "e5m2": ("b128", "tensor", "channel", "mx")}


@final
@dataclass(frozen=True)
class Fp8(InputContainer):
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

    def refuses_inputs(self, grid: Grid, inputs: InputGrid) -> str | None:
        scaling = grid.scaling if isinstance(grid, Minifloat) and grid.element == "e4m3" else ""
        allowed = {
            "b128": ("fp8-e4m3-g128-token", "fp8-e4m3-token", _STATIC),
            "tensor": ("fp8-e4m3-token", _STATIC),
            "mx": ("mxfp8-ceil",),
        }.get(scaling, ())
        if str(inputs) in allowed:
            return None
        said = (
            f"with this weight go {', '.join(allowed)}" if allowed else "its weights are decoded on loading"
        )
        return f"{said}; > compressed-tensors or > bitmill may say it"

    def refuses_cache(self, grid: InputGrid) -> str | None:
        return "its readers know no scales of a cache; > compressed-tensors"

    def implied_inputs(self, rows: Sequence[Row]) -> Mapping[str, InputGrid]:
        placed = [row for row in rows if not isinstance(row.grid, Dense)]
        # one factor a weight is too few for gate and up, which transformers joins in each expert
        if any(str(row.grid) == "fp8-e4m3-tensor" and is_expert(row.name) for row in placed):
            return {}
        found = ((row.name, _dynamic(row)) for row in placed)
        return {name: inputs for name, inputs in found if inputs is not None}

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
        fixed = quantized.inputs.get("scale") if row.inputs is not None and row.inputs.static else None
        return {
            row.name: to_bytes(quantized.codes),
            f"{row.name}_scale_inv": to_bytes(_scale(quantized)),
            **({} if fixed is None else {_fixed_name(row): to_bytes(fixed.to(torch.float32).reshape(()))}),
        }


def _fixed_name(row: Row) -> str:
    return f"{row.name.removesuffix(_WEIGHT)}.activation_scale"


def _dynamic(row: Row) -> InputGrid | None:
    """What a layer rounds its inputs to as they come; None where no kernel multiplies with its weight."""
    grid = row.grid
    if not isinstance(grid, Minifloat) or grid.element != "e4m3":
        return None
    wide = grid.scaling == "tensor" or row.shape[1] <= 128
    return parse_inputs(
        "mxfp8-ceil" if grid.scaling == "mx" else "fp8-e4m3-token" if wide else "fp8-e4m3-g128-token"
    )


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
    static = row.inputs is not None and row.inputs.static
    return {
        row.name: (_ELEMENTS[grid.element], row.shape),
        f"{row.name}_scale_inv": scales[grid.scaling],
        **({_fixed_name(row): ("F32", ())} if static else {}),
    }


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized. Where no inputs are rounded, weights
    are marked to be decoded on loading.

    Raises:
        Refused: several grids, several ways with inputs, or experts of one block some of which stay dense.
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
    scheme = _scheme(placed)
    return {
        "quant_method": "mxfp8" if micro else "fp8",
        "fmt": grid.element,
        "activation_scheme": scheme or "dynamic",
        "weight_block_size": {"b128": [128, 128], "mx": [1, 32]}.get(grid.scaling),
        "scale_fmt": "ue8m0" if micro else "float",
        "modules_to_not_convert": list(dict.fromkeys([*kept, "lm_head"])),
        **({} if scheme else {"dequantize": True}),
    }


def _scheme(placed: Sequence[Row]) -> str | None:
    """``dynamic``, ``static``, or None where inputs stay as they are.

    Raises:
        Refused: not all alike, or what no such folder says.
    """
    found: dict[str | None, Row] = {}
    for row in placed:
        found[None if row.inputs is None else "static" if row.inputs.static else "dynamic"] = row
        if row.inputs is not None and not row.inputs.static and row.inputs != _dynamic(row):
            raise Refused(
                f"layers with {row.grid} weights round inputs to {_dynamic(row)} as they come, "
                f"not to {row.inputs}",
                where=row.name,
                fix="> compressed-tensors says it layer by layer",
            )
        if row.inputs is not None and row.inputs.static and is_expert(row.name):
            raise Refused(
                "experts with fixed scales of their inputs have no layout of their own there",
                where=row.name,
                fix="> compressed-tensors says it layer by layer",
            )
    if len(found) > 1:
        raise Refused(
            "the layers of an FP8 folder all round their inputs in one way",
            where=list(found.values())[1].name,
            fix="> compressed-tensors says it layer by layer",
        )
    return next(iter(found))


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
