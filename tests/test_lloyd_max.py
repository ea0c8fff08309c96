"""Levels that are best for a density, against another way to find them; and what theory says of them."""

from __future__ import annotations

from math import pi, sqrt

import numpy as np
import pytest
import torch

from bitmill.numerics.cache_bases import hadamard_basis, random_basis
from bitmill.numerics.cache_sphere import Signs, Sphere
from bitmill.numerics.lloyd_max import (
    angle_levels,
    bound,
    sphere_density,
    sphere_distortion,
    sphere_levels,
)

GAUSS = (0.3634, 0.1175, 0.03454, 0.00950, 0.00250)
"""Least squared error of a normal number at 1 to 5 bits, as the literature has it."""
NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def by_quadrature(density, low: float, high: float, levels: np.ndarray, steps: int) -> np.ndarray:
    """Lloyd's steps with integrals taken numerically."""
    for _ in range(steps):
        edges = np.concatenate([[low], (levels[1:] + levels[:-1]) / 2, [high]])
        half = np.diff(edges)[:, None] / 2
        t = (edges[1:] + edges[:-1])[:, None] / 2 + half * NODES
        f = density(t) * WEIGHTS
        levels = (f * t).sum(1) / f.sum(1)
    return levels


@pytest.mark.parametrize("dimension", [16, 64, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_solve_the_equations(dimension: int, bits: int) -> None:
    found = sphere_levels(dimension, bits)
    start = np.linspace(-2, 2, 2**bits + 2)[1:-1] / sqrt(dimension)
    other = by_quadrature(lambda t: (1 - t * t) ** ((dimension - 3) / 2), -1, 1, start, 2500)
    assert np.abs(found - other).max() < 1e-6 / sqrt(dimension)
    assert np.array_equal(found, -found[::-1])


@pytest.mark.parametrize("level", [1, 2, 3])
def test_angles_solve_theirs(level: int) -> None:
    power = 2**level - 1
    start = np.linspace(0, pi / 2, 6)[1:-1]
    other = by_quadrature(lambda t: np.sin(2 * t) ** power, 0, pi / 2, start, 400)
    assert np.abs(angle_levels(power, 2) - other).max() < 1e-6


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_many_levels_are_fixed_points(bits: int) -> None:
    levels = sphere_levels(128, bits)
    mass, moment = sphere_density(128).cells((levels[1:] + levels[:-1]) / 2)
    assert np.abs(moment / mass - levels).max() < 1e-9 and (np.diff(levels) > 0).all()


def test_distortion_goes_to_that_of_normal_numbers() -> None:
    for bits, known in enumerate(GAUSS, 1):
        assert sphere_distortion(512, bits) == pytest.approx(known, rel=8e-3)
        assert 4.0**-bits < sphere_distortion(128, bits) < bound(bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dimension", [64, 80, 128])
def test_turboquant_loses_what_theory_says(bits: int, dimension: int) -> None:
    x = torch.randn(20_000, dimension, generator=torch.Generator().manual_seed(bits))
    sphere = Sphere(dimension, bits, 0)
    back = sphere.unpack(sphere.pack(x)) @ sphere.basis
    loss = ((back - x).square().sum(-1) / x.square().sum(-1)).mean()
    assert float(loss) == pytest.approx(sphere_distortion(dimension, bits), rel=0.01)
    if bits > 1:
        assert float(loss) == pytest.approx(GAUSS[bits - 1], rel=0.05)


def test_products_with_a_residual_sketch_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 200, 128, generator=generator)
    found = []
    for seed in range(200):
        sphere = Sphere(128, 2, seed, residual=True)
        back = sphere.unpack(sphere.pack(x)) @ sphere.basis
        found.append((back * y).sum(-1) - (x * y).sum(-1))
    errors = torch.stack(found) / (x.norm(dim=-1) * y.norm(dim=-1))
    t = float(errors.mean() / errors.mean(0).std() * sqrt(errors.shape[1]))
    assert abs(t) < 4
    bound_ = sqrt(3) * pi**2 / 128 * 4.0**-2
    assert float(errors.square().mean()) < bound_
    plain = Sphere(128, 1, 0)
    back = plain.unpack(plain.pack(x)) @ plain.basis
    slope = (back * x).sum() / x.square().sum()
    assert float(slope) == pytest.approx(2 / pi, rel=0.02), "without a sketch products shrink"


def test_a_sketch_varies_as_its_paper_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.nn.functional.normalize(torch.randn(2, 400, 64, generator=generator), dim=-1)
    rows = 128
    found = []
    for seed in range(100):
        signs = Signs(rows, 64, seed)
        found.append((signs.unpack(signs.pack(x)) * (y @ signs.basis.mT)).sum(-1))
    every = torch.stack(found)
    dot = (x * y).sum(-1)
    assert float((every.mean(0) - dot).mean()) == pytest.approx(0, abs=4e-3)
    expected = (pi / 2 - dot.square()) / rows
    assert float(every.var(0).mean() / expected.mean()) == pytest.approx(1, rel=0.03)
    assert float(every.var(0).mean()) < pi / 2 / rows * 1.03


@pytest.mark.parametrize("width", [16, 24, 64, 80, 96, 112, 128, 192, 256])
def test_bases_are_orthonormal(width: int) -> None:
    for basis in (hadamard_basis(width), random_basis(width, 3)):
        assert float((basis @ basis.T - torch.eye(width)).abs().max()) < 1e-5
