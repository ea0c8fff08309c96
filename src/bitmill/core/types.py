"""Frozen records that travel between the axes: values in, values out, no behaviour beyond arithmetic.

Shapes: weights are ``out in``, activations ``tokens in``. Nothing here knows a concrete grid, solver or file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bitmill.core.inputs import InputGrid

SAMPLE = 256
"""Inputs of a layer that are kept as they are, at most."""

if TYPE_CHECKING:
    from bitmill.core.axes import Grid

Params = Mapping[str, Tensor]
"""What a grid stores beside the codes: scales, zeros, super-scales. First dimension is ``out`` for every
per-row tensor; a whole-tensor value has shape ``()``."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight on a grid: ``grid.decode(codes, params)`` is its value.

    Attributes:
        grid: the values that can be stored.
        codes: integer tensor; ``out in`` for scalar grids, ``out in/width`` for vector grids.
        params: the grid's own parameters (see :data:`Params`).
        shape: ``(out, in)`` of the dense weight.
        inputs: what calibration fixed of the grid of its inputs, by :attr:`InputGrid.fixed`.
    """

    grid: Grid
    codes: Tensor
    params: Params
    shape: tuple[int, int]
    inputs: Params = field(default_factory=dict)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The stored value, ``out in``."""
        return self.grid.decode(self.codes, self.params).to(dtype)

    @property
    def bits(self) -> int:
        """Bits of information stored (codes and parameters, without a container's padding)."""
        return self.grid.storage_bits(self.shape)

    def same_values(self, other: Quantized) -> bool:
        """Whether both decode to the same numbers, bit for bit, whatever their grids are called."""
        return self.shape == other.shape and torch.equal(self.dense(), other.dense())

    def rows(self, index: Tensor) -> Quantized:
        """The same rows in another order.

        Raises:
            ValueError: rows share parameters on this grid, and would decode to something else.
        """
        if self.grid.block[0] > 1:
            raise ValueError(f"rows on {self.grid} share parameters and cannot be moved")
        out = self.shape[0]
        params = {k: v[index] if v.dim() and v.shape[0] == out else v for k, v in self.params.items()}
        return replace(self, codes=self.codes[index], params=params)

    def parts(self, heights: Sequence[int]) -> list[Quantized]:
        """Runs of rows, ``heights`` of them each, as weights of their own."""
        if len(heights) == 1:
            return [self]
        every = torch.arange(self.shape[0], device=self.codes.device).split(list(heights))
        return [replace(self.rows(index), shape=(len(index), self.shape[1])) for index in every]


@dataclass(frozen=True, eq=False)
class Moments:
    """Streaming statistics of one linear layer's input, in float32.

    Attributes:
        tokens: rows summed over.
        square: sum of ``x²`` a channel, ``in``.
        magnitude: sum of ``|x|`` a channel, ``in``; absent when they come from an importance matrix.
        absmax: largest ``|x|`` a channel, ``in``; absent as ``magnitude`` is.
        gram: sum of ``x xᵀ``, ``in in``; absent when no solver needs it.
        low, high: smallest and largest ``x`` a channel, ``in``; absent unless a zero point is to be fixed.
        cross: sum of ``(x̃ - x) xᵀ``, ``in in``, where ``x̃`` is the same token's input in the original model
            and ``x`` behind blocks that are quantized already; absent when no solver needs it.
        sample: :data:`SAMPLE` of the inputs themselves at most, spread evenly, ``n in``; absent as
            ``magnitude`` is.
    """

    tokens: int
    square: Tensor
    magnitude: Tensor | None = None
    absmax: Tensor | None = None
    gram: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    cross: Tensor | None = None
    sample: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """Mean of ``x²`` a channel, ``in``: llama.cpp's imatrix, the diagonal of the Hessian."""
        return self.square / max(self.tokens, 1)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together."""
        return Moments(
            self.tokens + other.tokens,
            self.square + other.square,
            _both(torch.add, self.magnitude, other.magnitude),
            _both(torch.maximum, self.absmax, other.absmax),
            _both(torch.add, self.gram, other.gram),
            _both(torch.minimum, self.low, other.low),
            _both(torch.maximum, self.high, other.high),
            _both(torch.add, self.cross, other.cross),
            _both(_thinned, self.sample, other.sample),
        )

    @property
    def range(self) -> tuple[Tensor, Tensor] | None:
        """Smallest and largest ``x`` over all channels, scalars; where only magnitudes are known, those with
        either sign; None where not even they are."""
        if self.low is not None and self.high is not None:
            return self.low.min(), self.high.max()
        return None if self.absmax is None else (-self.absmax.max(), self.absmax.max())


def _thinned(one: Tensor, other: Tensor) -> Tensor:
    both = torch.cat([one, other])
    return both[torch.arange(min(SAMPLE, len(both))) * len(both) // min(SAMPLE, len(both))]


def _both(
    join: Callable[[Tensor, Tensor], Tensor], one: Tensor | None, other: Tensor | None
) -> Tensor | None:
    return None if one is None or other is None else join(one, other)


@dataclass(frozen=True)
class Note:
    """Something that did not go as asked, or that a reader of the report should know.

    Attributes:
        kind: a short stable key: ``damping``, ``dead-channels``, ``fallback``, ``kept`` …
        where: the tensor or block.
        text: one sentence.
        value: the number behind it, if there is one.
    """

    kind: str
    where: str
    text: str
    value: float | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight to put on a grid. ``weight`` is ``out in`` float32; ``moments`` describe its input, and
    ``inputs`` what that is rounded to when the model runs. Where several weights are solved as one, ``runs``
    are their roles and rows, one after the other, and ``role`` is the first's."""

    name: str
    role: str
    weight: Tensor
    moments: Moments | None = None
    inputs: InputGrid | None = None
    runs: tuple[tuple[str, int], ...] = ()

    @property
    def importance(self) -> Tensor | None:
        """The mean square of each input channel, ``in``; None where nothing was calibrated."""
        return None if self.moments is None else self.moments.importance


