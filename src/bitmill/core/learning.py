"""Solvers that learn from what a block, or the whole model, puts out, and what they are given for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitmill.core.axes import Grid, Solver
from bitmill.core.schooling import Schooling
from bitmill.core.types import Problem, Solution


@dataclass(frozen=True, eq=False)
class BlockTask:
    """A block of the model to put on grids as a whole: its weights, and what they are for.

    Attributes:
        name: what messages call it.
        problems, grids: one weight each, with its grid.
        windows: calibration windows there are.
        outputs: what the block makes of the windows with these indices when the values of ``problems`` are
            these; ``n T H``, differentiable in the values. Windows come as the blocks before, quantized
            already, have left them.
        wanted: what the original model's block makes of the same windows.
    """

    name: str
    problems: Sequence[Problem]
    grids: Sequence[Grid]
    windows: int
    outputs: Callable[[Sequence[Tensor], Tensor], Tensor]
    wanted: Callable[[Tensor], Tensor]


class BlockSolver(Solver):
    """A solver that learns from a block's output; :meth:`Solver.solve` goes by each layer's own."""

    @property
    @abstractmethod
    def windows_run(self) -> int:
        """Windows that go through a block while it learns, forwards; each goes backwards, too."""

    @abstractmethod
    def learn(self, task: BlockTask) -> list[Solution]:
        """One solution a problem."""


@dataclass(frozen=True, eq=False)
class ModelTask:
    """A whole model on its grids, and what may move of it: its leaves, by name.

    Attributes:
        start: the leaves as the model has them: scales, offsets, weights, norms; float32.
        units: what a relative change of 1 is of each leaf, broadcast to its shape; 0 where it cannot move.
        schooling: by the divergence from the original model at leaves as they would be stored; derivatives
            are by relative changes.
    """

    start: Mapping[str, Tensor]
    units: Mapping[str, Tensor]
    schooling: Schooling


@dataclass(frozen=True, eq=False)
class Tuned:
    """What came of a :class:`ModelTask`.

    Attributes:
        leaves: the best that was met; ``start`` itself where nothing was better.
        facts: for the report: ``first`` and ``least`` divergence of the judge, ``best_step``, ``trace``, why
            it ``stopped`` early.
    """

    leaves: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class ModelSolver(Solver):
    """A solver that goes on from what another has left, with the model as a whole. :meth:`Solver.solve` is
    plain rounding."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Windows that go through the model together."""

    @property
    @abstractmethod
    def judgements(self) -> int:
        """How often the model is judged."""

    @property
    @abstractmethod
    def norms(self) -> bool:
        """Whether weights of norms move, too."""

    @property
    @abstractmethod
    def half(self) -> bool:
        """Whether lessons may be in bfloat16, where nothing is rounded on the way."""

    @property
    @abstractmethod
    def weights(self) -> bool:
        """Whether the weights move, and are rounded anew in every step; if not, the codes are another's, and
        what is stored beside them moves."""

    @property
    @abstractmethod
    def blocks_at_once(self) -> int:
        """Blocks that learn together, then the next as many; 0 for all."""

    @property
    @abstractmethod
    def own_text(self) -> bool:
        """Whether it learns from text of the model's own where no other is named."""

    @abstractmethod
    def tune(self, task: ModelTask) -> Tuned:
        """Learn."""
