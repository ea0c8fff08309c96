"""Coordinate descent: the loss never rises, and what comes back is stored as it is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bitmill.core import registry
from bitmill.core.axes import Grid, VectorGrid
from bitmill.core.types import Moments, Problem
from bitmill.numerics.descent import descend
from bitmill.numerics.points import round_points
from bitmill.solvers.gptq import Gptq

GRIDS = [grid for cls in registry.members("grids").values() for grid in cls.examples()]
STORED = [
    grid
    for grid in GRIDS
    if not grid.encode(torch.zeros(16, 256), grid.fit(torch.zeros(16, 256))).is_floating_point()
]
every = pytest.mark.parametrize("grid", STORED, ids=str)
some = pytest.mark.parametrize(
    "text", ["q2_k", "q4_k", "q6_k", "iq4_xs", "iq2_xxs", "iq3_s", "int3-g64-asym"]
)
VECTORS = [grid for grid in GRIDS if isinstance(grid, VectorGrid)]

OUT, IN = 16, 512  # rows that every grid with rows in groups takes


def _work(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the damped Gram matrix of inputs that are correlated and of unlike size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=rng) * 0.2 / IN**0.5 + torch.eye(IN)
    x = torch.randn(2 * IN, IN, generator=rng) @ mix * (0.2 + 3 * torch.rand(IN, generator=rng) ** 4)
    gram = x.T @ x
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return 0.05 * torch.randn(OUT, IN, generator=rng), gram


def _loss(w: Tensor, value: Tensor, gram: Tensor) -> float:
    missing = (w - value).double()
    return float(((missing @ gram.double()) * missing).sum())


@every
def test_the_loss_never_rises_and_the_result_is_on_the_grid(grid: Grid):
    w, gram = _work()
    params = grid.fit(w, gram.diagonal())
    value = grid.decode(grid.encode(w, params), params)
    losses = [_loss(w, value, gram)]
    for _ in range(3):
        value, params = descend(w, value, params, grid, gram, 2)
        assert torch.allclose(grid.decode(grid.encode(value, params), params), value, rtol=1e-5, atol=1e-7)
        losses.append(_loss(w, value, gram))
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(losses))
    assert losses[-1] < losses[0]


@every
def test_scales_are_linear_and_store_what_they_say(grid: Grid):
    w, _ = _work()
    params = grid.fit(w)
    codes = grid.encode(w, params)
    value = grid.decode(codes, params)
    for name in grid.scales():
        scale = params[name].to(torch.float32)
        assert torch.equal(grid.stored_scale(name, scale), scale)
        settled = grid.stored_scale(name, 1.3 * scale)
        assert torch.equal(grid.stored_scale(name, settled), settled)
        more, most = (grid.decode(codes, {**params, name: scale + k}) for k in (1, 2))
        assert torch.allclose(
            most - more, more - value, rtol=1e-3, atol=1e-4 * float((more - value).abs().max())
        )


@some
def test_more_sweeps_reach_less(text: str):
    w, gram = _work(3)
    moments = Moments(2 * IN, gram.diagonal().clone(), torch.ones(IN), torch.ones(IN), gram)
    problem = Problem("down", "down", w, moments)
    grid = registry.parse_grid(text)
    plain, swept = (
        _loss(w, Gptq(sweeps=k).solve([problem], [grid])[0].quantized.dense(), gram) for k in (0, 4)
    )
    assert swept < 0.99 * plain


def test_a_code_moves_to_its_best_value():
    """One column, everything else fixed: no other code of that column has a smaller loss."""
    grid = registry.parse_grid("int3-g64-asym")
    w, gram = _work(4)
    params = grid.fit(w)
    value, params = descend(w, grid.decode(grid.encode(w, params), params), params, grid, gram, 60)
    best = _loss(w, value, gram)
    codes = grid.encode(value, params)
    for column in (0, 100, 511):
        for code in range(8):
            other = codes.clone()
            other[:, column] = code
            moved = grid.decode(other, params)
            for row in range(OUT):
                one = value.clone()
                one[row] = moved[row]
                assert _loss(w, one, gram) >= best * (1 - 1e-6)


@pytest.mark.parametrize("grid", VECTORS, ids=str)
def test_weights_of_columns_decide_which_vector_is_nearest(grid: VectorGrid):
    """Against many random points and all neighbours by sign: none is nearer in the weighted metric."""
    w, _ = _work(5)
    w, rng = w[:, :256], torch.Generator().manual_seed(1)
    params = grid.fit(w)
    u = torch.rand(256, generator=rng) ** 6 * 50 + 1e-3
    value, upper = w.clone(), torch.diag(u.rsqrt())
    round_points(value, upper, grid.points_of(params, 0, 256))
    assert torch.equal(grid.decode(grid.encode(value, params), params), value)
    cost = (u * (value - w).square()).unfold(1, 8, 8).sum(-1)
    plain = grid.decode(grid.encode(w, params), params)
    assert (cost <= (u * (plain - w).square()).unfold(1, 8, 8).sum(-1) * (1 + 1e-5)).all()
    for _ in range(200):
        move = torch.randn(w.shape, generator=rng) * w.std() * float(torch.rand((), generator=rng))
        other = grid.decode(grid.encode(w + move, params), params)
        assert (cost <= (u * (other - w).square()).unfold(1, 8, 8).sum(-1) * (1 + 1e-5) + 1e-12).all()
