"""What grids of llama.cpp's block types have in common: the name of a type is the whole grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from bitmill.core.axes import Grid
from bitmill.numerics.blocks import TYPES, BlockType, type_of
from bitmill.numerics.ggml_rows import not_whole_blocks

_This = TypeVar("_This", bound="BlockGrid")
_Class = type[_This]


@dataclass(frozen=True)
class BlockGrid(Grid):
    """A grid whose values and bytes one of llama.cpp's block types fixes.

    Attributes:
        type: its name, lower-case.
    """

    type: str

    types: ClassVar[tuple[str, ...]]
    """Names of the types that a member has."""

    small: ClassVar[str]
    """Types with blocks of 32, for rows that are not whole blocks of this one."""

    def __post_init__(self) -> None:
        if self.type not in self.types:
            raise ValueError(f"block type {self.type!r} is not one of {', '.join(self.types)}")

    @property
    def layout(self) -> BlockType:
        """Number in a file, weights and bytes of a block."""
        return TYPES[type_of(self.type)]

    @property
    def block(self) -> tuple[int, int]:
        return (1, self.layout.length)

    @classmethod
    def parse(cls: _Class[_This], text: str) -> _This | None:
        name = text.lower()
        return cls(name) if name in cls.types else None

    @classmethod
    def examples(cls: _Class[_This]) -> tuple[_This, ...]:
        return tuple(cls(name) for name in cls.types)

    def __str__(self) -> str:
        return self.type

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return not_whole_blocks(str(self), shape, self.block[1], self.small)

    def storage_bits(self, shape: tuple[int, int]) -> int:
        return 8 * shape[0] * self.layout.row_bytes(shape[1])
