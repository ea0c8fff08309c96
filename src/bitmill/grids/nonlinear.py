"""llama.cpp's non-linear four-bit types: sixteen levels, denser around 0 (Kawrakow, PRs #5590 and #5747).

``round`` is llama.cpp's own search, to the byte, with and without an importance vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from bitmill.core.axes import LevelGrid, Levels
from bitmill.core.types import Params, Quantized
from bitmill.numerics import ggml_levels as search
from bitmill.numerics.ggml_grid import BlockGrid
from bitmill.numerics.ggml_rows import (
    HALF_MAX,
    blocks_of,
    check,
    half,
    in_threads,
    mean_squares,
    stored,
)
from bitmill.numerics.search import spread

_NAMES = ("iq4_nl", "iq4_xs")
_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_GAP = 16.0  # the widest that touches the inner half of the range
_LARGEST = HALF_MAX * 32 * 100


@final
@dataclass(frozen=True)
class Nonlinear(BlockGrid, LevelGrid):
    """Values ``level[code] · scale`` in runs of 32; scales may be negative.

    Codes are uint8 ``out in``. Parameters: ``d``, float32 that holds half-precision values, ``out in/32`` for
    ``iq4_nl`` and ``out in/256`` for ``iq4_xs``, which has ``scales`` int8 (``out in/32``) and whose scale is
    d · scale.

    Attributes:
        type: llama.cpp's name, lower-case.
    """

    type: str = "iq4_nl"

    types: ClassVar[tuple[str, ...]] = _NAMES
    small: ClassVar[str] = "iq4_nl and q4_0"

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        return self.round(w, importance).params

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        levels = _levels(w)
        scale = self._scales(params, at, w.shape[1])
        wanted = torch.where(scale == 0, 0.0, w.to(torch.float32) / scale)
        return torch.bucketize(wanted, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        return self._scales(params, at, codes.shape[1]) * _levels(codes)[codes.long()]

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        """llama.cpp's search, whose bytes it reproduces.

        Raises:
            Refused: rows are not whole blocks.
            Unsolvable: a weight is not finite, or so large that a scale does not fit half precision.
        """
        check(self, w, importance, _LARGEST)
        length = self.block[1]
        x, runs = blocks_of(w, length), blocks_of(w, 32)
        told = np.zeros((1, 32), np.float32) if importance is None else blocks_of(importance, 32)
        levels, scale = np.array(_LEVELS, np.float32), np.empty(len(runs), np.float32)
        groups = -(-len(runs) // search.LANES)
        power = mean_squares(x, 2)
        in_threads(
            search.level_runs, groups, runs, importance is not None, told, power, length // 32, levels, scale
        )
        params = {"d": scale}
        if self.type == "iq4_xs":
            params = {"d": np.empty(len(x), np.float32), "scales": np.empty((len(x), 8), np.int8)}
            in_threads(search.level_scales, len(x), scale.reshape(-1, 8), *params.values())
            scale = (params["d"][:, None] * params["scales"]).reshape(-1)
        codes = np.empty(runs.shape, np.uint8)
        in_threads(search.level_codes, len(runs), runs, scale, levels, codes)
        params["d"] = stored(params["d"])
        out, columns = w.shape
        shaped = {name: torch.from_numpy(p.reshape(out, -1)).to(w.device) for name, p in params.items()}
        return Quantized(
            self, torch.from_numpy(codes.reshape(out, columns)).to(w.device), shaped, (out, columns)
        )

    def scales(self) -> tuple[str, ...]:
        return ("scales", "d") if self.type == "iq4_xs" else ("d",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        return half(values) if name == "d" else values.round().clamp(-32, 31)

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        scale = self._scales(params, at, columns).abs()
        return (scale * _GAP).expand(-1, columns)

    def scaled(self, params: Params, factor: Tensor) -> Params:
        return {**params, "d": half(params["d"] * factor)}

    def levels_of(self, params: Params, columns: Tensor, rows: int) -> Levels:
        scale = params["d"][:, columns // self.block[1]]
        if "scales" in params:
            scale = scale * params["scales"][:, columns // 32]
        return Levels(_levels(scale), scale)

    def _scales(self, params: Params, at: int, columns: int) -> Tensor:
        """The scale of every column, or one that broadcasts."""
        if "scales" not in params:
            return spread(params["d"], 32, at, columns)
        first, last = at // 32, (at + columns - 1) // 32 + 1
        d = params["d"][:, torch.arange(first, last, device=params["d"].device) // 8]
        return spread(d * params["scales"][:, first:last], 32, at - 32 * first, columns)


def _levels(like: Tensor) -> Tensor:
    return torch.tensor(_LEVELS, dtype=torch.float32, device=like.device)
