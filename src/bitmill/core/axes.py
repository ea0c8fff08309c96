"""The five axes: Transform × Grid × Solver × Allocation × Container, and the Checkpoint they read from.

Every class is abstract or final: a member implements what is abstract here and overrides nothing else.
A member is one file in the folder of its axis; the file's name is its public name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.core.inputs import InputGrid
from bitmill.core.types import (
    FileImage,
    Inputs,
    Moments,
    Params,
    Problem,
    Quantized,
    Row,
    Solution,
    TensorFacts,
)


class Grid(ABC):
    """What can be stored: the set of values and their parameters. Members are frozen dataclasses.

    ``str(grid)`` is its canonical text, and ``type(grid).parse(str(grid)) == grid``.
    """

    @property
    @abstractmethod
    def block(self) -> tuple[int, int]:
        """Rows × columns that share parameters; 0 stands for "all of them"."""

    @property
    @abstractmethod
    def span(self) -> tuple[int, int]:
        """Rows × columns encoded together: ``(1, 1)`` for scalars, ``(1, 8)`` for E8."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Grid | None:
        """The grid this lower-case text names, or None when it is not one of this family's names."""

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[Grid, ...]:
        """Members that contract tests, docs and ``bitmill recipes`` show."""

    @abstractmethod
    def __str__(self) -> str:
        """Canonical text."""

    @abstractmethod
    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored, or None."""

    @abstractmethod
    def storage_bits(self, shape: tuple[int, int]) -> int:
        """Exact bits of codes and parameters for a weight of this shape."""

    @abstractmethod
    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Parameters for ``w`` (``out in``, float32), minimizing squared error weighted by ``importance``.

        ``importance`` is ``in`` (or ``out in``), non-negative, float32; None is the grid's plain rule.
        Parameters are already rounded to what the file will hold.
        """

    @abstractmethod
    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        """Codes of the values nearest to ``w``, whose columns are ``at … at + w.shape[1]`` of the tensor."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        """Float32 values of ``codes``, whose first column is column ``at`` of the tensor."""

    @abstractmethod
    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        """``fit`` and ``encode`` in one search. Members whose search fixes codes that ``encode`` alone
        could not reproduce (a K-quant sub-block with scale 0) do it here; the others compose the two."""

    @abstractmethod
    def scales(self) -> tuple[str, ...]:
        """Parameters in which values are linear while all else is fixed: ``out blocks`` in even runs of
        columns (or fewer rows, where rows share them). Finer ones first; empty where none can move."""

    @abstractmethod
    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        """The values nearest to ``values`` (float32) that the parameter ``name``, one of :meth:`scales`, can
        be stored with; float32."""


@dataclass(frozen=True, eq=False)
class Points:
    """Vectors of eight columns: ``step · (level + shift)`` a coordinate, with a sign where signs are apart.

    Attributes:
        step, shift: float32 ``out vectors``; a vector of step 0 is all zeros.
        either: whether the opposite shift may be taken as well.
        levels: values of the levels, float32.
        halves: ``· 4`` uint8, the level of each coordinate of half a vector.
        points: int64 rows of ``halves``: ``points 2``, or ``points 1`` where each half has its own point.
        signs: ``free``, ``even`` in number, or ``none`` (levels have their own).
    """

    step: Tensor
    shift: Tensor
    either: bool
    levels: Tensor
    halves: Tensor
    points: Tensor
    signs: str


class VectorGrid(Grid):
    """A grid of vectors from a list of points: rounding is a search in that list."""

    @abstractmethod
    def points_of(self, params: Params, at: int, columns: int) -> Points:
        """The points of these columns; ``at`` and ``columns`` are multiples of eight."""


class ScalarGrid(Grid):
    """A grid of scalars with a step: what clip search, learned rounding and training need."""

    @abstractmethod
    def step(self, params: Params, at: int, columns: int) -> Tensor:
        """Local distance between neighbouring values, ``out columns``."""

    @abstractmethod
    def scaled(self, params: Params, factor: Tensor) -> Params:
        """Parameters of a range ``factor`` times as wide; ``factor`` broadcasts over the blocks."""


@dataclass(frozen=True, eq=False)
class Affine:
    """Evenly spaced values of some columns. The value nearest to ``w`` is ``(k - zero) · step + base`` with
    ``k = round((w - base) / step + zero)`` held within ``low … high``, in float32 and in this order; where
    ``step`` is 0 it is ``base``.

    Attributes:
        step, zero, base: float32, broadcast to ``out columns``.
        low, high: the range of ``k``; what is stored may be offset from it.
    """

    step: Tensor
    zero: Tensor
    base: Tensor
    low: int
    high: int


class AffineGrid(ScalarGrid):
    """A scalar grid whose values are evenly spaced: rounding is arithmetic that a compiled loop can do."""

    @abstractmethod
    def affine(self, params: Params, columns: Tensor) -> Affine:
        """Spacing and place of the values of these columns (int64 indices into the tensor, any order)."""

    @abstractmethod
    def with_zero(self, params: Params, zero: Tensor) -> Params | None:
        """The same steps with other zero points, one a block and rounded to what is stored; None when this
        grid's zero points are not free. Zero stands at code ``zero``, counted from the lowest."""