class Basis(Protocol):
    """An orthogonal matrix ``R``, or blocks of one, that rows are multiplied by."""

    def turn(self, rows: Tensor) -> Tensor:
        """``rows R``, ``… width``."""

    def turn_back(self, rows: Tensor) -> Tensor:
        """``rows Rᵀ``."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """How the inputs of one linear are rounded.

    Attributes:
        grid: what to.
        fixed: what calibration fixed of it.
        basis: what a runtime multiplies them by before it rounds them; the weight (or the queries that keys
            are multiplied with) are those of inputs without it. None where they are rounded as they are.
    """

    grid: InputGrid
    fixed: Params = field(default_factory=dict)
    basis: Callable[[], Basis] | None = None

    def __str__(self) -> str:
        return str(self.grid) if self.basis is None else f"{self.grid} in a rotated basis"


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver hands back: the quantized weight and whatever is worth a row in the report."""

    quantized: Quantized
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class TensorFacts:
    """What a checkpoint says about one tensor before its data is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Slot:
    """One stored tensor of an output file: ``bytes_`` bytes at ``offset`` of the file."""

    name: str
    offset: int
    bytes_: int


@dataclass(frozen=True, eq=False)
class FileImage:
    """One output file, known to the byte before any weight is read.

    Attributes:
        path: relative to the output folder; empty when the output is this one file.
        head: the bytes at offset 0 (a header, or the whole content of a small text file).
        slots: where each stored tensor goes.
        bytes_: the file's exact size; what neither head nor slots cover is zero.
    """

    path: str
    head: bytes
    slots: tuple[Slot, ...]
    bytes_: int


@dataclass(frozen=True)
class Split:
    """The most that one file of an output may hold; 0 is no limit.

    Attributes:
        bytes_: of the whole file.
        tensors: of them.
    """

    bytes_: int = 0
    tensors: int = 0


@dataclass(frozen=True)
class Row:
    """One line of a plan: what happens to one source tensor.

    Attributes:
        name: canonical (Hugging Face) tensor name.
        role: the family's word for it: ``q``, ``down``, ``embed``, ``norm`` …
        layer: block index, or None outside the blocks.
        shape: of the dense tensor.
        grid: what it is stored on; a ``Dense`` grid keeps it.
        solved: whether the recipe's solver places it (False: stored by plain rounding or kept).
        why: where the choice comes from.
        fallback: the grid that was asked for, when a shape forced another one.
        inputs: what the inputs of this linear are rounded to when the model runs; None leaves them.
        cache: where this is no tensor of the model but a scale of its cache: what keys, or values, are
            rounded to on their way into it.
        dtype: precision of what the plan keeps, for a layout that names the type it is decoded to; empty
            where no plan says.
        turn: order of the Hadamard matrix that a runtime multiplies runs of this linear's input channels by
            (of a cache's row: channels of the keys), and so does what is stored; 0 for none.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    grid: Grid
    solved: bool
    why: str
    fallback: str | None = None
    inputs: InputGrid | None = None
    cache: InputGrid | None = None
    dtype: str = ""
    turn: int = 0
