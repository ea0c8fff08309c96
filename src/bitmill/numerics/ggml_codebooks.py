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

from bitmill.numerics.ggml_nearest import BITS, Around
from bitmill.numerics.lanes import LANES

_SHELLS = {"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3, "iq1_s": 3, "iq1_m": 3}
"""Distances that count as near."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Points and, for every tuple of levels, where to look.

    Attributes:
        values: decoded value of each level, float32.
        points: ``points width`` uint8, level of each coordinate.
        around: where to look for each tuple of levels.
    """

    values: NDArray[np.float32]
    points: NDArray[np.uint8]
    around: Around

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
    return Codebook(values, points, _around(points, len(values), _SHELLS[type]))


def _around(points: NDArray[np.uint8], levels: int, shells: int) -> Around:
    width = points.shape[1]
    tuples = np.stack(np.unravel_index(np.arange(levels**width), (levels,) * width, order="F"), 1)
    ours = points.astype(np.int32)
    place = np.full(len(tuples), -1, np.int32)
    place[(ours * levels ** np.arange(width)).sum(1)] = np.arange(len(points))
    many, near = np.zeros(len(tuples), np.int32), []
    # Coordinates are odd numbers there, 2 · level + 1: distances are four times these, the order is the same.
    norms = (ours**2).sum(1)
    for key in np.flatnonzero(place < 0):
        distance = norms - 2 * (ours @ tuples[key])
        reach = np.unique(distance)[:shells][-1]
        close = np.flatnonzero(distance <= reach)
        many[key] = len(close)
        close = close[np.argsort(distance[close], kind="stable")]
        near.append(np.append(close, np.repeat(close[-1:], -len(close) % LANES)))
    found = np.concatenate(near).astype(np.uint16)
    blocks = -(-many // LANES)
    odd = np.ascontiguousarray((2 * points[found] + np.uint8(1)).reshape(-1, LANES, width).swapaxes(1, 2))
    packed = (ours << np.arange(0, BITS * width, BITS, dtype=np.int32)).sum(1, dtype=np.int32)
    return Around(place, many, (blocks.cumsum() - blocks).astype(np.int32), found, odd, packed)
