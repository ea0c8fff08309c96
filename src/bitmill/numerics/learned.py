"""Rounding that is learned: offsets of weights, or weights, and factors of the ends of their ranges.

A weight's value is ``grid(w + V · step)`` under parameters whose range is ``β · lowest … α · highest``.
Rounding is taken as the identity where the value lies inside the range (Bengio et al., arXiv 1308.3432),
which makes the derivatives by ``V``, ``α`` and ``β`` those of Cheng et al. (arXiv 2309.05516) and of Esser et
al. (arXiv 1902.08153); or its derivative is that of a wave that stands for it (StableQAT, arXiv 2601.19320).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitmill.core.axes import AffineGrid, Grid, ScalarGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.straight import sums_inside

NARROWEST, WIDEST = 0.5, 1.5  # of a range
LITTLE = 0.97  # narrower by a step or two of learning
STEEPEST = 1 / (math.sqrt(2) * math.pi)  # amplitude of a wave that falls nowhere


@dataclass(frozen=True, eq=False)
class Learned:
    """A weight on its way to a grid.

    Attributes:
        weight: ``out in`` float32.
        grid, start: the grid, and the parameters that all others are factors of.
        offset: ``V`` in steps, ``out in``, from -1/2 to 1/2.
        high, low: ``α`` and ``β`` of each block.
        top, bottom: ends of each block's range under ``start``.
        ends_apart: whether the zero point is free, so that both ends can move; if not, ``α`` moves both.
        elastic: whether ranges move at all: a grid of powers of two knows no range a little narrower.
    """

    weight: Tensor
    grid: ScalarGrid
    start: Params
    offset: Tensor
    high: Tensor
    low: Tensor
    top: Tensor
    bottom: Tensor
    ends_apart: bool
    elastic: bool

    @classmethod
    def of(cls, weight: Tensor, grid: ScalarGrid, start: Params) -> Learned:
        """At the very values that ``start`` rounds to."""
        far = float(weight.abs().amax()) * 1e3 + 1
        top, bottom = (
            _by_block(grid.decode(grid.encode(torch.full_like(weight, end), start), start), grid)
            for end in (far, -far)
        )
        top, bottom = top.amax((1, 3)), bottom.amin((1, 3))
        ones = torch.ones_like(top)
        apart = isinstance(grid, AffineGrid) and _moved(grid, start, ones, ones, top, bottom) is not None
        little = grid.scaled(start, torch.full_like(top, LITTLE))
        elastic = any(not torch.equal(value, start[name]) for name, value in little.items())
        return cls(weight, grid, start, torch.zeros_like(weight), ones, ones, top, bottom, apart, elastic)

    def params(self) -> Params:
        """Of the range as it is now, as they would be stored."""
        if self.ends_apart and isinstance(self.grid, AffineGrid):
            moved = _moved(self.grid, self.start, self.high, self.low, self.top, self.bottom)
            assert moved is not None
            return moved
        return self.grid.scaled(self.start, self.high)

    def quantized(self, params: Params) -> Quantized:
        """Codes of the weight with its offset."""
        shifted = self.weight + self.offset * step_of_each(self.grid, params, self.weight.shape)
        return Quantized(
            self.grid, self.grid.encode(shifted, params), params, (len(shifted), shifted.shape[1])
        )

    def moved(self, gradient: Tensor, value: Tensor, params: Params, rate: float, ranges: bool) -> Learned:
        """One step against the sign of the gradient.

        An end of a range goes as far as an offset, ``rate`` steps of the grid. (Cheng et al. move the factor
        by ``rate``, which at 4 bits is seven times that, and loses there what it wins at 2 bits.)

        Args:
            gradient: of the loss by ``value``, the values of :meth:`quantized` under ``params``.
            rate: how far each offset goes, in steps of the grid.
            ranges: whether factors move at all.
        """
        step = step_of_each(self.grid, params, self.weight.shape)
        by_weight, by_high, by_low = self.slopes(gradient, value, params)
        offset = by_weight.sign_().mul_(-rate).add_(self.offset).clamp_(-0.5, 0.5)
        if not (ranges and self.elastic):
            return replace(self, offset=offset)
        rates = rate * self._relative_step(step)
        high = (self.high - rates * by_high.sign()).clamp(NARROWEST, 1.0)
        low = (self.low - rates * by_low.sign()).clamp(NARROWEST, 1.0) if self.ends_apart else self.low
        return replace(self, offset=offset, high=high, low=low)

    def trained(self, weight: Tensor, high: Tensor, low: Tensor, params: Params, rate: float) -> Learned:
        """The weight itself, and the ends of its ranges, moved along these directions: where they are 1,
        against the axis by ``rate`` steps of the grid."""
        step = step_of_each(self.grid, params, self.weight.shape)
        one = replace(self, weight=self.weight - rate * step * weight)
        if not self.elastic:
            return one
        rates = rate * self._relative_step(step)
        ends = (
            (end - rates * way).clamp(NARROWEST, WIDEST)
            for end, way in ((self.high, high), (self.low, low if self.ends_apart else torch.zeros_like(low)))
        )
        return replace(one, high=next(ends), low=next(ends))

    def slopes(
        self, gradient: Tensor, value: Tensor, params: Params, amplitude: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives by each weight, and by both ends' factors, in proportion; where the ends are not apart,
        the second is that of the range, and the third says nothing.

        Args:
            gradient, value, params: as of :meth:`moved`.
            amplitude: of the wave whose derivative stands for that of rounding; 0 for the identity.
        """
        step = step_of_each(self.grid, params, self.weight.shape)
        tensors = (gradient, value, self.weight, self.weight + self.offset * step, step)
        top, bottom = self.high * self.top, self.low * self.bottom
        block = (self.grid.block[0] or len(value), self.grid.block[1] or value.shape[1])
        if amplitude or self.weight.device.type != "cpu":
            by_weight, sums, stays = self._sums(tensors, top, bottom, amplitude)
        else:
            by_weight, sums = sums_inside(tensors, top, bottom, block)
            stays = torch.zeros(())
        slips, over, under, stuck = sums
        if not self.ends_apart:
            return by_weight, slips + stuck, slips + stuck
        width = (top - bottom).clamp_min(1e-30)
        return by_weight, top * (slips / width + over), stays + bottom * (under - slips / width)

    def _sums(
        self, tensors: tuple[Tensor, ...], top: Tensor, bottom: Tensor, amplitude: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What :func:`sums_inside` finds, with a wave's derivative; then what the lower end gets of it."""
        slope, value, weight, shifted, step = (_by_block(of, self.grid) for of in tensors)
        upper, lower = (end[:, None, :, None] for end in (top, bottom))
        above, below = shifted > upper + step / 2, shifted < lower - step / 2
        inside = slope.masked_fill(above | below, 0)
        slip, stays = value - weight, torch.zeros((), device=value.device)
        by_weight, stuck = inside, slope - inside
        if amplitude:
            through = _derivative(shifted - value, step, amplitude)
            fixed = lower if self.ends_apart else stays
            slip += (1 - through) * (weight - fixed)
            stays = (inside * (1 - through) * fixed).sum((1, 3))
            by_weight = inside * through
        parts = (inside * slip, stuck * above, stuck * below, stuck * value)
        sums = torch.stack([part.sum((1, 3)) for part in parts])
        return _as_rows(by_weight, self.weight), sums, stays

    def _relative_step(self, step: Tensor) -> Tensor:
        """A step of each block, relative to the end of its range that is farther from zero."""
        widest = _by_block(step, self.grid).amax((1, 3))
        reach = torch.maximum(self.top.abs(), self.bottom.abs())
        return (widest / reach.clamp_min(1e-30)).clamp(max=1.0)


def step_of_each(grid: ScalarGrid, params: Params, shape: torch.Size) -> Tensor:
    """Local distance between neighbouring values at each weight, ``out in``; a grid itself may tell that of a
    block's rows in one."""
    rows, columns = shape
    step = grid.step(params, 0, columns)
    if 1 < step.shape[0] < rows:
        step = step.repeat_interleave(grid.block[0], 0)[:rows]
    return step.expand(rows, columns)


def _derivative(off: Tensor, step: Tensor, amplitude: float) -> Tensor:
    """Of rounding, as a damped wave has it: 1 halfway between two values, little at either.

    Args:
        off: how far each weight is from its value.
    """
    wave = torch.cos(math.pi * (off / step.clamp_min(1e-30)).clamp(-0.5, 0.5))
    return 2 / (1 + math.sqrt(2) * math.pi * amplitude * wave) - 1


def _moved(
    grid: AffineGrid, start: Params, high: Tensor, low: Tensor, top: Tensor, bottom: Tensor
) -> Params | None:
    """``start`` with a range from ``low · bottom`` to ``high · top``; None where zero points are not free."""
    width = top - bottom
    factor = torch.where(width > 0, (high * top - low * bottom) / width.clamp_min(1e-30), 1.0)
    params = grid.scaled(start, factor)
    spread = grid.affine(start, torch.zeros(1, dtype=torch.int64, device=top.device))
    steps = spread.high - spread.low
    size = (width * factor / steps).clamp_min(1e-30)
    return grid.with_zero(params, torch.where(width > 0, -low * bottom / size, 0.0))


def _by_block(values: Tensor, grid: Grid) -> Tensor:
    """``out in`` as ``blocks rows blocks columns``, short blocks filled up with zeros."""
    out, columns = values.shape
    rows, width = grid.block[0] or out, grid.block[1] or columns
    more = (0, -columns % width, 0, -out % rows)
    whole = pad(values, more) if any(more) else values
    return whole.reshape(whole.shape[0] // rows, rows, whole.shape[1] // width, width)


def _as_rows(blocks: Tensor, like: Tensor) -> Tensor:
    """:func:`_by_block` undone."""
    whole = blocks.flatten(2).flatten(0, 1)
    return whole[: like.shape[0], : like.shape[1]]