@dataclass(frozen=True, eq=False)
class Levels:
    """Values ``level · scale`` of some columns; the nearest to ``w`` has the level nearest to ``w / scale``.

    Attributes:
        levels: sorted, float32.
        scale: float32, broadcasts to ``out columns``.
        ties_to_even: whether halfway goes to the level an even number of places from the middle one (the
            even mantissa of a float grid); to the lower level otherwise.
    """

    levels: Tensor
    scale: Tensor
    ties_to_even: bool = False


class LevelGrid(ScalarGrid):
    """A scalar grid whose values are a table of levels times a scale: rounding is a search in that table."""

    @abstractmethod
    def levels_of(self, params: Params, columns: Tensor, rows: int) -> Levels:
        """The table, and the scales of these columns (int64 indices, any order) of ``rows`` rows."""


class LinearMap(ABC):
    """A change of basis at a seam: the hidden vector ``h`` becomes ``h R``."""

    kind: ClassVar[str]

    @abstractmethod
    def read(self, weight: Tensor) -> Tensor:
        """The weight of a reader (``out in``) after the change, so that its output is unchanged."""

    @abstractmethod
    def write(self, weight: Tensor) -> Tensor:
        """The weight (``out in``) or bias (``out``) of a writer after the change."""

    @abstractmethod
    def undo(self, weight: Tensor) -> Tensor:
        """The reader's weight before the change: ``undo(read(w)) == w``."""

    @abstractmethod
    def moments(self, moments: Moments) -> Moments:
        """Moments of the changed hidden vector."""


@dataclass(frozen=True)
class Seam:
    """One hidden space of a block: which roles write it, which read it, and what may be folded there.

    Attributes:
        name: ``attn_in``, ``value``, ``mlp_in``, ``mlp_mid`` (inside a block) or ``residual`` (the model).
        writers: roles whose output (or norm weight) is this space.
        readers: roles whose input is this space.
        allows: kinds of :class:`LinearMap` that can be folded exactly: ``diagonal``, ``orthogonal``.
        per_head: whether the space is made of heads, so that a map acts inside each of them.
        shared: channels of a head, and how many heads the readers see in a row where the writers have one
            (grouped-query attention: the values of one head are read behind each of its queries).
    """

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    allows: frozenset[str]
    per_head: bool = False
    shared: tuple[int, int] = (1, 1)

    def tied(self, values: Tensor) -> Tensor:
        """``values`` of the readers' channels, each the mean of those that are one channel of the writers."""
        head, times = self.shared
        runs = values.reshape(-1, times, head)
        return runs.mean(1, keepdim=True).expand_as(runs).reshape(values.shape)


class Transform(ABC):
    """A change of basis that makes weights easier to store; members are frozen dataclasses."""

    needs: ClassVar[str]
    """``nothing`` (known before the walk), or what it is fitted from, block by block: ``diagonal`` moments or
    a ``gram`` matrix."""

    kind: ClassVar[str]
    """``diagonal``, ``orthogonal`` or ``permutation``: what the seam must allow."""

    @abstractmethod
    def seams(self) -> tuple[str, ...]:
        """Names of the seams it wants, in the order they are fitted."""

    @abstractmethod
    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """The map for one seam (``width`` is the hidden width, or a head's) and its gain in expected error
        (new / old, None when it is not fitted). ``readers`` is empty for a transform that needs nothing.

        Where the seam is ``shared``, a fitted diagonal is of the readers' width and should be the same on
        channels that :meth:`Seam.tied` ties; those that differ take their geometric mean.
        """


class Solver(ABC):
    """Which codes: puts weights that share one input on their grids; members are frozen dataclasses."""

    needs: ClassVar[str]
    """What it asks of calibration: ``nothing``, ``diagonal`` or ``gram``."""

    @abstractmethod
    def refuses(self, grid: Grid) -> str | None:
        """Why this solver cannot work on this grid, or None."""

    @abstractmethod
    def prefers(self, text: str) -> str:
        """The spelling of a grid name this solver means when the recipe leaves it open."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """How often it goes over a weight and its Gram matrix: what its time is proportional to."""

    @abstractmethod
    def solve(self, problems: Sequence[Problem], grids: Sequence[Grid]) -> list[Solution]:
        """One solution a problem. The problems share their input, hence their moments."""


class CalibratedSolver(Solver):
    """A solver that says how the walk takes the moments of its inputs."""

    @property
    @abstractmethod
    def sequential(self) -> bool:
        """Whether the inputs of a block's later weights are those behind its earlier weights as quantized;
        if not, all are the inputs of the block as it was."""

    @property
    @abstractmethod
    def cross(self) -> bool:
        """Whether it asks for :attr:`~bitmill.core.types.Moments.cross`: the original model runs along."""


@dataclass(frozen=True)
class Weight:
    """What allocation may look at: everything about a tensor but its data.

    Attributes:
        name, role, layer, shape: as in :class:`~bitmill.core.types.Row`.
        layers: number of blocks of the model.
        traits: facts of the model: ``heads``, ``kv_heads``, ``tied`` (1/0), ``experts``, ``imatrix`` (1/0).
        stored: its name in the container, where one is asked for by that.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    layers: int
    traits: Mapping[str, int]
    stored: str = ""


