"""Grids that keep a few weights apart from the rest, as far as a solver must know them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from bitmill.core.axes import Grid
from bitmill.core.types import Params


class SparseGrid(Grid):
    """A grid of scalars in groups of columns that keeps a number of weights apart: to each of those the file
    adds a number of its own. Groups can be fitted one after another, around what is apart."""

    @property
    @abstractmethod
    def ordered(self) -> bool:
        """Whether groups may be of any columns, in an order that is stored with them."""

    @abstractmethod
    def apart(self, shape: tuple[int, int]) -> int:
        """How many weights of a matrix are apart: exact, whatever the weights."""

    @abstractmethod
    def sensitivity(self, w: Tensor, importance: Tensor) -> Tensor:
        """What the weighted squared error of its group would lose with each weight, were it apart:
        ``out in``. The columns of ``w`` are whole groups."""

    @abstractmethod
    def fit_group(self, w: Tensor, apart: Tensor, importance: Tensor | None = None) -> Params:
        """Parameters of one group of columns, ``out width``, fitted to what is not ``apart`` (bool); None is
        the grid's plain rule."""

    @abstractmethod
    def values_of(self, group: Params) -> Tensor:
        """Values of the codes of one group, ``out codes`` float32."""

    @abstractmethod
    def joined(self, groups: Sequence[Params], added: Tensor, order: Tensor) -> Params:
        """Parameters of a matrix from those of its groups. ``added`` (``out in``) is what the file adds to
        single weights; ``order`` names the columns of the groups, one group after the other, and is that of
        the matrix unless the grid is :attr:`ordered`."""
