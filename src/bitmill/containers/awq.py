"""AWQ folders in the GEMM layout: what AutoAWQ made and vLLM, SGLang and transformers load.

Four bits, packed across the outputs, with zero points as they are (Lin et al., arXiv 2306.00978). It names a
layout, whichever solver filled it: ``awq`` among the transforms is the method.
Experts of a mixture are stored one by one; the plan says who is known to take those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import PackedFolder, quantization_config
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.checkpoint.safetensors_write import (
    Planned,
    bytes_of,
    quantized_folder,
)
from bitmill.checkpoint.word_layout import (
    AWQ_GEMM,
    Said,
    group_said,
    one_grid,
    open_words,
    packed_row,
    planned_row,
)
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer, bits_and_group, integers

METHOD = "awq"

_BITS = 4
_GROUPS = (0, 16, 32, 64, 128)
_WEIGHT = ".weight"
_NEVER = ("embed", "head")


@final
@dataclass(frozen=True)
class Awq(Container):
    """A Hugging Face folder with one grid of four-bit integers for its layers, scales in half precision."""

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
            return f"it holds four-bit integers only, not {grid}; > bitmill holds nearly all"
        if grid.zero == "fz":
            return "its zero points are whole numbers: say -asym, or write > hqq"
        if grid.bits != _BITS:
            return f"it has four bits, not {grid.bits}: > gptq and > compressed-tensors have others"
        if grid.group not in _GROUPS:
            return f"its readers know groups of 16, 32, 64 and 128 and whole rows, not {grid}"
        if role not in LINEAR_ROLES:
            return f"its readers take only the layers of the blocks quantized, not the {role}"
        if grid.refuses(shape) is not None:
            return grid.refuses(shape)
        if shape[0] % 8:
            return f"eight outputs fill a word, and {shape[0]} are no multiple of 8"
        return None

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Scales are half precision; every zero point can be stored."""
        if not isinstance(grid, Integer) or grid.zero == "fz":
            return grid
        return replace(grid, scale="f16", zero_floor=0)

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
            Refused: the layers are on several grids.
        """
        return quantized_folder(source, rows, _planned, _settings(rows), notes)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        return packed_row(AWQ_GEMM, row, quantized, bits_and_group(row.grid))


def _planned(row: Row) -> dict[str, Planned]:
    return planned_row(AWQ_GEMM, row, bits_and_group(row.grid))


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized.

    Zero points are always stored, those of a symmetric grid as 8, and readers are told so: the faster kernels
    take nothing else. Layers that stay dense are named in full, which readers understand as a beginning, as a
    part or as an expression, always with the same outcome.
    """
    grid, placed = one_grid(rows, "an AWQ")
    if not isinstance(grid, Integer):
        return {}
    chosen = {row.name for row in placed}
    kept = [
        row.name.removesuffix(_WEIGHT)
        for row in rows
        if len(row.shape) == 2 and row.role not in _NEVER and row.name not in chosen
    ]
    return {
        "quant_method": METHOD,
        "bits": grid.bits,
        "group_size": grid.group or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }


def _open(path: Path) -> PackedFolder:
    folder, config = TensorFolder(path), read_config(path)
    settings = config["quantization_config"]
    bits, version = settings.get("bits", settings.get("w_bit")), settings.get("version", "gemm")
    if type(bits) is not int or bits != _BITS or str(version).lower() != "gemm":
        raise Refused(
            f"AWQ weights of {bits!r} bits in layout {version!r} cannot be read here, only 4 bits in 'gemm'",
            where=str(path / "config.json"),
            fix="give the original model",
        )
    if "group_size" not in settings and "q_group_size" in settings:
        settings = {**settings, "group_size": settings["q_group_size"]}
    said = Said(bits, group_said(settings, str(path / "config.json")), (_BITS,))
    return PackedFolder(folder, config, open_words(folder, AWQ_GEMM, said, integers))
