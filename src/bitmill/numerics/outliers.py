"""Weights that are stored apart: which of them are worth it, rounding around them, and their sparse layout
(Dettmers et al., "SpQR", arXiv 2306.03078)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from bitmill.numerics.search import by_rows

_Array = NDArray[np.float32]


def sensitivity(w: Tensor, u: Tensor, width: int, bits: int) -> Tensor:
    """By how much the error of a group falls when one of its weights is left out of it.

    The group's range is that of the extremes, real zero points. Leaving out a weight saves its own error;
    only where it is the single extreme of the group does the range of all the others change with it.

    Args:
        w: ``out in`` float32, groups of ``width`` columns.
        u: ``out in`` or ``1 in``, the weight of each squared error.
        bits: of a code.

    Returns:
        ``out in`` float32.
    """
    blocks = w.reshape(len(w), -1, width)
    counts = u.expand_as(w).reshape(blocks.shape)
    ranked = blocks.sort(-1)
    places, values = ranked.indices, ranked.values
    low, high, top = values[..., 0], values[..., -1], 2**bits - 1
    own = counts * _missed(blocks, low, high, top)
    whole = own.sum(-1, keepdim=True)
    saved = own.clone()
    for end, a, b in ((places[..., :1], values[..., 1], high), (places[..., -1:], low, values[..., -2])):
        without = counts * _missed(blocks, a, b, top)
        rest = without.sum(-1, keepdim=True) - without.gather(-1, end)
        saved.scatter_(-1, end, whole - rest)
    return saved.reshape(w.shape)


def _missed(blocks: Tensor, low: Tensor, high: Tensor, top: int) -> Tensor:
    """Squared errors on ``0 … top`` evenly from ``low`` to ``high``; a range that is a point is ±1."""
    point = low == high
    low, high = torch.where(point, -1.0, low)[..., None], torch.where(point, 1.0, high)[..., None]
    step = (high - low) / top
    zero = -low / step
    return (((blocks / step + zero).round_().clamp_(0, top) - zero) * step - blocks).square_()


def largest(scores: Tensor, count: int) -> Tensor:
    """The places of the ``count`` largest of ``scores``, as a mask; earlier ones where they are equal."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if count:
        flat = scores.reshape(-1)
        bound = flat.topk(count).values[-1]
        mask = flat > bound
        ties = (flat == bound).nonzero().reshape(-1)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)


def round_apart(
    x: Tensor, upper: Tensor, levels: Tensor, apart: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Put one group of columns on its values with error feedback, but for the weights that are apart: those
    are stored to half precision, and what they miss is next to nothing.

    Args:
        x: ``out columns`` float32; holds the values afterwards.
        upper: ``columns columns``, this group of the factor of the inverse Hessian.
        levels: ``out codes`` float32, values of the codes of this group.
        apart: ``out columns`` bool.
        threshold: a weight whose squared error over its pivot squared is larger is apart as well.

    Returns:
        Errors over pivots; squared errors over pivots squared, had no weight been apart; and what is added
        to the values of codes. Each ``out columns``.
    """
    left, scores, added = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(x)
    factor, values = upper.contiguous().numpy(), levels.contiguous().numpy()
    parts = x.numpy(), left.numpy(), scores.numpy(), added.numpy()
    mask = apart.contiguous().numpy()

    def work(first: int, last: int) -> None:
        _round_rows(first, last, factor, values, mask, np.float32(threshold), *parts)

    by_rows(len(x), work)
    return left, scores, added


@njit(cache=True, nogil=True, error_model="numpy")
def _half(x: Any) -> Any:
    """To the nearest number of half precision, finite; numba has no such type."""
    size = abs(np.float64(x))
    if size >= 65504.0:
        return np.float32(np.copysign(65504.0, np.float64(x)))
    quantum = 2.0**-24
    if size >= 2.0**-14:
        exponent = np.floor(np.log2(size))
        if 2.0**exponent > size:
            exponent -= 1.0
        quantum = 2.0 ** (exponent - 10.0)
    return np.float32(np.copysign(np.rint(size / quantum) * quantum, np.float64(x)))


@njit(cache=True, nogil=True, error_model="numpy")
def _round_rows(
    first: int,
    last: int,
    factor: _Array,
    levels: _Array,
    apart: NDArray[np.bool_],
    threshold: np.float32,
    ahead: _Array,
    left: _Array,
    scores: _Array,
    added: _Array,
) -> None:
    columns, codes = ahead.shape[1], levels.shape[1]
    for r in range(first, last):
        for j in range(columns):
            wanted, value = ahead[r, j], levels[r, 0]
            for k in range(1, codes):
                if abs(levels[r, k] - wanted) < abs(value - wanted):
                    value = levels[r, k]
            error = (wanted - value) / factor[j, j]
            scores[r, j] = error * error
            if apart[r, j] or error * error > threshold:
                added[r, j] = _half(wanted - value)
                value += added[r, j]
                error = (wanted - value) / factor[j, j]
            ahead[r, j] = value
            left[r, j] = error
            for i in range(j + 1, columns):
                ahead[r, i] -= error * factor[j, i]


def sparse(added: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix that is nearly all zeros as rows of entries: offsets ``out + 1`` int32, columns ``count``
    int32, values ``count`` float32. Where fewer than ``count`` are not zero, the last row ends in entries of
    value 0 at column 0.

    Raises:
        ValueError: more than ``count`` are not zero.
    """
    rows, columns = added.nonzero(as_tuple=True)
    spare = count - len(rows)
    if spare < 0:
        raise ValueError(f"{len(rows)} weights are apart, of {count} that there is room for")
    offsets = torch.zeros(len(added) + 1, dtype=torch.int32)
    offsets[1:] = torch.bincount(rows, minlength=len(added)).cumsum(0).to(torch.int32)
    offsets[-1] = count
    places = torch.cat((columns.to(torch.int32), torch.zeros(spare, dtype=torch.int32)))
    return offsets, places, torch.cat((added[rows, columns], torch.zeros(spare)))


def rows_of(offsets: Tensor) -> Tensor:
    """The row of each entry, int64.

    Raises:
        ValueError: the offsets do not rise from 0.
    """
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        raise ValueError("offsets of rows do not rise from 0")
    return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff().to(torch.int64))


def filled(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of entries: inverse of :func:`sparse`.

    Raises:
        ValueError: a place that is none of the matrix', or that has two entries which are not zero.
    """
    if len(columns) and (int(columns.min()) < 0 or int(columns.max()) >= shape[1]):
        raise ValueError(f"an entry is in none of the {shape[1]} columns")
    real = values != 0
    at = rows[real] * shape[1] + columns[real].to(torch.int64)
    if len(at.unique()) != len(at):
        raise ValueError("two entries are in the same place")
    matrix = torch.zeros(shape[0] * shape[1])
    matrix[at] = values[real].to(torch.float32)
    return matrix.reshape(shape)
