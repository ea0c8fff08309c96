"""llama.cpp's evenly spaced blocks: legacy types, K-quants (Kawrakow, llama.cpp PR #1684), ternary types.

``round`` is llama.cpp's own search, to the byte, with and without an importance vector ("imatrix");
``encode`` is nearest rounding against given parameters, what a solver with its own idea of codes needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from bitmill.core.axes import Affine, AffineGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics import ggml_scales as scales_of
from bitmill.numerics import ggml_search as search
from bitmill.numerics.blocks import TYPES
from bitmill.numerics.ggml_grid import BlockGrid
from bitmill.numerics.ggml_rows import (
    HALF_MAX,
    Found,
    blocks_of,
    check,
    half,
    in_shares,
    stored,
)

_NAMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0")
_HALF = {"q4_0": 8, "q5_0": 16, "q8_0": 0, "q3_k": 4, "q6_k": 32, "tq1_0": 1, "tq2_0": 1}
_LARGEST = (
    HALF_MAX * 128 * 32
)  # the widest block, q6_k's; squares of what is beyond would overflow the search
_TOP = {
    "q4_0": 15,
    "q4_1": 15,
    "q5_0": 31,
    "q5_1": 31,
    "q2_k": 3,
    "q3_k": 7,
    "q4_k": 15,
    "q5_k": 31,
    "q6_k": 63,
    "tq1_0": 2,
    "tq2_0": 2,
}
_RUN = {"q2_k": 16, "q3_k": 16, "q4_k": 32, "q5_k": 32, "q6_k": 16}  # weights of a sub-block
_TERNARY = ("tq1_0", "tq2_0")
_SIGNED = {"q3_k": (-32, 31), "q6_k": (-128, 127)}  # ranges of their scales
_RANGED = ("q4_1", "q5_1")
_RANGED_K = ("q2_k", "q4_k", "q5_k")  # scales and mins; the other two are symmetric


@final
@dataclass(frozen=True)
class KQuant(BlockGrid, AffineGrid):
    """One of llama.cpp's block types.

    Codes are ``out in``, unsigned as stored (int8 for ``q8_0``). Parameters are float32 that hold
    half-precision values, and integers a sub-block:

    * ``q4_0 q5_0 q8_0``: ``d`` (``out in/32``); value = d · (code - half), half = 8, 16, 0.
    * ``q4_1 q5_1``: ``d m`` (``out in/32``); value = d · code + m.
    * ``q2_k q4_k q5_k``: ``d dmin`` (``out in/256``), ``scales mins`` uint8 (``out in/16`` for ``q2_k``,
      else ``out in/32``); value = d · scale · code - dmin · min.
    * ``tq1_0 tq2_0``: ``d`` (``out in/256``); value = d · (code - 1).
    * ``q3_k q6_k``: ``d`` (``out in/256``), ``scales`` int8 (``out in/16``); value =
      d · scale · (code - half), half = 4, 32.

    Attributes:
        type: llama.cpp's name, lower-case.
    """

    type: str = "q4_k"

    types: ClassVar[tuple[str, ...]] = _NAMES
    small: ClassVar[str] = "q4_0, q5_0 and q8_0"

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        return self.round(w, importance).params

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        """Nearest codes. -128 is never used in ``q8_0``: some kernels take absolute values in 8 bits. Where a
        scale is 0 every code has the same value and the one for 0 is written."""
        step, base = _affine(self.type, params, at, w.shape[1])
        shifted = w if base is None else w - base
        steps = torch.where(step == 0, 0.0, shifted / step).round_()
        if self.type == "q8_0":
            return steps.clamp_(-127, 127).to(torch.int8)
        return steps.add_(_HALF.get(self.type, 0)).clamp_(0, _TOP[self.type]).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        step, base = _affine(self.type, params, at, codes.shape[1])
        value = step * (codes.to(torch.float32) - _HALF.get(self.type, 0))
        return value if base is None else value + base

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        """llama.cpp's search, whose bytes it reproduces.

        Raises:
            Refused: rows are not whole blocks.
            Unsolvable: a weight is not finite, or so large that a scale does not fit half precision.
        """
        check(self, w, importance, _LARGEST)
        out, columns = w.shape
        x = blocks_of(w, self.block[1])
        told = None if importance is None else blocks_of(importance, self.block[1])
        codes, params = in_shares(partial(_SEARCHES[self.type], self.type), out, x, told)
        shaped = {name: torch.from_numpy(p.reshape(out, -1)).to(w.device) for name, p in params.items()}
        on_grid = torch.from_numpy(codes.reshape(out, columns)).to(w.device)
        return Quantized(self, on_grid, shaped, (out, columns))

    def scales(self) -> tuple[str, ...]:
        if self.type in _RANGED_K:
            return ("scales", "mins", "d", "dmin")
        if self.type in _RANGED:
            return ("d", "m")
        return ("scales", "d") if self.type in _SIGNED else ("d",)

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        if name in ("d", "m", "dmin"):
            return half(values)
        low, high = _SIGNED.get(self.type, (0, 15 if self.type == "q2_k" else 63))
        return values.round().clamp(low, high)

    def step(self, params: Params, at: int, columns: int) -> Tensor:
        step, _ = _affine(self.type, params, at, columns)
        return step.abs().expand(-1, columns)

    def affine(self, params: Params, columns: Tensor) -> Affine:
        def of(name: str, length: int) -> Tensor:
            return params[name][:, columns // length]

        run = _RUN.get(self.type)
        step = of("d", self.block[1])
        if run is not None:
            step = step * of("scales", run)
        base = step.new_zeros(1, 1)
        if run is not None and self.type in _RANGED_K:
            base = -(of("dmin", 256) * of("mins", run))
        elif self.type in _RANGED:
            base = of("m", 32)
        half = 127 if self.type == "q8_0" else _HALF.get(self.type, 0)
        high = 127 if self.type == "q8_0" else _TOP[self.type] - half
        return Affine(step, step.new_zeros(1, 1), base, -half, high)

    def with_zero(self, params: Params, zero: Tensor) -> Params | None:
        """The minimum of ``q4_1`` and ``q5_1`` is free; those of K-quants are multiples of another's."""
        return {**params, "m": half(-params["d"] * zero)} if self.type in _RANGED else None

    def scaled(self, params: Params, factor: Tensor) -> Params:
        return {name: half(p * factor) if name in ("d", "m", "dmin") else p for name, p in params.items()}


