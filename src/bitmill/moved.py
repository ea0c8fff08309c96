"""What moves of a model while it learns as a whole: scales beside codes that stay, weights that are rounded
anew in every step, weights of norms. Each is a function of its leaves, with derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from bitmill.core.axes import ScalarGrid
from bitmill.core.types import Quantized, Row
from bitmill.numerics.learned import step_of_each
from bitmill.numerics.moving import slopes

Leaves = Mapping[str, Tensor]
"""What moves, by name: ``NAME:scale``, or the weight's own name; float32."""

SLOW = 0.1  # a norm's weight moves so far, relative to itself, where others move by a step of their grid


class Moved(ABC):
    """A tensor of the model as a function of leaves."""

    @property
    @abstractmethod
    def moves(self) -> bool:
        """Whether it has leaves at all."""

    @abstractmethod
    def start(self) -> Leaves:
        """Its leaves as the model has them; none where it stays."""

    @abstractmethod
    def units(self) -> Leaves:
        """What a relative change of 1 is of each, broadcast to its shape."""

    @abstractmethod
    def near(self, leaves: Leaves) -> Leaves:
        """The leaves nearest to these that can be stored."""

    @abstractmethod
    def quantized(self, leaves: Leaves) -> Quantized:
        """As it would be stored."""

    @abstractmethod
    def value(self, leaves: Leaves) -> Tensor:
        """What the model computes with."""

    @abstractmethod
    def slopes(self, leaves: Leaves, value: Tensor, gradient: Tensor) -> Leaves:
        """Derivatives of a loss by relative changes of its leaves.

        Args:
            value: at ``leaves``.
            gradient: of the loss by it.
        """


@final
@dataclass(frozen=True, eq=False)
class MovedScales(Moved):
    """A weight whose codes stay.

    Attributes:
        row: of the plan.
        placed: as the walk left it.
        names: of the scales that move; none where all of it stays.
        linear: whether values are linear in all of them together.
    """

    row: Row
    placed: Quantized
    names: tuple[str, ...]
    linear: bool

    @property
    def moves(self) -> bool:
        """Where any scale does."""
        return bool(self.names)

    def start(self) -> Leaves:
        """Scales."""
        return {f"{self.row.name}:{name}": self.placed.params[name].float() for name in self.names}

    def units(self) -> Leaves:
        """Themselves."""
        return {name: scale.abs() for name, scale in self.start().items()}

    def near(self, leaves: Leaves) -> Leaves:
        """What the grid stores; one that has not moved stays what it is."""
        made, start = {}, self.start()
        for name in self.names:
            key = f"{self.row.name}:{name}"
            near = self.placed.grid.stored_scale(name, leaves[key])
            made[key] = torch.where(leaves[key] == start[key], start[key], near)
        return made

    def quantized(self, leaves: Leaves) -> Quantized:
        """The codes with these scales."""
        scales = {name: leaves[f"{self.row.name}:{name}"] for name in self.names}
        return replace(self.placed, params={**self.placed.params, **scales})

    def value(self, leaves: Leaves) -> Tensor:
        """Decoded."""
        return self.quantized(leaves).dense()

    def slopes(self, leaves: Leaves, value: Tensor, gradient: Tensor) -> Leaves:
        """See :func:`~bitmill.numerics.moving.slopes`."""
        by = slopes(self.quantized(leaves), self.names, self.linear, value, gradient)
        return {f"{self.row.name}:{name}": slope for name, slope in by.items()}


@final
@dataclass(frozen=True, eq=False)
class MovedWeight(Moved):
    """A weight that is rounded to nearest wherever it goes, its range as wide as it is then; derivatives go
    through that as if it were not there (Bengio et al., arXiv 1308.3432).

    Attributes:
        row: of the plan.
        placed: as the walk left it: what it stays where it has not moved.
        weight: ``out in`` float32, before it moves.
        step: mean distance of neighbouring values in each row of it, ``out 1``.
    """

    row: Row
    placed: Quantized
    weight: Tensor
    step: Tensor

    @classmethod
    def of(cls, row: Row, placed: Quantized, weight: Tensor) -> MovedWeight:
        """Of a weight on a grid of scalars."""
        assert isinstance(row.grid, ScalarGrid)
        step = step_of_each(row.grid, placed.params, weight.shape)
        return cls(row, placed, weight, step.float().mean(1, keepdim=True))

    @property
    def moves(self) -> bool:
        """Always."""
        return True

    def start(self) -> Leaves:
        """The weight."""
        return {self.row.name: self.weight}

    def units(self) -> Leaves:
        """A step of the grid."""
        return {self.row.name: self.step}

    def near(self, leaves: Leaves) -> Leaves:
        """Itself: what is stored is what it is rounded to."""
        return {self.row.name: leaves[self.row.name]}

    def quantized(self, leaves: Leaves) -> Quantized:
        """Rounded to nearest, once it has moved."""
        moved = leaves[self.row.name]
        return self.placed if torch.equal(moved, self.weight) else self.row.grid.round(moved)

    def value(self, leaves: Leaves) -> Tensor:
        """Rounded to nearest."""
        return self.quantized(leaves).dense()

    def slopes(self, leaves: Leaves, value: Tensor, gradient: Tensor) -> Leaves:
        """Those by its value."""
        return {self.row.name: gradient * self.step}


@final
@dataclass(frozen=True, eq=False)
class MovedNorm(Moved):
    """The weight of a norm.

    Attributes:
        row: of the plan.
        weight: as it is stored before it moves, float32.
        unit: what a relative change of 1 is.
    """

    row: Row
    weight: Tensor
    unit: Tensor

    @property
    def moves(self) -> bool:
        """Always."""
        return True

    def start(self) -> Leaves:
        """The weight."""
        return {self.row.name: self.weight}

    def units(self) -> Leaves:
        """What it multiplies by."""
        return {self.row.name: self.unit}

    def near(self, leaves: Leaves) -> Leaves:
        """In the precision of the file; one that has not moved stays what it is."""
        moved = leaves[self.row.name]
        return {self.row.name: torch.where(moved == self.weight, self.weight, self.quantized(leaves).dense())}

    def quantized(self, leaves: Leaves) -> Quantized:
        """In the precision of the file."""
        return self.row.grid.round(leaves[self.row.name])

    def value(self, leaves: Leaves) -> Tensor:
        """The leaf."""
        return leaves[self.row.name].clone()

    def slopes(self, leaves: Leaves, value: Tensor, gradient: Tensor) -> Leaves:
        """Relative to what it multiplies by."""
        return {self.row.name: gradient * self.unit}
