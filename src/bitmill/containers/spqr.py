"""SpQR folders: what the authors' converter writes and transformers loads with the package spqr_quant
(Dettmers et al., arXiv 2306.03078).

A word of 64 bits holds a row of a tile: its scale's code, its zero point's, sixteen codes, and an eighth of
the tile's second-order numbers; outliers stand beside them as rows of entries. The package runs on an NVIDIA
GPU only, one token and one sequence at a time, in half precision. Here the layout is held against its
converter and its decoder, which are compiled without one; its kernels were never run.

Load it with transformers 4.57. transformers 5.23.0 loads no such folder, whoever wrote it: it calls a method
that spqr_quant 0.2.0 spells otherwise (``create_placehodler``), and looks for a layer by its path where only
names of children are (``KeyError``). Either fills every layer of a folder written here with what it should,
the newer one past those two lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from bitmill.checkpoint.packed_folder import quantization_config
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    quantized_folder,
    to_bytes,
)
from bitmill.containers._spqr_read import BITS, METHOD, MOST_COLUMNS, TENSORS, open_folder, words_of
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert
from bitmill.grids.dense import Dense
from bitmill.grids.spqr import Spqr as Values
from bitmill.numerics.outliers import sparse
from bitmill.numerics.tiles import PARTS, SIDE

_WEIGHT = ".weight"
_SHARED_BYTES = 48 << 10  # of a GPU's fast memory, what a kernel gets that does not ask for more
_OTHERS = 2116  # bytes that the kernel keeps beside the inputs


@final
@dataclass(frozen=True)
class Spqr(Container):
    """A Hugging Face folder of SpQR's three-bit layers for spqr_quant 0.2.0 and transformers 4.57; what is
    kept is in half precision, since its reader takes no other."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if not isinstance(grid, Values):
            return f"it holds SpQR's grids only, not {grid}: say spqr3-g16-o1-act; > bitmill holds nearly all"
        if grid.bits != BITS:
            return f"its words have room for {BITS} bits a code, not {grid.bits}; > bitmill holds {grid}"
        if role not in LINEAR_ROLES:
            return f"its readers take only the layers of the blocks quantized, not the {role}"
        if grid.refuses(shape) is not None:
            return grid.refuses(shape)
        if shape[1] > MOST_COLUMNS:
            return (
                f"columns of outliers are 16-bit numbers that its kernels read as signed: at most "
                f"{MOST_COLUMNS} columns, not {shape[1]}; keep this role, or > bitmill"
            )
        most = (_SHARED_BYTES - _OTHERS) // 2 // SIDE * SIDE
        if shape[1] > most:
            return (
                f"its kernel keeps a token's whole input in 48 KiB of shared memory: at most {most} columns, "
                f"not {shape[1]}; keep this role, or > bitmill"
            )
        return None

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        return grid

    def default_grid(self, dtype: str, role: str) -> str:
        """transformers refuses to load it in any other type."""
        return "f16"

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: layers with a bias, experts of a mixture, or what is kept in another type.
        """
        return quantized_folder(source, rows, _planned, _settings(rows, source), notes)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        grid, params = _spqr(row.grid), quantized.params
        for part in PARTS:
            exactly(params[part], torch.float16)
        order = torch.arange(quantized.shape[1])
        if grid.act:
            order = params["order"][0].to(torch.int64)
        offsets, columns, values = sparse(params["outlier"][:, order], grid.apart(quantized.shape))
        bits = exactly(values, torch.float16).view(torch.int16).to(torch.int32)
        parts = (
            words_of(quantized.codes[:, order], params),
            offsets,
            bits << 16 | columns,
            (order[1::2] << 16 | order[0::2]).to(torch.int32),
        )
        names = _planned(row)
        return {name: to_bytes(part) for name, part in zip(names, parts, strict=True)}


def _spqr(grid: Grid) -> Values:
    if not isinstance(grid, Values):
        raise ValueError(f"no layout holds {grid}")
    return grid


def _planned(row: Row) -> dict[str, Planned]:
    if isinstance(row.grid, Dense):
        return {row.name: (DENSE_DTYPES[str(row.grid)], row.shape)}
    if not row.name.endswith(_WEIGHT):
        raise Refused(f"only weights of layers can be on {row.grid}", where=row.name, fix="keep this tensor")
    grid, (out, columns) = _spqr(row.grid), row.shape
    planned: tuple[Planned, ...] = (
        ("I64", (out * columns // SIDE,)),
        ("I32", (out + 1,)),
        ("I32", (grid.apart((out, columns)),)),
        ("I32", (columns // 2,)),
    )
    module = row.name.removesuffix(_WEIGHT)
    return {f"{module}.{part}": size for part, size in zip(TENSORS, planned, strict=True)}


def _settings(rows: Sequence[Row], source: Checkpoint) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized."""
    placed = [row for row in rows if not isinstance(row.grid, Dense)]
    if not placed:
        return {}
    for row in placed:
        if f"{row.name.removesuffix(_WEIGHT)}.bias" in source.tensors:
            raise Refused(
                "layers of spqr_quant have no bias, and this one has",
                where=row.name,
                fix=f"keep={row.role}, or > bitmill, which holds both",
            )
        if is_expert(row.name):
            raise Refused(
                "transformers stacks the experts of a block in one tensor, which is no SpQR layer",
                where=row.name,
                fix="> bitmill",
            )
    chosen = {row.name.removesuffix(_WEIGHT) for row in placed}
    linear = [r.name.removesuffix(_WEIGHT) for r in rows if len(r.shape) == 2 and r.role != "embed"]
    skipped = [module for module in linear if module not in chosen]
    if "lm_head" not in linear:
        skipped.append("lm_head")  # tied: the module exists, its weight is the embedding's
    # Layers that stay are named as transformers 5 reads it, and as transformers 4 does.
    shapes = {f"{name}.shape": size[0] for row in placed for name, (_, size) in _planned(row).items()}
    return {
        "quant_method": METHOD,
        "bits": BITS,
        "beta1": SIDE,
        "beta2": SIDE,
        "shapes": shapes,
        "modules_to_not_convert": [f"{module}{end}" for module in skipped for end in ("", _WEIGHT)],
    }
