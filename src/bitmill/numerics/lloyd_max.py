"""The best levels for numbers of a known density (Lloyd, 1957; Max, 1960), solved and not sampled.

A level is the mean of its cell, and a border is halfway between two levels. Lloyd's steps come close; the
equations are then solved by Newton's method, whose matrix has three diagonals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import comb, lgamma, log, pi

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Curve = Callable[[Values], Values]

_FINE = 1 << 14
_LLOYD, _NEWTON = 200, 60
_CLOSE = 1e-15


@dataclass(frozen=True)
class Density:
    """How numbers lie on an interval.

    Attributes:
        low, high: its ends.
        at: the density, any positive multiple of it.
        mass: its integral up to a number, the same multiple.
        moment: the integral of ``t`` times it, up to any constant.
    """

    low: float
    high: float
    at: Curve
    mass: Curve
    moment: Curve

    def cells(self, borders: Values) -> tuple[Values, Values]:
        """Share of all numbers in each cell between ``borders``, and the integral of ``t`` there."""
        whole = np.concatenate([[self.low], borders, [self.high]])
        mass, moment = np.diff(self.mass(whole)), np.diff(self.moment(whole))
        total = mass.sum()
        return mass / total, moment / total


def best_levels(density: Density, bits: int) -> Values:
    """The ``2**bits`` levels of least squared error, in order, float64."""
    levels = _start(density, 2**bits)
    for _ in range(_LLOYD):
        mass, moment = density.cells(_borders(levels))
        levels = moment / mass
    for _ in range(_NEWTON):
        step = _newton(density, levels)
        moved = levels - step
        if not (np.diff(moved) > 0).all() or moved[0] < density.low or moved[-1] > density.high:
            mass, moment = density.cells(_borders(levels))
            moved = moment / mass
        done = bool(np.abs(moved - levels).max() <= _CLOSE * (density.high - density.low))
        levels = moved
        if done:
            break
    return levels


def distortion(density: Density, levels: Values, second: float) -> float:
    """Expected squared error of rounding to the nearest of ``levels``; ``second`` is the mean of ``t²``."""
    mass, moment = density.cells(_borders(levels))
    return float(second - 2 * (levels * moment).sum() + (levels**2 * mass).sum())


def sphere_density(dimension: int) -> Density:
    """One coordinate of a point drawn evenly from the unit sphere in ``dimension`` ≥ 3 dimensions: the
    density ``(1 - t²)^((d - 3) / 2)``, whose integrals are closed (powers of cos, t = sin θ)."""
    if dimension < 3:
        raise ValueError(f"a coordinate of a sphere in {dimension} dimensions is not a density of this kind")
    power = dimension - 2
    return Density(
        -1.0,
        1.0,
        lambda t: np.maximum(1 - t * t, 0.0) ** ((dimension - 3) / 2),
        lambda t: _cosines(power, np.arcsin(np.clip(t, -1, 1))),
        lambda t: -(np.maximum(1 - t * t, 0.0) ** ((dimension - 1) / 2)) / (dimension - 1),
    )


@cache
def sphere_levels(dimension: int, bits: int) -> Values:
    """The best levels for :func:`sphere_density`, symmetric. Not to be written into."""
    if bits == 0:
        return np.zeros(1)
    levels = best_levels(sphere_density(dimension), bits)
    return (levels - levels[::-1]) / 2


@cache
def sphere_distortion(dimension: int, bits: int) -> float:
    """Squared error of a unit vector whose coordinates are rounded to :func:`sphere_levels`."""
    found = distortion(sphere_density(dimension), sphere_levels(dimension, bits), 1 / dimension)
    return dimension * found


def angle_density(power: int) -> Density:
    """The angle between the norms of two halves of a normal vector of ``power + 1`` numbers, as ``φ`` around
    45°, doubled: the density ``cos(φ)**power`` on -90° … 90°, for an odd power. Its integrals come from
    ``cos(φ)**n`` as a sum of cosines of multiples."""
    if power % 2 == 0:
        raise ValueError(f"{power} is not odd")
    terms = [(power - 2 * j, comb(power, j) * 2.0 ** (1 - power)) for j in range((power + 1) // 2)]

    def mass(t: Values) -> Values:
        return np.sum([a * np.sin(k * t) / k for k, a in terms], axis=0)

    def moment(t: Values) -> Values:
        return np.sum([a * (t * np.sin(k * t) / k + np.cos(k * t) / k**2) for k, a in terms], axis=0)

    return Density(-pi / 2, pi / 2, lambda t: np.cos(t) ** power, mass, moment)


@cache
def angle_levels(power: int, bits: int) -> Values:
    """The best levels for the angle itself, between 0 and 90°, in radians. Not to be written into."""
    levels = best_levels(angle_density(power), bits)
    return (levels - levels[::-1]) / 4 + pi / 4


def bound(bits: float) -> float:
    """What no distortion of a unit vector's coordinates exceeds for large dimensions (Zador; Zandieh et al.,
    theorem 1): ``√3 π/2 · 4^-bits``."""
    return 3**0.5 * pi / 2 * 4**-bits


def sphere_scale(dimension: int) -> float:
    """The factor that makes :func:`sphere_density`'s curve integrate to one."""
    return float(np.exp(lgamma(dimension / 2) - lgamma((dimension - 1) / 2) - 0.5 * log(pi)))


def _start(density: Density, count: int) -> Values:
    """Levels as dense as the cube root of the density (Panter and Dite, 1951)."""
    t = np.linspace(density.low, density.high, _FINE + 1)
    middle = (t[1:] + t[:-1]) / 2
    reached = np.cumsum(np.maximum(density.at(middle), 0.0) ** (1 / 3))
    return np.interp((np.arange(count) + 0.5) / count, reached / reached[-1], middle)


def _borders(levels: Values) -> Values:
    return (levels[1:] + levels[:-1]) / 2


def _newton(density: Density, levels: Values) -> Values:
    """The step that solves ``level = mean of its cell``, linearized."""
    borders = _borders(levels)
    total = float(np.diff(density.mass(np.array([density.low, density.high])))[0])
    mass, moment = density.cells(borders)
    means, at = moment / mass, density.at(borders) / total
    below = np.concatenate([[0.0], at * (means[1:] - borders) / mass[1:] / 2])
    above = np.concatenate([at * (borders - means[:-1]) / mass[:-1] / 2, [0.0]])
    matrix = np.diag(1 - below - above) - np.diag(below[1:], -1) - np.diag(above[:-1], 1)
    return np.linalg.solve(matrix, levels - means)


def _cosines(power: int, angle: Values) -> Values:
    """The integral of ``cos**power`` from 0, by parts, two powers at a time."""
    cos, sin = np.cos(angle), np.sin(angle)
    found, n = (angle, 0) if power % 2 == 0 else (sin, 1)
    while n < power:
        n += 2
        found = cos ** (n - 1) * sin / n + (n - 1) / n * found
    return np.asarray(found)