def _affine(type: str, params: Params, at: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Step and offset of ``columns`` columns from ``at``: ``out columns``, or ``out 1`` inside one block."""
    run = _RUN.get(type, TYPES[type].length)
    first, last = at // run, (at + columns - 1) // run + 1
    step, base = params["d"], params.get("m", params.get("dmin"))
    if "scales" in params:
        step = _served(step, 256 // run, first, last - first) * params["scales"][:, first:last]
        base = (
            None
            if base is None
            else -_served(base, 256 // run, first, last - first) * params["mins"][:, first:last]
        )
        at -= first * run
    return _served(step, run, at, columns), None if base is None else _served(base, run, at, columns)


def _served(values: Tensor, length: int, at: int, columns: int) -> Tensor:
    """Values of columns ``at … at + columns`` when each serves ``length`` of them; one alone broadcasts."""
    first, last = at // length, (at + columns - 1) // length + 1
    part = values[:, first:last]
    if last - first == 1:
        return part
    each = part.unsqueeze(2).expand(-1, -1, length).flatten(1)
    return each[:, at - first * length :][:, :columns]


_Weights = tuple[int, np.ndarray, np.ndarray, int]


def _symmetric(x: np.ndarray, weights: _Weights, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and weight sums of the symmetric search over runs of ``x``."""
    codes = np.empty(x.shape, np.uint8)
    scale, share = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    search.symmetric_runs(0, -(-len(x) // search.LANES), x, *weights, half, codes, scale, share)
    return codes, scale, share


def _ranged(
    x: np.ndarray, weights: _Weights, top: int, ladder: tuple[float, float, int], absolute: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales, minima and weight sums of the affine search over runs of ``x``."""
    codes = np.empty(x.shape, np.uint8)
    scale, low, share = (np.empty(len(x), np.float32) for _ in range(3))
    rungs = (np.float32(ladder[0]), np.float32(ladder[1]), ladder[2])
    groups = -(-len(x) // search.LANES)
    search.affine_runs(0, groups, x, *weights, top, *rungs, absolute, codes, scale, low, share)
    return codes, scale, low, share


def _shaped(x: np.ndarray, importance: np.ndarray, run: int, factor: float) -> _Weights:
    """importance · sqrt(power + x²) for runs of ``run``, power being ``factor`` times a row's mean square."""
    power = np.empty(len(x), np.float32)
    search.mean_square(0, len(x), x, np.float32(factor), power)
    return search.SHAPED, importance.reshape(-1, run), power, x.shape[1] // run


def _unasked(kind: int) -> _Weights:
    """Weights that come from the values alone."""
    return kind, np.zeros((1, 1), np.float32), np.zeros(1, np.float32), 1


def _search_legacy(type: str, out: int, x: np.ndarray, importance: np.ndarray | None) -> Found:
    codes = np.empty(x.shape, np.int8 if type == "q8_0" else np.uint8)
    d, m = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    if type == "q8_0":
        scales_of.plain_absmax(0, len(x), x, codes, d)
    elif importance is not None:
        weights = _shaped(x.reshape(out, -1), importance, 32, 1)
        if type in _HALF:
            codes, d, _ = _symmetric(x, weights, _HALF[type])
        else:
            codes, d, m, _ = _ranged(x, weights, _TOP[type], _FINE)
    elif type in _HALF:
        scales_of.plain_symmetric(0, len(x), x, _HALF[type], codes, d)
    else:
        scales_of.plain_affine(0, len(x), x, _TOP[type], codes, d, m)
    return codes, {"d": stored(d)} if type in _HALF else {"d": stored(d), "m": stored(m)}


def _search_ranged_k(type: str, out: int, x: np.ndarray, importance: np.ndarray | None) -> Found:
    count, run, top, told = len(x), _RUN[type], _TOP[type], importance is not None
    runs = x.reshape(-1, run)
    if importance is not None:
        weights = _shaped(x, importance, run, 1 if type == "q2_k" else 2)
        codes, scale, low, share = _ranged(runs, weights, top, _FINE)
    else:
        weights = _unasked(search.SIZE if type == "q2_k" else search.LOUDNESS)
        codes, scale, low, share = _ranged(runs, weights, top, _COARSE[type], absolute=type == "q2_k")
    d, dmin = np.empty(count, np.float32), np.empty(count, np.float32)
    scales, mins = np.empty((count, 256 // run), np.uint8), np.empty((count, 256 // run), np.uint8)
    scale, low, share = (values.reshape(count, -1) for values in (scale, low, share))
    most = 15 if type == "q2_k" else 63
    scales_of.scales_and_mins(0, count, scale, low, share, most, told, d, dmin, scales, mins)
    d, dmin, codes = stored(d), stored(dmin), codes.reshape(count, 256)
    scales_of.settle_ranged(0, count, x, d, dmin, scales, mins, top, codes)
    return codes, {"d": d, "dmin": dmin, "scales": scales, "mins": mins}


def _search_q3_k(type: str, out: int, x: np.ndarray, importance: np.ndarray | None) -> Found:
    count, runs = len(x), x.reshape(-1, 16)
    if importance is not None:
        codes, scale, share = _symmetric(runs, _shaped(x, importance, 16, 2), 4)
        given = (search.GIVEN, share.reshape(count, 16), np.zeros(1, np.float32), 1)
        raised, d, _ = _symmetric(scale.reshape(count, 16), given, 32)
        scales = (raised.astype(np.int16) - 32).astype(np.int8)
    else:
        codes, scale = np.empty(runs.shape, np.uint8), np.empty(len(runs), np.float32)
        search.descent_runs(0, len(runs), runs, 4, codes, scale)
        d, scales = np.empty(count, np.float32), np.empty((count, 16), np.int8)
        scales_of.scales_q3_k(0, count, scale.reshape(count, 16), d, scales)
    d, codes = stored(d), codes.reshape(count, 256)
    scales_of.settle_symmetric(0, count, x, d, scales, 4, codes)
    return codes, {"d": d, "scales": scales}


def _search_q6_k(type: str, out: int, x: np.ndarray, importance: np.ndarray | None) -> Found:
    count, runs = len(x), x.reshape(-1, 16)
    if importance is not None:
        weights = (search.GIVEN, importance.reshape(-1, 16), np.zeros(1, np.float32), 1)
    else:
        weights = _unasked(search.SQUARE)
    codes, scale, _ = _symmetric(runs, weights, 32)
    codes = codes.reshape(count, 256)
    d, scales = np.empty(count, np.float32), np.empty((count, 16), np.int8)
    scales_of.scales_q6_k(0, count, scale.reshape(count, 16), codes, d, scales)
    d = stored(d)
    scales_of.settle_symmetric(0, count, x, d, scales, 32, codes)
    return codes, {"d": d, "scales": scales}


def _search_ternary(type: str, out: int, x: np.ndarray, importance: np.ndarray | None) -> Found:
    codes, d = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32)
    scales_of.plain_ternary(0, len(x), x, codes, d)
    return codes, {"d": stored(d)}


_FINE = (-0.9, 0.05, 36)
_COARSE = {"q2_k": (-0.5, 0.1, 15), "q4_k": (-1.0, 0.1, 20), "q5_k": (-0.5, 0.1, 15)}
"""Ladders of inverse scales, as first, step and count: with importance, and without."""
_SEARCHES = dict.fromkeys(_NAMES, _search_legacy) | dict.fromkeys(_RANGED_K, _search_ranged_k)
_SEARCHES |= {"q3_k": _search_q3_k, "q6_k": _search_q6_k} | dict.fromkeys(_TERNARY, _search_ternary)
