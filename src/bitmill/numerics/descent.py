"""Coordinate descent on a weight's output error, over everything that is stored (after Behdin et al.,
"QuantEase", arXiv 2309.01885, which moves the codes only).

With ``R`` what is still missing and ``H`` the Gram matrix of the inputs, the loss is ``tr(R H Rᵀ)``. Each
code, and each scale in which the stored values are linear, is set to its best value given all the others; the
loss never rises. Columns go by blocks, so that the long products are matrix products.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from bitmill.core.axes import Affine, AffineGrid, Grid, LevelGrid, Levels, VectorGrid
from bitmill.core.types import Params
from bitmill.numerics.points import move_points
from bitmill.numerics.search import by_rows

_Array = NDArray[np.float32]
_TILE = 64  # rows side by side, as in bitmill.numerics.feedback
_BLOCK = 256  # columns of a block: a super-block of llama.cpp's types, and whole groups of most others


def descend(
    w: Tensor, values: Tensor, params: Params, grid: Grid, gram: Tensor, sweeps: int
) -> tuple[Tensor, Params]:
    """Better values for ``w`` and the parameters they are on.

    Args:
        w: ``out in`` float32, what is wanted.
        values: ``out in``, on ``grid`` with ``params``.
        gram: ``in in``, positive definite.
        sweeps: how often everything is visited.

    Returns:
        Values and parameters; ``grid.encode`` finds the codes.
    """
    values, missing = values.clone(), w - values
    for sweep in range(sweeps):
        for first in range(0, w.shape[1], _BLOCK):
            last = min(first + _BLOCK, w.shape[1])
            columns = torch.arange(first, last, device=w.device)
            now, near = values[:, first:last].contiguous(), gram[first:last, first:last].contiguous()
            pull = missing @ gram[:, first:last]
            if sweep:  # first the codes: they were placed with these scales
                params = _rescale(now, pull, params, grid, near, first, w.shape[1])
            _move(now, pull, params, grid, near, columns)
            missing[:, first:last] += values[:, first:last] - now
            values[:, first:last] = now
    return values, params


def _rescale(
    now: Tensor, pull: Tensor, params: Params, grid: Grid, near: Tensor, first: int, whole: int
) -> Params:
    """Each scale of these columns by least squares given all else; ``now`` and ``pull`` follow."""
    codes, columns = grid.encode(now, params, first), now.shape[1]
    for name in grid.scales():
        width = whole // params[name].shape[1]
        if width > columns or params[name].shape[0] != len(now):
            continue  # a scale of whole rows, or of several, belongs to no block of one row's columns
        scales = params[name].to(torch.float32)
        basis = grid.decode(codes, {**params, name: scales + 1}, first) - now
        for a in range(0, columns, width):
            part, column = basis[:, a : a + width], (first + a) // width
            reached = part @ near[a : a + width]
            energy = (reached[:, a : a + width] * part).sum(1)
            slope = (part * pull[:, a : a + width]).sum(1)
            best = scales[:, column] + torch.where(energy > 0, slope / energy, 0.0)
            step = grid.stored_scale(name, best) - scales[:, column]
            step = torch.where(step * (2 * slope - step * energy) > 0, step, 0.0)
            scales[:, column] += step
            pull -= step[:, None] * reached
            now[:, a : a + width] += step[:, None] * part
        params = {**params, name: scales.to(params[name].dtype)}
    now.copy_(grid.decode(codes, params, first))  # to the bit what a reader will see
    return params


def _move(now: Tensor, pull: Tensor, params: Params, grid: Grid, near: Tensor, columns: Tensor) -> None:
    """Each code at its best value given all else; ``now`` and ``pull`` follow."""
    if now.is_cuda:  # the compiled loops are the CPU's
        _move_spans(now, pull, params, grid, near, int(columns[0]))
    elif isinstance(grid, AffineGrid):
        _move_known(now, pull, near, grid.affine(params, columns))
    elif isinstance(grid, LevelGrid):
        _move_known(now, pull, near, grid.levels_of(params, columns, len(now)))
    elif isinstance(grid, VectorGrid):
        move_points(now, pull, near, grid.points_of(params, int(columns[0]), len(columns)))
    else:
        _move_spans(now, pull, params, grid, near, int(columns[0]))


def _move_spans(now: Tensor, pull: Tensor, params: Params, grid: Grid, near: Tensor, first: int) -> None:
    """Vectors go to the point nearest to the best free value, where that is no loss."""
    width = grid.span[1]
    for a in range(0, now.shape[1], width):
        b = a + width
        mine = near[a:b, a:b]
        wish = pull[:, a:b] @ torch.linalg.inv(mine)
        found = grid.decode(grid.encode(now[:, a:b] + wish, params, first + a), params, first + a)
        step = found - now[:, a:b]
        gain = (step * (2 * pull[:, a:b] - step @ mine)).sum(1)
        step = torch.where((gain > 0)[:, None], step, 0.0)
        now[:, a:b] += step
        pull -= step @ near[a:b]


def _move_known(now: Tensor, pull: Tensor, near: Tensor, values: Affine | Levels) -> None:
    ahead, wish, gram = now.numpy(), pull.numpy(), near.numpy()
    if isinstance(values, Affine):
        step, zero, base = (
            p.expand(now.shape).contiguous().numpy() for p in (values.step, values.zero, values.base)
        )
        low, high = np.float32(values.low), np.float32(values.high)

        def work(first: int, last: int) -> None:
            _move_evenly(first, last, ahead, wish, gram, step, zero, base, low, high)
    else:
        scale, levels = values.scale.expand(now.shape).contiguous().numpy(), values.levels.numpy()
        middles = ((values.levels[1:] + values.levels[:-1]) / 2).numpy()

        def work(first: int, last: int) -> None:
            _move_to_levels(first, last, ahead, wish, gram, scale, levels, middles)

    by_rows(now.shape[0], work)


@njit(cache=True, nogil=True, error_model="numpy")
def _move_evenly(
    first: int,
    last: int,
    now: _Array,
    pull: _Array,
    gram: _Array,
    steps: _Array,
    zeros: _Array,
    bases: _Array,
    low: np.float32,
    high: np.float32,
) -> None:
    columns = now.shape[1]
    value, wish = np.zeros((columns, _TILE), np.float32), np.zeros((columns, _TILE), np.float32)
    step, zero = np.zeros((columns, _TILE), np.float32), np.zeros((columns, _TILE), np.float32)
    base, change = np.zeros((columns, _TILE), np.float32), np.zeros(_TILE, np.float32)
    for start in range(first, last, _TILE):
        rows = min(_TILE, last - start)
        for r in range(rows):
            for j in range(columns):
                value[j, r], wish[j, r], base[j, r] = (
                    now[start + r, j],
                    pull[start + r, j],
                    bases[start + r, j],
                )
                step[j, r], zero[j, r] = steps[start + r, j], zeros[start + r, j]
        for j in range(columns):
            weight, moved = gram[j, j], False
            for r in range(_TILE):
                wanted = value[j, r] + wish[j, r] / weight
                k = np.rint((wanted - base[j, r]) / step[j, r] + zero[j, r])
                k = low if k < low else k
                k = high if k > high else k
                found = (k - zero[j, r]) * step[j, r] + base[j, r] if step[j, r] != 0 else value[j, r]
                change[r] = found - value[j, r]
                value[j, r] = found
            for r in range(rows):
                moved = moved or change[r] != 0
            if moved:
                for i in range(columns):
                    coupling = gram[j, i]
                    for r in range(_TILE):
                        wish[i, r] -= change[r] * coupling
        for r in range(rows):
            for j in range(columns):
                now[start + r, j], pull[start + r, j] = value[j, r], wish[j, r]


@njit(cache=True, nogil=True, error_model="numpy")
def _move_to_levels(
    first: int,
    last: int,
    now: _Array,
    pull: _Array,
    gram: _Array,
    scales: _Array,
    levels: _Array,
    middles: _Array,
) -> None:
    for r in range(first, last):
        for j in range(now.shape[1]):
            scale = scales[r, j]
            if scale == 0:
                continue
            wanted = (now[r, j] + pull[r, j] / gram[j, j]) / scale
            found = levels[np.searchsorted(middles, wanted)] * scale
            change = found - now[r, j]
            if change != 0:
                now[r, j] = found
                for i in range(now.shape[1]):
                    pull[r, i] -= change * gram[j, i]
