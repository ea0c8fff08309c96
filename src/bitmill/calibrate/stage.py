"""One stage of a block that is solved while all tokens wait inside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from bitmill.calibrate.moments import MomentSum
from bitmill.calibrate.stream import Twin
from bitmill.core.types import Moments, Row


@dataclass
class Stage:
    """Gathers a group's input until all tokens are there, then has the group solved by its moments."""

    group: Sequence[Row]
    total: MomentSum
    solve: Callable[[Sequence[Row], Moments], None]
    twin: Twin | None = None

    def __post_init__(self) -> None:
        self._seen: list[Tensor] = []  # what waits inside the block holds them anyway
        self._originals: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        """One micro-batch's input."""
        self._seen.append(x)
        if self.twin is not None:
            self._originals.append(self.twin.take())

    def close(self) -> None:
        """All are there."""
        self.total.add_all(self._seen, self.group[0].name, self._originals or None)
        self._seen, self._originals = [], []
        if self.twin is not None:
            self.twin.advance()
        self.solve(self.group, self.total.moments())
        self.total = MomentSum(1, False)  # of many experts, one Gram matrix at a time is alive
