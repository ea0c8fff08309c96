"""What learning with a whole model goes by, whatever it is that moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Schooling:
    """Lessons, a judge, and where progress is made safe.

    Attributes:
        windows: calibration windows there are.
        lesson: loss over the windows with these indices (nats a token) where what moves is these tensors, by
            name, and its derivatives by them.
        judge: loss over text that does not teach.
        step: where to go on from; 0 at the start.
        state: what was kept there.
        record: facts kept with it.
        keep: makes ``step``, ``state`` and ``record`` safe, so that an interrupted run goes on from there.
        tell: called with the steps done and a line for the reader.
    """

    windows: int
    lesson: Callable[[Mapping[str, Tensor], Tensor], tuple[float, Mapping[str, Tensor]]]
    judge: Callable[[Mapping[str, Tensor]], float]
    step: int
    state: Mapping[str, Tensor]
    record: Mapping[str, Any]
    keep: Callable[[int, Mapping[str, Tensor], Mapping[str, Any]], None]
    tell: Callable[[int, str], None]
