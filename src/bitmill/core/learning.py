"""Solvers that learn from what a whole block puts out, and what they are given to learn from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bitmill.core.axes import Grid, Solver
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