@dataclass(frozen=True)
class Choice:
    """An allocation's answer for one tensor: the grid's text, why, and what it replaced for shape's sake."""

    grid: str
    why: str
    fallback: str | None = None


class Allocation(ABC):
    """Which grid where: a pure function of one tensor's facts; members are frozen dataclasses."""

    @abstractmethod
    def choose(self, weight: Weight) -> Choice | None:
        """The grid for this tensor, or None to keep it dense."""


class Checkpoint(ABC):
    """A model on disk, read lazily: dense tensors by canonical (Hugging Face) name."""

    path: Path

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The model's ``config.json`` (derived from metadata for a GGUF file)."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorFacts]:
        """Every tensor's name, shape and dtype (``f32 f16 bf16``), in file order."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, dense, float32 unless stored in 16 bits."""

    @abstractmethod
    def stored(self, name: str) -> Quantized | None:
        """The tensor as stored, when it is quantized in the file."""

    @property
    @abstractmethod
    def carried(self) -> Mapping[str, bytes]:
        """Small files that travel with the model: tokenizer, chat template, generation config."""

    @property
    @abstractmethod
    def metadata(self) -> Mapping[str, Any]:
        """The container's own metadata (GGUF keys, quantization_config)."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Identity of the content: changes when any byte that matters changes."""


class InputCheckpoint(Checkpoint):
    """A checkpoint that can say how the inputs of its linears are rounded when it runs."""

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, Inputs]:
        """By canonical weight name; a linear that is not named gets its inputs as they are."""

    @property
    @abstractmethod
    def cache(self) -> Mapping[str, Inputs]:
        """What keys and values are rounded to on their way into the cache, by what their scale is called
        here: the attention's path, and ``k_scale`` or ``v_scale``."""


def inputs_of(checkpoint: Checkpoint) -> Mapping[str, Inputs]:
    """How the inputs of a checkpoint's linears are rounded when it runs, by weight name."""
    return checkpoint.inputs if isinstance(checkpoint, InputCheckpoint) else {}


def cache_of(checkpoint: Checkpoint) -> Mapping[str, Inputs]:
    """How a checkpoint's keys and values are rounded when it runs, by the name of their scale."""
    return checkpoint.cache if isinstance(checkpoint, InputCheckpoint) else {}


class Container(ABC):
    """How bytes are laid out for somebody's runtime; members are frozen dataclasses."""

    single_file: ClassVar[bool]
    """Whether the output is one file (``gguf``, unless it is asked to be in parts) or a folder."""

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path) -> bool:
        """Whether ``path`` looks like this container's output."""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Read it back: a checkpoint like any other."""

    @abstractmethod
    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        """Why this container cannot hold that, or None."""

    @abstractmethod
    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """The grid with what this container fixes settled: the precision of scales for a model of ``dtype``,
        the zero points its layout can express. The plan prints the result; idempotent."""

    @abstractmethod
    def default_grid(self, dtype: str, role: str) -> str:
        """The grid's text for a tensor that is kept: ``f32``, ``bf16`` …"""

    @abstractmethod
    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """Every output file to the byte: headers, slots, sizes. ``notes`` is provenance to record.
        An empty path is an output that is one file; else it is a folder."""

    @abstractmethod
    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        """The bytes of every slot that belongs to ``row``, keyed by slot name."""

    @abstractmethod
    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        """Names and sizes in bytes of the slots that belong to ``row``."""


class InputContainer(Container):
    """A container whose file can tell a runtime to round the inputs of a linear. ``Row.inputs`` and
    ``Quantized.inputs`` are what it then lays out; any other container is refused such rows by the plan."""

    @abstractmethod
    def refuses_inputs(self, grid: Grid, inputs: InputGrid) -> str | None:
        """Why no file here says that a linear with its weight on ``grid`` gets its inputs on ``inputs``, and
        which would; or None."""

    @abstractmethod
    def refuses_cache(self, grid: InputGrid) -> str | None:
        """Why no file here says that keys and values are rounded to ``grid``, and which would; or None."""

    @abstractmethod
    def implied_inputs(self, rows: Sequence[Row]) -> Mapping[str, InputGrid]:
        """What readers of this file round the inputs of linears to, whether or not anybody asks, by name of
        their rows; those that they leave are not there. ``rows`` are all of the plan's."""


def torch_dtype(name: str) -> torch.dtype:
    """``f32 f16 bf16`` to torch's own name."""
    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]


def total_bytes(images: Iterable[FileImage]) -> int:
    """Size of a whole output."""
    return sum(image.bytes_ for image in images)
