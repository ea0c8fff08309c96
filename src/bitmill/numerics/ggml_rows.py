"""What llama.cpp's grids share on their way to compiled loops: checks, rows of blocks, threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmill.core.axes import Grid
from bitmill.core.errors import Refused, Unsolvable
from bitmill.numerics.ggml_search import mean_square

HALF_MAX = 65504.0
_SHARE = 1 << 17  # weights

Found = tuple[np.ndarray, dict[str, np.ndarray]]
"""Codes and parameters of blocks."""


def not_whole_blocks(name: str, shape: tuple[int, ...], length: int, small: str) -> str | None:
    """Why rows of this shape are not whole blocks of ``length``, or None; ``small`` are types of 32 that fit
    more rows."""
    if len(shape) != 2:
        return f"{name} stores matrices, and this tensor has shape {tuple(shape)}; keep it f32 or f16"
    if shape[1] % length == 0:
        return None
    remedy = f"{small} (blocks of 32) fit" if shape[1] % 32 == 0 else "f16 and bf16 fit"
    return f"rows of {shape[1]} values are not whole blocks of {length}, which {name} needs; {remedy}"


def check(grid: Grid, w: Tensor, importance: Tensor | None, largest: float) -> None:
    """Refuse what a search cannot work on.

    Args:
        largest: beyond it no scale of ``grid`` fits half precision.

    Raises:
        Refused: the shape. Unsolvable: values that are not finite or too large. ValueError: importance of
            another shape.
    """
    where = f"a weight of shape {tuple(w.shape)} on its way to {grid}"
    refusal = grid.refuses(tuple(w.shape))
    if refusal is not None:
        raise Refused(refusal, where=where)
    if w.numel():
        low, high = (float(value) for value in torch.aminmax(w))
        if not (isfinite(low) and isfinite(high)):
            raise Unsolvable("the weight holds values that are not finite", where=where)
        if max(-low, high) > largest:
            raise _too_large(max(-low, high), where)
    if importance is None:
        return
    if importance.shape not in (w.shape, w.shape[1:]):
        raise ValueError(f"importance of shape {tuple(importance.shape)} does not fit {where}")
    if not (torch.isfinite(importance).all() and (importance >= 0).all()):
        raise Unsolvable("the importance holds values that are negative or not finite", where=where)


def _too_large(value: float, where: str | None = None) -> Unsolvable:
    return Unsolvable(
        f"{value:.3g} needs a scale or minimum beyond half precision (65504)",
        where=where,
        fix="keep this tensor in bf16 or f32",
    )


def half(values: Tensor) -> Tensor:
    """Float32 values as half precision holds them, at its ends where they are beyond."""
    return values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).to(torch.float32)


def stored(values: np.ndarray) -> np.ndarray:
    """Float32 values as half precision holds them.

    Raises:
        Unsolvable: one is beyond.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise _too_large(float(np.abs(values).max()))
    return rounded


def blocks_of(values: Tensor, length: int) -> np.ndarray:
    """``· length`` float32."""
    flat = values.detach().to("cpu", torch.float32).contiguous().numpy()
    return flat.reshape(-1, length)


def in_threads(kernel: Callable[..., None], count: int, *arrays: Any) -> None:
    """Run a compiled kernel over ``count`` items, on torch's number of threads if the work is worth it."""
    workers = max(1, min(torch.get_num_threads(), count, arrays[0].size >> 16))
    edges = [count * k // workers for k in range(workers + 1)]
    if workers == 1:
        kernel(0, count, *arrays)
        return
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(kernel, a, b, *arrays) for a, b in pairwise(edges)]:
            done.result()


def in_shares(search: Callable[..., Found], rows: int, x: np.ndarray, told: np.ndarray | None) -> Found:
    """``search(rows, x, told)`` over shares of the rows, on torch's number of threads.

    A share fits a core's cache, codes and all. ``x`` are the blocks of ``rows`` rows, ``told`` those of as
    many rows or of one, which serves them all.
    """
    count = max(1, min(rows, x.size // _SHARE))
    edges = [rows * k // count for k in range(count + 1)]
    blocks = len(x) // max(1, rows)

    def work(first: int, last: int) -> Found:
        here = slice(first * blocks, last * blocks)
        own = told[here] if told is not None and len(told) == len(x) else told
        return search(last - first, x[here], own)

    workers = min(torch.get_num_threads(), count)
    if workers == 1:
        parts = [work(a, b) for a, b in pairwise(edges)]
    else:
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(work, edges[:-1], edges[1:]))
    codes, params = zip(*parts, strict=True)
    return np.concatenate(codes), {name: np.concatenate([p[name] for p in params]) for name in params[0]}


def mean_squares(x: np.ndarray, factor: float) -> np.ndarray:
    """``factor`` times the mean square of each row, summed in order."""
    power = np.empty(len(x), np.float32)
    in_threads(mean_square, len(x), x, np.float32(factor), power)
    return power
