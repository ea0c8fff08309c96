"""Codebooks of llama.cpp's I-quants and the tables its searches need (Kawrakow, PRs #4773 and #5196).

A codebook holds some of all tuples of a few levels. A search rounds to a tuple; where that is not in the
codebook it looks at the points around it: all whose squared distance is among the few smallest that occur.
Points come from the ``gguf`` package, levels are numbered from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import quants
from numpy.typing import NDArray

_SHELLS = {"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3, "iq1_s": 3, "iq1_m": 3}
"""Distances that count as near."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Points and, for every tuple of levels, where to look.

    Attributes:
        values: decoded value of each level, float32.
        points: ``points width`` uint8, level of each coordinate.
        place: index of the point a tuple is, or -1; a tuple's key is ``sum(level · levels ** coordinate)``.
        first: ``tuples + 1``; points near tuple ``k`` are ``first[k] … first[k + 1]`` of the next two.
        near: indices of points, nearest first.
        cells: rows of the search's table of errors that add up to that of each such point, ``· 4`` for points
            of four coordinates, ``· 6`` for those of eight.
    """

    values: NDArray[np.float32]
    points: NDArray[np.uint8]
    place: NDArray[np.int32]
    first: NDArray[np.uint32]
    near: NDArray[np.uint16]
    cells: NDArray[np.uint16]

    @property
    def width(self) -> int:
        """Coordinates of a point."""
        return int(self.points.shape[1])

    @property
    def levels(self) -> int:
        """Levels of a coordinate."""
        return len(self.values)


@cache
def codebook(type: str) -> Codebook:
    """The codebook of ``iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq3_xxs iq3_s``."""
    owner = {"iq1_m": "iq1_s"}.get(type, type)
    if owner != type:
        return codebook(owner)
    table = {name.lower(): value for name, value in vars(quants).items() if name.startswith("IQ")}[type]
    table.init_grid()
    decoded = np.asarray(table.grid, np.float32).reshape(table.grid_shape)
    values = np.unique(decoded)
    points = np.searchsorted(values, decoded).astype(np.uint8)
    if type.startswith("iq2"):
        values = values / np.float32(8)
    if type == "iq3_xxs":
        values = values / np.float32(4)
    return Codebook(values, points, *_neighbours(points, len(values), _SHELLS[type]))


def _neighbours(
    points: NDArray[np.uint8], levels: int, shells: int
) -> tuple[NDArray[np.int32], NDArray[np.uint32], NDArray[np.uint16], NDArray[np.uint16]]:
    width = points.shape[1]
    tuples = np.stack(np.unravel_index(np.arange(levels**width), (levels,) * width, order="F"), 1)
    ours = points.astype(np.int32)
    place = np.full(len(tuples), -1, np.int32)
    place[(ours * levels ** np.arange(width)).sum(1)] = np.arange(len(points))
    first, near = np.zeros(len(tuples) + 1, np.uint32), []
    # Coordinates are odd numbers there, 2 · level + 1: distances are four times these, the order is the same.
    norms = (ours**2).sum(1)
    for key in np.flatnonzero(place < 0):
        distance = norms - 2 * (ours @ tuples[key])
        reach = np.unique(distance)[:shells][-1]
        close = np.flatnonzero(distance <= reach)
        near.append(close[np.argsort(distance[close], kind="stable")])
        first[key + 1] = len(close)
    found = np.concatenate(near).astype(np.uint16)
    digits = points[found].astype(np.uint16)
    cells = digits + np.arange(width, dtype=np.uint16) * np.uint16(levels)
    if width == 8:
        start = digits[:, :3] @ np.array([9, 3, 1], np.uint16)
        cells = np.concatenate([start[:, None], 27 + digits[:, 3:] + np.arange(0, 15, 3, dtype=np.uint16)], 1)
    return place, first.cumsum(dtype=np.uint32), found, cells
