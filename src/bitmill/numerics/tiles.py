"""Groups of sixteen weights whose scales and zero points are codes of three bits themselves, behind which
stand four numbers a tile of sixteen rows (Dettmers et al., "SpQR", arXiv 2306.03078).

The arithmetic is that of the kernels that run such weights, in half precision and operation by operation:
``scale = step_s · (code - zero_s)``, ``zero = step_z · (code - zero_z)``, ``value = scale · (code - zero)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitmill.numerics.search import REAL_ZERO, real_zero_range, search_affine

SIDE = 16
"""Rows and columns of a tile."""

TOP = 7
"""Largest code of a scale and of a zero point."""

PARTS = ("scale_step", "scale_zero", "zero_step", "zero_zero")
"""Second-order numbers of a tile."""

_FURTHEST = 256.0  # a zero of the second order beyond this leaves half precision no steps between codes
_LEAST = 2.0**-24
_MOST = 2.0**14
_TURNS = 2


def half(x: Tensor) -> Tensor:
    """``x`` rounded to half precision, float32."""
    return x.to(torch.float16).to(torch.float32)


def decoded(code: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """``step · (code - zero)`` in half precision, each operation rounded; float32 throughout."""
    return half(step * half(code - zero))


def first_order(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales and zero points, ``out groups`` float32, that codes and second-order numbers stand for."""
    step_s, zero_s, step_z, zero_z = (params[part].repeat_interleave(SIDE, 0) for part in PARTS)
    scale = decoded(params["scale"].to(torch.float32), step_s, zero_s)
    return scale, decoded(params["zero"].to(torch.float32), step_z, zero_z)


