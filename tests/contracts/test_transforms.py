"""Laws of a transform, over every member that is found: maps that fold exactly, and gains that are true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.core import registry
from bitmill.core.axes import Grid, LinearMap, Seam, Transform
from bitmill.core.online import DOWN, KEYS, OnlineTransform
from bitmill.core.types import Moments, Problem
from bitmill.numerics import hadamard
from bitmill.numerics.linear_maps import Hadamard, SharedDiagonal
from bitmill.solvers.nearest import Nearest
from bitmill.transforms.awq import Awq
from bitmill.transforms.hadamard import HadamardRotation

IN, TOKENS = 192, 1500
TRANSFORMS: dict[str, Transform] = {name: cls() for name, cls in registry.members("transforms").items()}
GRIDS = [registry.parse_grid(t) for t in ("int4-g64-asym", "int3-g64-sym", "q4_0", "nf4-b64", "mxfp4")]

SEAMS = {"attn_in", "value", "mlp_in", "mlp_mid", "mlp_order", "key", "residual"}

every = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def _moments(seed: int = 0) -> Moments:
    """Correlated inputs; a few channels carry most of the power, one is silent."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, IN, generator=rng) @ (torch.randn(IN, IN, generator=rng) / IN**0.5)
    x *= torch.rand(IN, generator=rng) ** 2 + 0.05
    x[:, [3, 50, 101]] *= 30
    x[:, 9] = 0
    return Moments(TOKENS, x.square().sum(0), x.abs().sum(0), x.abs().amax(0), x.T @ x, sample=x[::2])


def _readers(grid: Grid, moments: Moments) -> list[tuple[Problem, Grid]]:
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(out, IN, generator=rng) for out in (64, 48)]
    weights[0][0] = 0
    return [(Problem(f"w{i}", "q", w, moments), grid) for i, w in enumerate(weights)]


def _fit(transform: Transform, grid: Grid = GRIDS[0]) -> tuple[LinearMap, float | None]:
    seam = Seam(transform.seams()[0], ("norm",), ("q", "k"), frozenset({transform.kind}))
    readers = [] if transform.needs == "nothing" else _readers(grid, _moments())
    return transform.fit(seam, 0, IN, readers)


def _loss(error: Tensor, moments: Moments) -> float:
    assert moments.gram is not None
    return float(((error @ moments.gram) * error).double().sum())


@every
def test_it_says_what_it_needs_and_where_it_goes(transform: Transform):
    assert transform.needs in ("nothing", "diagonal", "gram")
    assert transform.kind in ("diagonal", "orthogonal", "permutation")
    assert set(transform.seams()) <= SEAMS
    if isinstance(transform, OnlineTransform):
        for space, width in ((DOWN, 172), (DOWN, 94), (KEYS, 80), (KEYS, 64)):
            order = transform.online(space, width)
            assert order == 0 or (width % order == 0 and hadamard.factors(order) is not None)
    map_, gain = _fit(transform)
    assert map_.kind == transform.kind
    assert (gain is None) == (transform.needs == "nothing")


@every
def test_the_fold_is_exact(transform: Transform):
    """Writer with a bias, then reader: the same function, to float32."""
    map_, _ = _fit(transform)
    rng = torch.Generator().manual_seed(2)
    up, bias, down = (torch.randn(*s, generator=rng) for s in ((IN, 40), (IN,), (30, IN)))
    x = torch.randn(100, 40, generator=rng)
    before = (x @ up.T + bias) @ down.T
    after = (x @ map_.write(up).T + map_.write(bias)) @ map_.read(down).T
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    torch.testing.assert_close(map_.undo(map_.read(down)), down, rtol=1e-5, atol=1e-5)


@every
def test_the_same_again_is_the_same_map(transform: Transform):
    w = torch.randn(30, IN, generator=torch.Generator().manual_seed(4))
    assert torch.equal(_fit(transform)[0].read(w), _fit(transform)[0].read(w))


@every_grid
def test_awq_gains_and_never_loses(grid: Grid):
    _, gain = _fit(Awq(), grid)
    assert gain is not None
    assert 0 < gain < 1


@every_grid
def test_awq_gain_is_what_rounding_then_loses(grid: Grid):
    """With every row looked at, the gain is the ratio of the true output errors of nearest rounding."""
    moments = _moments()
    readers = _readers(grid, moments)
    map_, gain = Awq(rows=64).fit(Seam("attn_in", (), ("q",), frozenset({"diagonal"})), 0, IN, readers)

    def error(fold: bool) -> float:
        total = 0.0
        for problem, _ in readers:
            told = map_.moments(moments) if fold else moments
            w = map_.read(problem.weight) if fold else problem.weight
            params = grid.fit(w, told.importance)
            value = grid.decode(grid.encode(w, params), params)
            total += _loss((map_.undo(value) if fold else value) - problem.weight, moments)
        return total

    assert gain == pytest.approx(error(True) / error(False), rel=2e-3)


def test_awq_keeps_weights_that_scaling_cannot_help():
    """Weights already on the grid: every scaling is worse than none, and none is a candidate."""
    grid, moments = registry.parse_grid("int8-channel-sym-sf32"), _moments()
    readers = [
        (Problem(p.name, p.role, Nearest().solve([p], [grid])[0].quantized.dense(), moments), grid)
        for p, _ in _readers(grid, moments)
    ]
    map_, gain = Awq().fit(Seam("attn_in", (), ("q",), frozenset({"diagonal"})), 0, IN, readers)
    assert gain is not None
    assert gain <= 1
    if gain == 1:
        assert torch.equal(map_.read(torch.ones(1, IN)), torch.ones(1, IN))


