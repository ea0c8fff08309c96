"""The writing half of a container whose folders are read here and written by their own tools alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from bitmill.checkpoint.safetensors_write import DENSE_DTYPES, bytes_of, to_bytes
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row


class ReadOnly(Container):
    """A container that refuses to write, and says what would be written instead."""

    @property
    @abstractmethod
    def why(self) -> str:
        """Why nothing is written, and which container to write."""

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        return None if str(grid) in DENSE_DTYPES else self.why

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        return grid

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {row.name: bytes_of((DENSE_DTYPES[str(row.grid)], row.shape))}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """Nothing.

        Raises:
            Refused: always.
        """
        raise Refused(self.why, fix="for dense values, write > safetensors")

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        return {row.name: to_bytes(quantized.codes)}
