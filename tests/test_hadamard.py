"""Every order claimed is a Hadamard matrix; every map folds without changing the function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.core.axes import LinearMap
from bitmill.core.types import Moments
from bitmill.numerics import hadamard
from bitmill.numerics.linear_maps import Diagonal, Hadamard, Orthogonal, Permutation

ORDERS = [n for n in (1, 2, *range(4, 513, 4)) if hadamard.factors(n) is not None]
WIDTH, HEADS, TOKENS = 24, 3, 400


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _maps() -> list[LinearMap]:
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=_rng(1)))[0]
    signs = torch.randint(0, 2, (WIDTH,), generator=_rng(2)).float() * 2 - 1
    return [
        Diagonal(torch.rand(WIDTH, generator=_rng(3)) + 0.2),
        Permutation(torch.randperm(WIDTH, generator=_rng(4))),
        Hadamard(signs, 24),
        Hadamard(signs, 8),
        Orthogonal(rotation),
    ]


every_map = pytest.mark.parametrize("map_", _maps(), ids=lambda m: type(m).__name__)


def _turned(map_: LinearMap, h: Tensor) -> Tensor:
    """``h R``, from the writer's side: a bias is a hidden vector."""
    return torch.stack([map_.write(row) for row in h])


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order: int):
    signs = hadamard.matrix(order)
    assert bool((signs.abs() == 1).all())
    assert torch.equal(signs @ signs.T, order * torch.eye(order, dtype=torch.float64))


def test_nearly_every_order_up_to_428_is_reached():
    missing = set(range(4, 429, 4)) - set(ORDERS)
    assert missing <= {188, 236, 268, 324, 356, 376, 412, 428}


@pytest.mark.parametrize(
    ("width", "order"),
    [
        (64, 64),
        (576, 576),
        (768, 768),
        (1536, 1536),
        (2560, 2560),
        (4096, 4096),
        (5120, 5120),
        (8960, 8960),
        (11008, 11008),
        (14336, 14336),
        (29568, 29568),
        (7, 1),
        (4 * 47, 4),
        (90, 2),
    ],
)
def test_widths_of_real_models(width: int, order: int):
    assert hadamard.largest_factor(width) == order


@pytest.mark.parametrize("order", [2, 12, 28, 52, 72, 172, 576, 1536])
def test_apply_is_the_matrix(order: int):
    x = torch.randn(5, 2 * order, dtype=torch.float64, generator=_rng())
    h = hadamard.matrix(order) / order**0.5
    whole = torch.block_diag(h, h)
    torch.testing.assert_close(hadamard.apply(x, order), x @ whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard.apply(x, order, transposed=True), x @ whole.T, rtol=0, atol=1e-12)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="188"):
        hadamard.matrix(188)
    with pytest.raises(ValueError, match="columns"):
        hadamard.apply(torch.ones(2, 10), 4)
    with pytest.raises(ValueError, match="±1"):
        Hadamard(torch.tensor([1.0, 0.5]), 2)
    with pytest.raises(ValueError, match="order"):
        Hadamard(torch.ones(6), 4)
    with pytest.raises(ValueError, match="finite"):
        Diagonal(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="permutation"):
        Permutation(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="orthogonal"):
        Orthogonal(2 * torch.eye(3))
    with pytest.raises(ValueError, match="width 2"):
        Diagonal(torch.ones(2)).read(torch.ones(2, 3))


@every_map
@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_fold_changes_nothing(map_: LinearMap, heads: int):
    """Writer, bias and reader folded: the composed function stays, to float32."""
    space = heads * WIDTH
    up, bias = torch.randn(space, 40, generator=_rng(5)), torch.randn(space, generator=_rng(6))
    down, x = torch.randn(30, space, generator=_rng(7)), torch.randn(TOKENS, 40, generator=_rng(8))
    before = (x @ up.T + bias) @ down.T
    after = (x @ map_.write(up).T + map_.write(bias)) @ map_.read(down).T
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    assert not torch.allclose(map_.read(down), down)
    torch.testing.assert_close(map_.undo(map_.read(down)), down, rtol=2e-6, atol=2e-6)


@every_map
@pytest.mark.parametrize("heads", [1, HEADS])
def test_moments_are_those_of_the_turned_vector(map_: LinearMap, heads: int):
    mix = torch.randn(heads * WIDTH, heads * WIDTH, generator=_rng(9))
    h = torch.randn(TOKENS, heads * WIDTH, generator=_rng(10)) @ mix
    turned = _turned(map_, h)
    got, wanted = map_.moments(_moments(h)), _moments(turned)
    assert got.gram is not None
    assert got.tokens == TOKENS
    size = float(wanted.square.max())
    torch.testing.assert_close(got.gram, wanted.gram, rtol=1e-4, atol=1e-5 * size)
    torch.testing.assert_close(got.square, got.gram.diagonal())
    torch.testing.assert_close(got.sample, wanted.sample, rtol=1e-4, atol=1e-4 * float(h.abs().max()))
    if map_.kind == "orthogonal":
        torch.testing.assert_close(got.magnitude, wanted.magnitude, rtol=0.15, atol=0)
        assert bool((got.absmax > 0.6 * wanted.absmax).all() and (got.absmax < 1.6 * wanted.absmax).all())
    else:
        torch.testing.assert_close(got.magnitude, wanted.magnitude)
        torch.testing.assert_close(got.absmax, wanted.absmax)


@every_map
def test_without_a_gram_the_squares_of_uncorrelated_channels(map_: LinearMap):
    h = torch.randn(40_000, WIDTH, generator=_rng(11)) * torch.linspace(0.1, 3, WIDTH)
    known = _moments(h)
    told = map_.moments(Moments(known.tokens, known.square, known.magnitude, known.absmax))
    assert told.gram is None
    torch.testing.assert_close(told.square, _moments(_turned_all(map_, h)).square, rtol=0.05, atol=0)


def _turned_all(map_: LinearMap, h: Tensor) -> Tensor:
    """``h R`` for many rows at once: a writer's weight holds hidden vectors as columns."""
    return map_.write(h.T.contiguous()).T


def _moments(h: Tensor) -> Moments:
    wide = h.double()
    sums = (wide.square().sum(0), wide.abs().sum(0), wide.abs().amax(0), wide.T @ wide)
    square, magnitude, absmax, gram = (s.float() for s in sums)
    return Moments(len(h), square, magnitude, absmax, gram, sample=h[::3])