def nearest(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes ``0 … top`` (float32) whose values come nearest to ``x``; ``scale`` and ``zero`` broadcast."""
    guess = torch.where(scale == 0, 0.0, (x / scale + zero).round()).nan_to_num(0.0).clamp(0, top)
    best, least = guess, (decoded(guess, scale, zero) - x).abs_()
    for aside in (-1, 1):  # rounding to half precision may move the middle between two values
        other = (guess + aside).clamp_(0, top)
        miss = (decoded(other, scale, zero) - x).abs_()
        best, least = torch.where(miss < least, other, best), torch.minimum(miss, least)
    return best


def fit_tiles(w: Tensor, u: Tensor, bits: int, search: bool) -> dict[str, Tensor]:
    """Codes of scales and zero points, and the second-order numbers, for weights in tiles.

    Args:
        w: ``out in`` float32, both multiples of sixteen.
        u: ``out in`` float32, the weight of each squared error; 0 leaves a weight out of its group's range.
        search: whether ranges are searched; if not they are those of the extremes.

    Returns:
        ``scale`` and ``zero`` uint8 ``out groups``, and :data:`PARTS` float32 ``out/16 groups``, all as they
        can be stored.
    """
    top = 2**bits - 1
    x, weights = _without(w, u)
    blocks = x.reshape(len(x), -1, SIDE)
    scale, zero = real_zero_range(blocks.amin(-1), blocks.amax(-1), top, "f32")
    if search:
        scale, zero = search_affine(x, weights, scale, zero, bits=bits, kind=REAL_ZERO, floor=0, dtype="f32")
        scale = scale.abs()
    flat = (blocks == 0).all(-1)
    scale = torch.where(flat, 0.0, scale.clamp(max=_MOST))
    weights = weights.reshape(blocks.shape)
    step_s, zero_s = _second_order(scale)
    code_s, ideal = _scales(blocks, weights, scale, zero, step_s, zero_s, top)
    step_z, zero_z = _second_order(torch.where(flat, _typical(ideal, flat), ideal))
    parts = dict(zip(PARTS, (step_s, zero_s, step_z, zero_z), strict=True))
    code_s, code_z = _settled(blocks, weights, code_s, ideal, parts, top)
    return {"scale": code_s.to(torch.uint8), "zero": code_z.to(torch.uint8), **parts}


def _without(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, those that are left out at the mean of the rest of their group, and what each counts."""
    blocks, counts = w.reshape(-1, SIDE), u.expand_as(w).reshape(-1, SIDE)
    kept = (counts > 0).to(w.dtype)
    mean = (blocks * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    most = _MOST * 2
    filled = torch.where(kept > 0, blocks, mean).clamp(-most, most)
    empty = kept.sum(-1, keepdim=True) == 0
    return filled.reshape(w.shape), torch.where(empty, 1.0, counts).reshape(w.shape)


def _typical(zero: Tensor, flat: Tensor) -> Tensor:
    """For groups that are all zeros: a zero point of their tile that stretches nothing."""
    tiles, none = zero.reshape(-1, SIDE, zero.shape[1]), flat.reshape(-1, SIDE, zero.shape[1])
    least = torch.where(none, torch.inf, tiles).amin(1, keepdim=True).nan_to_num(posinf=0.0)
    return least.expand_as(tiles).reshape(zero.shape)


def _second_order(values: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero, ``out/16 groups``, with which eight codes span the ``values`` of each tile."""
    tiles = values.reshape(-1, SIDE, values.shape[1])
    low, high = tiles.amin(1), tiles.amax(1)
    most = torch.maximum(low.abs(), high.abs())
    step = torch.maximum((high - low) / TOP, most / _FURTHEST)
    step = half(torch.where(most < _LEAST / 2, 0.0, step.clamp(min=_LEAST)))
    return step, half(torch.where(step == 0, 0.0, -low / step).nan_to_num(0.0))


def _scales(
    blocks: Tensor, u: Tensor, scale: Tensor, zero: Tensor, step: Tensor, offset: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Of the two codes around each scale the one that costs less, and the zero point that suits it."""
    step, offset = step.repeat_interleave(SIDE, 0), offset.repeat_interleave(SIDE, 0)
    place = torch.where(step == 0, 0.0, scale / step + offset).nan_to_num(0.0)
    best, ideal = torch.zeros_like(scale), torch.zeros_like(zero)
    least = torch.full_like(scale, torch.inf)
    for code in (place.floor().clamp(0, TOP), place.ceil().clamp(0, TOP)):
        tried = decoded(code, step, offset)
        at, cost = _zero_for(blocks, u, tried, scale, zero, top)
        better = cost < least
        best, ideal = torch.where(better, code, best), torch.where(better, at, ideal)
        least = torch.minimum(cost, least)
    return best, ideal


def _zero_for(
    blocks: Tensor, u: Tensor, scale: Tensor, wanted: Tensor, zero: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """A real zero point for groups whose scale became another, and what it costs; the range stays centred
    at first, then zero points and codes take turns."""
    safe = torch.where(scale == 0, 1.0, scale)
    middle = (top / 2 - zero) * wanted
    at = torch.where(scale == 0, zero, top / 2 - middle / safe).clamp(-2.0 * top, 3.0 * top)
    best, least = at, torch.full_like(scale, torch.inf)
    part = blocks / safe[..., None]
    total = u.sum(-1)
    for turn in range(_TURNS + 1):
        codes = (part + at[..., None]).round().clamp_(0, top)
        cost = (u * ((codes - at[..., None]) * scale[..., None] - blocks).square()).sum(-1)
        best, least = torch.where(cost < least, at, best), torch.minimum(cost, least)
        if turn < _TURNS:
            at = ((u * (codes - part)).sum(-1) / total).clamp(-2.0 * top, 3.0 * top)
    return best, least


def _settled(
    blocks: Tensor, u: Tensor, code_s: Tensor, ideal: Tensor, parts: Mapping[str, Tensor], top: int
) -> tuple[Tensor, Tensor]:
    """Both codes of each group: the scale's or one beside it, and the zero point's nearest or one beside it,
    by what they cost as they are stored."""
    step_s, zero_s, step_z, zero_z = (parts[part].repeat_interleave(SIDE, 0) for part in PARTS)
    near = torch.where(step_z == 0, 0.0, ideal / step_z + zero_z).nan_to_num(0.0).round().clamp_(0, TOP)
    best_s, best_z = code_s, near
    least = torch.full_like(ideal, torch.inf)
    for aside_s in (0, -1, 1):
        for aside_z in (0, -1, 1):
            trial_s, trial_z = (code_s + aside_s).clamp(0, TOP), (near + aside_z).clamp(0, TOP)
            scale = decoded(trial_s, step_s, zero_s)[..., None]
            zero = decoded(trial_z, step_z, zero_z)[..., None]
            codes = torch.where(scale == 0, 0.0, (blocks / scale + zero).round()).nan_to_num(0.0)
            cost = (u * (decoded(codes.clamp_(0, top), scale, zero) - blocks).square()).sum(-1)
            better = cost < least
            best_s, best_z = torch.where(better, trial_s, best_s), torch.where(better, trial_z, best_z)
            least = torch.minimum(cost, least)
    return best_s, best_z
