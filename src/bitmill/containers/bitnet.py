"""BitNet folders as transformers loads them: ternary weights of two bits, inputs in eight (Ma et al., arXiv
2402.17764).

Written for the layer whose scale multiplies (``autobitlinear``, ``offline``), so that the file holds the very
scale; the other layer's, which divides, is read as well. The inputs of every such layer are rounded at run
time, asked or not: to ``-128 … 127`` by 127 over the largest magnitude of a token (``bitnet-int8``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from bitmill.checkpoint.packed_folder import quantization_config
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    quantized_folder,
    to_bytes,
)
from bitmill.containers._bitnet_read import ROUNDS, RUN, open_folder, pack_rows
from bitmill.core.axes import Checkpoint, Grid, InputContainer, torch_dtype
from bitmill.core.errors import Refused
from bitmill.core.inputs import InputGrid
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert
from bitmill.grids.dense import Dense
from bitmill.grids.ternary import Ternary

METHOD = "bitnet"

_WEIGHT = ".weight"


@final
@dataclass(frozen=True)
class Bitnet(InputContainer):
    """A Hugging Face folder of ternary linears, for transformers (``quant_method`` ``bitnet``)."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if not isinstance(grid, Ternary):
            return f"it holds ternary-tensor, not {grid}; > gguf holds tq1_0 and tq2_0"
        if role not in LINEAR_ROLES:
            return f"its readers take only the linears of the blocks ternary, not the {role}"
        if shape[0] % RUN:
            return f"{RUN} rows share a byte, and {shape[0]} rows are no multiple of that"
        return grid.refuses(shape)

    def refuses_inputs(self, grid: Grid, inputs: InputGrid) -> str | None:
        return None if inputs == ROUNDS else f"its layers round inputs to {ROUNDS}, and to nothing else"

    def refuses_cache(self, grid: InputGrid) -> str | None:
        return "its readers know no scales of a cache; > compressed-tensors"

    def implied_inputs(self, rows: Sequence[Row]) -> Mapping[str, InputGrid]:
        return {row.name: ROUNDS for row in rows if isinstance(row.grid, Ternary)}

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Scales are kept in the model's own precision: single precision holds any, the others bfloat16's."""
        return Ternary() if isinstance(grid, Ternary) and dtype != "f32" else grid

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row, source).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: experts of a mixture, which transformers keeps as stacks.
        """
        return quantized_folder(source, rows, lambda row: _planned(row, source), _settings(rows), notes)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        scale = exactly(quantized.params["scale"].reshape(1), torch_dtype(_kept(row, source)))
        return {
            row.name: to_bytes(pack_rows(quantized.codes)),
            f"{row.name.removesuffix(_WEIGHT)}.weight_scale": to_bytes(scale),
        }


def _kept(row: Row, source: Checkpoint) -> str:
    """Precision of the scale; half precision has too short a range for every scale of bfloat16."""
    dtype = row.dtype or source.tensors[row.name].dtype
    return "f32" if dtype == "f16" else dtype


def _planned(row: Row, source: Checkpoint) -> dict[str, Planned]:
    if isinstance(row.grid, Dense):
        return {row.name: (DENSE_DTYPES[str(row.grid)], row.shape)}
    if not row.name.endswith(_WEIGHT):
        raise Refused(f"only weights of layers can be on {row.grid}", where=row.name, fix="keep this tensor")
    return {
        row.name: ("U8", (row.shape[0] // RUN, row.shape[1])),
        f"{row.name.removesuffix(_WEIGHT)}.weight_scale": (DENSE_DTYPES[_kept(row, source)], (1,)),
    }


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized."""
    placed = [row for row in rows if not isinstance(row.grid, Dense)]
    if not placed:
        return {}
    for row in placed:
        if is_expert(row.name):
            raise Refused(
                "transformers stacks the experts of a block in one tensor, which is no BitNet layer",
                where=row.name,
                fix="tq2_0 > gguf, or > bitmill",
            )
    chosen = {row.name for row in placed}
    linear = [
        row for row in rows if len(row.shape) == 2 and row.role != "embed" and row.name.endswith(_WEIGHT)
    ]
    kept = [row.name.removesuffix(_WEIGHT) for row in linear if row.name not in chosen]
    return {
        "quant_method": METHOD,
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": list(dict.fromkeys([*kept, "lm_head"])),
    }
