"""A plain Hugging Face folder: dense weights in safetensors, for ``AutoModelForCausalLM.from_pretrained``.

The way back from GGUF and from every quantized folder: ``bf16 > safetensors`` writes ``config.json``, shards
with their index, the tokenizer, the chat template and ``generation_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    folder_images,
    model_config,
    to_bytes,
)
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.grids.dense import Dense


@final
@dataclass(frozen=True)
class Safetensors(Container):
    """A Hugging Face folder of dense weights, nothing quantized."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Never: a folder that no other container claims is opened as this one, whoever wrote it."""
        return False

    def open(self, path: Path) -> Checkpoint:
        return SafetensorsFolder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        return f"a plain folder holds f32, f16 and bf16; {grid} needs gguf, compressed-tensors or bitmill"

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        return grid

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {row.name: bytes_of(_planned(row))}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        tensors = {row.name: _planned(row) for row in rows}
        metadata = {f"bitmill.{name}": text for name, text in notes.items()}
        return folder_images(source, tensors, model_config(source, rows), metadata)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        return {row.name: to_bytes(quantized.codes)}


def _planned(row: Row) -> Planned:
    return DENSE_DTYPES[str(row.grid)], row.shape
