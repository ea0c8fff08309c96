"""llama.cpp's I-quants: eight weights are a point of a codebook times a scale (Kawrakow, llama.cpp PRs #4773,
#5453, #6302). One to three bits a weight; the codebooks are samples of the E8 and D4 lattices.

``round`` is llama.cpp's own search, to the byte (``iq1_m``: to its error), with an importance vector and
without. ``encode`` finds the nearest of all points for given parameters, what a solver with its own idea of
values needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from bitmill.core.axes import Points, VectorGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics import ggml_thirds as thirds
from bitmill.numerics import ggml_vectors as vectors
from bitmill.numerics.ggml_codebooks import codebook
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
from bitmill.numerics.iquant_layout import parity
from bitmill.numerics.points import nearest


class _Kind(NamedTuple):
    """One type: weights that share a scale, the search's settings, what ``d`` is multiplied by."""

    run: int
    power: int
    quiet: float
    fudge: float
    rungs: int = 0
    rung: float = 0.0
    again: int = vectors.OFF
    untold: int | None = None
    signs: str = "free"
    fitted: bool = False


_KINDS = {
    "iq1_s": _Kind(32, 2, 1e-12, 1.125, signs="none"),
    "iq1_m": _Kind(16, 2, 1e-7, 1.1125, untold=vectors.SQUARED, signs="none"),
    "iq2_xxs": _Kind(32, 1, 1e-15, 1.0, 6, 0.1, vectors.ALWAYS, None, "even", fitted=True),
    "iq2_xs": _Kind(16, 1, 1e-15, 1.0, 9, 0.1, signs="even"),
    "iq2_s": _Kind(16, 2, 1e-8, 0.9875, 9, 0.1, untold=vectors.SQUARED_AND_POWER),
    "iq3_xxs": _Kind(32, 2, 1e-8, 1.0125, 15, 0.2, untold=vectors.SQUARED, signs="even"),
    "iq3_s": _Kind(32, 2, 1e-45, 1.033, 9, 0.2, vectors.ALL_IF_OFF, vectors.SQUARED),
}
_LARGEST = HALF_MAX * 15 * 5
_INDEX_BITS = {8: 10, 4: 18}  # where the signs begin, by the width of a point


