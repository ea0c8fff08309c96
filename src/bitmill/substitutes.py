"""What stands for a stored grid in another container: the very same values, or else the closest there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bitmill.core import registry
from bitmill.core.axes import AffineGrid, Checkpoint, Container, Grid, VectorGrid, torch_dtype
from bitmill.core.errors import Refused
from bitmill.core.types import Quantized, Row
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer
from bitmill.relabel import equivalents, relabelled

_MORE = 1.1  # bits of the closest grid, at most, times those of the stored one or of the next width there is
_WIDTHS = (2, 3, 4, 8)  # of integers that kernels exist for
_SAMPLE = 32  # rows of a weight that choose it


def dense_grid(
    container: Container, role: str, dtype: str, held: str, read: Callable[[], Tensor]
) -> Grid | None:
    """The dense grid of a tensor that is kept or decoded, when it holds the values; a file in which each
    tensor has a type of its own may go back to single precision."""
    for name in (container.default_grid(dtype, role), *(["f32"] if container.single_file else [])):
        if name in (held, "f32"):
            return Dense(name)
        values = read()
        if torch.equal(values.to(torch_dtype(name)).to(torch.float32), values.to(torch.float32)):
            return Dense(name)
    return None


def same_grid(stored: Quantized, container: Container, role: str, dtype: str) -> Grid | None:
    """The smallest grid of the container with the very same values, the stored one before any other."""
    known = [stored.grid, *sorted(equivalents(stored.grid), key=lambda g: g.storage_bits(stored.shape))]
    for grid in _allowed(known, container, role, stored.shape, dtype):
        if relabelled(stored, grid) is not None:
            return grid
    return None


def dense_only(container: Container, role: str) -> bool:
    """Whether a container quantizes nothing, so that decoding is what was asked for."""
    cheap = (
        grid for cls in registry.grid_families() for grid in cls.examples() if not isinstance(grid, Dense)
    )
    return all(container.refuses(grid, role, (256, 256)) for grid in cheap)


def nearest_first(source: Checkpoint, row: Row, container: Container, dtype: str) -> list[Grid]:
    """The container's grids by squared error for the first rows of a stored weight; evenly spaced ones where
    that is."""
    stored = source.stored(row.name)
    weight = source.read(row.name)[:_SAMPLE].to(torch.float32)
    shape = (row.shape[0], row.shape[1])
    bits = 16 * math.prod(shape) if stored is None else stored.bits
    pool = [
        grid for cls in registry.grid_families() for grid in cls.examples() if not isinstance(grid, Integer)
    ]
    known = stored.grid if stored is not None and isinstance(stored.grid, Integer) else Integer()
    groups = dict.fromkeys((known.group, 0, 128, 64, 32))
    pool += [Integer(b, g, zero) for b in _WIDTHS for g in groups for zero in ("sym", "asym")]
    usable = [
        grid
        for grid in _allowed(pool, container, row.role, row.shape, dtype)
        if not isinstance(grid, Dense | VectorGrid)
    ]
    alike = [grid for grid in usable if isinstance(grid, AffineGrid)]
    even = stored is None or isinstance(stored.grid, AffineGrid)
    sizes = {grid: grid.storage_bits(shape) for grid in (alike if even and alike else usable)}
    whole = bits // math.prod(shape) * math.prod(shape)  # whole bits a weight: nothing narrower is close
    least = min((size for size in sizes.values() if size >= whole), default=max(sizes.values(), default=0))
    near = [grid for grid in sizes if sizes[grid] <= _MORE * max(bits, least)]
    errors = {grid: float((grid.round(weight).dense() - weight).square().sum()) for grid in near}
    return sorted(near, key=lambda grid: (errors[grid], sizes[grid]))


def lays_out(container: Container, rows: Sequence[Row], source: Checkpoint) -> bool:
    """Whether a container writes these rows into one output."""
    try:
        return bool(container.files(rows, source, {}))
    except Refused:
        return False


def why_not(stored: Quantized | None, container: Container, row: Row, dtype: str) -> str:
    """Why a container has no grid with the values of a stored weight."""
    if stored is None:
        return "no grid describes how its columns are laid out"
    settled = container.adapt(stored.grid, dtype)
    refused = container.refuses(settled, row.role, row.shape)
    return refused or f"its scales, zero points or codes are not all those of {settled}"


def _allowed(
    grids: Sequence[Grid], container: Container, role: str, shape: tuple[int, ...], dtype: str
) -> Iterator[Grid]:
    """Grids as the container settles them, as far as it and the shape allow; each once."""
    seen = set()
    for grid in grids:
        settled = container.adapt(grid, dtype)
        if settled in seen or settled.refuses(shape) or container.refuses(settled, role, shape):
            continue
        seen.add(settled)
        yield settled