def test_awq_scales_are_finite_whatever_the_inputs():
    """Silent inputs, weights of zeros, a channel a million times louder: factors stay what f16 can hold."""
    grid, moments = GRIDS[0], _moments()
    assert moments.gram is not None
    loud = torch.ones(IN)
    loud[5] = 1e6
    wild = Moments(
        TOKENS,
        moments.square * loud**2,
        moments.magnitude * loud,
        moments.absmax * loud,
        moments.gram * loud * loud[:, None],
    )
    nothing = Moments(TOKENS, *(torch.zeros(IN) for _ in range(3)), torch.zeros(IN, IN))
    for told in (wild, nothing):
        readers = [(Problem("w", "q", torch.zeros(16, IN), told), grid), *_readers(grid, told)]
        map_, gain = Awq().fit(Seam("attn_in", (), ("q",), frozenset({"diagonal"})), 0, IN, readers)
        scale = map_.read(torch.ones(1, IN))
        assert gain is not None
        assert gain <= 1
        assert bool((scale >= 1 / 128).all() and (scale <= 128).all())


def test_awq_needs_something_to_search():
    with pytest.raises(ValueError, match="nothing to search"):
        Awq(grid_points=0)


def test_hadamard_draws_new_signs_for_each_seam_layer_and_seed():
    def read(seed: int, name: str, layer: int | None) -> Tensor:
        seam = Seam(name, (), (), frozenset({"orthogonal"}))
        return HadamardRotation(seed).fit(seam, layer, IN, ())[0].read(torch.eye(IN))

    drawn = [read(0, "residual", None), read(1, "residual", None), read(0, "value", 0), read(0, "value", 1)]
    for i, one in enumerate(drawn):
        unit = one.double() @ one.double().T
        torch.testing.assert_close(unit, torch.eye(IN).double(), rtol=0, atol=1e-6)
        assert all(not torch.equal(one, other) for other in drawn[:i])
    assert HadamardRotation().seams() == ("residual", "value")
    assert HadamardRotation(r2=False).seams() == ("residual",)
    assert HadamardRotation(r1=False, r3=True).seams() == ("value",)


def test_hadamard_leaves_to_the_runtime_what_it_is_told_to():
    both = HadamardRotation(r3=True, r4=True, block=128)
    assert [both.online(space, 192) for space in (DOWN, KEYS)] == [96, 192]
    assert [HadamardRotation().online(space, 192) for space in (DOWN, KEYS)] == [0, 0]
    limited, _ = both.fit(Seam("residual", (), (), frozenset({"orthogonal"})), None, IN, ())
    assert isinstance(limited, Hadamard) and limited.order == 96


def test_hadamard_spreads_an_outlier_over_all_channels():
    map_, _ = _fit(HadamardRotation())
    spike = torch.zeros(1, IN)
    spike[0, 17] = 1.0
    torch.testing.assert_close(map_.read(spike).abs(), torch.full((1, IN), IN**-0.5))


HEAD, TIMES = 16, 3


def _value_seam() -> Seam:
    """Four heads of values, each behind three queries."""
    return Seam("value", ("v",), ("o",), frozenset({"diagonal"}), per_head=True, shared=(HEAD, TIMES))


def test_channels_that_are_one_channel_of_the_writers_are_tied():
    values = torch.arange(float(IN))
    tied = _value_seam().tied(values)
    for channel in range(IN):
        head, inside = channel // HEAD, channel % HEAD
        same = [(head // TIMES * TIMES + t) * HEAD + inside for t in range(TIMES)]
        assert float(tied[channel]) == pytest.approx(float(values[same].mean()))
    assert torch.equal(Seam("mlp_mid", ("up",), ("down",), frozenset()).tied(values), values)


@every_grid
def test_awq_scales_shared_values_alike_and_folds_exactly(grid: Grid):
    """Through grouped-query attention: what a head of values writes is read behind each of its queries."""
    plain, none = Awq().fit(_value_seam(), 0, IN, _readers(grid, _moments()))
    assert none == 1 and torch.equal(plain.read(torch.ones(1, IN)), torch.ones(1, IN))
    map_, gain = Awq(shared=True).fit(_value_seam(), 0, IN, _readers(grid, _moments()))
    assert gain is not None and gain < 1
    scale = map_.read(torch.ones(1, IN))[0]
    torch.testing.assert_close(_value_seam().tied(scale), scale, rtol=1e-6, atol=0)
    shared = SharedDiagonal.of(scale, HEAD, TIMES)
    rng = torch.Generator().manual_seed(2)
    value, bias, out = (torch.randn(*s, generator=rng) for s in ((IN // TIMES, 40), (IN // TIMES,), (30, IN)))
    x = torch.randn(100, 40, generator=rng)

    def run(value: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        heads = (x @ value.T + bias).reshape(len(x), -1, HEAD)
        return heads.repeat_interleave(TIMES, 1).flatten(1) @ out.T

    before, after = run(value, bias, out), run(shared.write(value), shared.write(bias), shared.read(out))
    torch.testing.assert_close(after, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    torch.testing.assert_close(shared.undo(shared.read(out)), out, rtol=1e-5, atol=1e-5)
    ours, wide = (m.moments(_moments()).gram for m in (shared, map_))
    assert ours is not None and wide is not None
    torch.testing.assert_close(ours, wide, rtol=1e-4, atol=1e-4)