@final
@dataclass(frozen=True)
class IQuant(BlockGrid, VectorGrid):
    """One of llama.cpp's codebook types.

    Codes are int32 ``out in/8``: for ``iq2_*`` the index of a point and from bit 10 eight signs; for
    ``iq3_*`` two indices of nine bits and from bit 18 eight signs; for ``iq1_s`` an index, and for ``iq1_m``
    from bit 11 whether its values are shifted down. Parameters: ``d`` float32 that holds half-precision
    values (``out in/256``), ``scales`` uint8 (``out in/16``, or ``in/32`` for ``iq1_s iq2_xxs iq3_*``), and
    ``down`` uint8 (``out in/32``) for ``iq1_s``.

    A value is ``d · (2 scale + 1) · level``, times 1/8 for ``iq2_*`` and 1/4 for ``iq3_xxs`` whose levels are
    whole numbers in the file; ``level`` is signed, or for ``iq1_*`` shifted by an eighth.

    Attributes:
        type: llama.cpp's name, lower-case.
    """

    type: str = "iq2_xs"

    types: ClassVar[tuple[str, ...]] = tuple(_KINDS)
    small: ClassVar[str] = "iq4_nl and q4_0"

    @property
    def span(self) -> tuple[int, int]:
        return (1, 8)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        return self.round(w, importance).params

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        """``at`` and the width of ``w`` are multiples of 8. Where a scale is 0 the code is 0."""
        points = self.points_of(params, at, w.shape[1])
        first, second, minus, down = nearest(w, w.new_ones(w.shape[1]), points)
        codes = first | down << 11
        if self._kind.signs != "none":
            codes = first | second << 9 | minus << _INDEX_BITS[codebook(self.type).width]
        return codes.to(torch.int32).to(w.device)

    def points_of(self, params: Params, at: int, columns: int) -> Points:
        halves, points = _halves(self.type)
        step = self._steps(params, at, columns // 8)
        shift = torch.zeros_like(step)
        if self._kind.signs == "none":
            shift += thirds.SHIFT
        if self.type == "iq1_s":
            shift -= 2 * thirds.SHIFT * params["down"][:, _serving(at, columns // 8, 32)]
        levels = torch.from_numpy(codebook(self.type).values)
        return Points(step, shift, self.type == "iq1_m", levels, halves, points, self._kind.signs)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        groups = codes.shape[1]
        step = self._steps(params, at, groups)[..., None]
        book = codebook(self.type)
        levels = torch.from_numpy(book.values)[torch.from_numpy(book.points).long()].to(codes.device)
        if self._kind.signs == "none":
            down = codes >> 11 if self.type == "iq1_m" else params["down"][:, _serving(at, groups, 32)]
            shift = thirds.SHIFT - 2 * thirds.SHIFT * down.to(torch.float32)
            return (step * (levels[(codes & 2047).long()] + shift[..., None])).flatten(1)
        if book.width == 8:
            value = levels[(codes & 1023).long()]
        else:
            value = torch.cat((levels[(codes & 511).long()], levels[(codes >> 9 & 511).long()]), -1)
        signs = codes[..., None] >> (_INDEX_BITS[book.width] + torch.arange(8, device=codes.device)) & 1
        return (step * value * (1 - 2 * signs)).flatten(1)

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        """llama.cpp's search. For types that have none without importance, all inputs count alike.

        Raises:
            Refused: rows are not whole blocks.
            Unsolvable: a weight is not finite, or so large that a scale does not fit half precision.
        """
        check(self, w, importance, _LARGEST)
        x = blocks_of(w, 256)
        told = None if importance is None else blocks_of(importance, 256)
        if told is None and self._kind.untold is None:
            told = np.ones((1, 256), np.float32)
        codes, params = (self._thirds if self._kind.signs == "none" else self._vectors)(x, told)
        out = w.shape[0]
        shaped = {name: torch.from_numpy(p.reshape(out, -1)).to(w.device) for name, p in params.items()}
        on_grid = torch.from_numpy(codes.astype(np.int32).reshape(out, -1)).to(w.device)
        return Quantized(self, on_grid, shaped, (w.shape[0], w.shape[1]))

    def scales(self) -> tuple[str, ...]:
        return ("scales", "d")

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        top = 7 if self._kind.signs == "none" else 15
        return half(values) if name == "d" else values.round().clamp(0, top)

    @property
    def _kind(self) -> _Kind:
        return _KINDS[self.type]

    def _steps(self, params: Params, at: int, groups: int) -> Tensor:
        """Scale of each eight columns from column ``at``: ``out groups``."""
        d, scale = params["d"][:, _serving(at, groups, 256)], params["scales"].to(torch.float32)
        scale = scale[:, _serving(at, groups, self._kind.run)]
        return d * (2 * scale + 1)

    def _vectors(self, x: np.ndarray, told: np.ndarray | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        kind, book = self._kind, codebook(self.type)
        runs = x.reshape(-1, kind.run)
        power = mean_squares(x, kind.power)
        weights = np.zeros((1, kind.run), np.float32) if told is None else told.reshape(-1, kind.run)
        index = np.empty((len(runs), kind.run // book.width), np.int32)
        signs = np.empty((len(runs), kind.run // 8), np.int32)
        scale = np.empty(len(runs), np.float32)
        in_threads(
            vectors.point_runs, -(-len(runs) // vectors.LANES), runs,
            kind.untold if told is None else vectors.TOLD, weights, power, 256 // kind.run,
            kind.signs == "even", kind.rungs, np.float32(kind.rung), kind.fitted, kind.again,
            np.float32(kind.quiet), book.around, index, signs, scale,
        )  # fmt: skip
        d, scales = np.empty(len(x), np.float32), np.empty((len(x), 256 // kind.run), np.uint8)
        index, signs = index.reshape(len(x), -1), signs.reshape(len(x), -1)
        wipe = kind.signs == "even"
        in_threads(
            vectors.point_scales, len(x), scale.reshape(len(x), -1), 15, np.float32(kind.fudge), wipe, d,
            scales, index, signs,
        )  # fmt: skip
        if wipe:
            signs = parity(signs)
        if book.width == 4:
            index = index[:, 0::2] | index[:, 1::2] << 9
        return index | signs << _INDEX_BITS[book.width], {"d": stored(d), "scales": scales}

    def _thirds(self, x: np.ndarray, told: np.ndarray | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        kind, book = self._kind, codebook(self.type)
        runs = x.reshape(-1, kind.run)
        power = mean_squares(x, kind.power)
        weights = np.zeros((1, 256), np.float32) if told is None else told
        index, down = (np.empty((len(runs), kind.run // 8), np.int32) for _ in range(2))
        scale = np.empty(len(runs), np.float32)
        in_threads(
            thirds.cut_runs, len(runs), runs, told is not None,
            weights.reshape(-1, kind.run), power, 256 // kind.run, np.float32(kind.quiet), book.around,
            book.points, index, down, scale,
        )  # fmt: skip
        d, scales = np.empty(len(x), np.float32), np.empty((len(x), 256 // kind.run), np.uint8)
        index, down = index.reshape(len(x), 32), down.reshape(len(x), 32)
        fudge = np.float32(kind.fudge)
        in_threads(
            vectors.point_scales, len(x), scale.reshape(len(x), -1), 7, fudge, False, d, scales, index, down
        )
        if self.type == "iq1_s":
            return index, {"d": stored(d), "scales": scales, "down": down[:, ::4].astype(np.uint8)}
        in_threads(
            thirds.refit_super_scale, len(x), x, told is not None, weights, power, book.points, index, down,
            scales, fudge, d,
        )  # fmt: skip
        return index | down << 11, {"d": stored(d), "scales": scales}


def _serving(at: int, groups: int, length: int) -> Tensor:
    """Which parameter serves each eight columns from column ``at`` when one serves ``length`` of them."""
    return (at + 8 * torch.arange(groups)) // length


@cache
def _halves(type: str) -> tuple[Tensor, Tensor]:
    """Levels of the tuples of four coordinates that occur, and each point as one or two of them."""
    book = codebook(type)
    if book.width == 4:
        return torch.from_numpy(book.points), torch.arange(len(book.points))[:, None]
    tuples = np.stack(np.unravel_index(np.arange(book.levels**4), (book.levels,) * 4), 1).astype(np.uint8)
    quads = book.points.reshape(len(book.points), 2, 4).astype(np.int64)
    numbers = (quads * book.levels ** np.arange(3, -1, -1)).sum(-1)
    return torch.from_numpy(tuples), torch.from_numpy(numbers)
