"""Error feedback against the textbook: no blocks, no factorization tricks, one column at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitmill.core import registry
from bitmill.core.axes import AffineGrid, Grid, LevelGrid
from bitmill.core.errors import BadRecipe, Refused, Unsolvable
from bitmill.core.types import Moments, Problem, Solution
from bitmill.numerics.factor import upper_inverse_factor
from bitmill.numerics.feedback import round_block
from bitmill.recipe import parse
from bitmill.solvers.gptq import Gptq, round_spans
from bitmill.solvers.nearest import Nearest

OUT, IN, TOKENS = 32, 256, 2048
DAMP = 0.01


def _moments(seed: int = 0, width: int = IN, tokens: int = TOKENS) -> Moments:
    """Inputs as a network has them: correlated, some channels a hundred times louder."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng) * torch.logspace(0, -2, width)[:, None]
    x = torch.randn(tokens, width, generator=rng) @ mix + 0.05 * torch.randn(tokens, width, generator=rng)
    x[:, 7] *= 20
    return Moments(tokens, x.square().sum(0), x.abs().sum(0), x.abs().amax(0), x.T @ x)


def _weight(seed: int = 1, out: int = OUT, width: int = IN) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def _solve(grid: Grid, w: Tensor, moments: Moments, **options: Any) -> Solution:
    return Gptq(**options).solve([Problem("w", "q", w, moments)], [grid])[0]


def _loss(error: Tensor, moments: Moments) -> float:
    assert moments.gram is not None
    wide = error.double()
    return float(((wide @ moments.gram.double()) * wide).sum())


def _textbook(w: Tensor, grid: Grid, moments: Moments, order: Tensor, damp: float = DAMP) -> Tensor:
    """Optimal brain quantization, float64: after each column H⁻¹ loses its row by Gaussian elimination."""
    assert moments.gram is not None
    hessian = moments.gram.double()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    ahead, inverse = w.double().clone(), hessian[order][:, order].inverse()
    params = grid.fit(w, moments.importance)
    value = torch.empty_like(w)
    for j, column in enumerate(order.tolist()):
        now = ahead[:, column : column + 1].float()
        value[:, column : column + 1] = grid.decode(grid.encode(now, params, column), params, column)
        error = (ahead[:, column] - value[:, column].double()) / inverse[j, j]
        ahead[:, order] -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return value


def _agree(ours: Tensor, theirs: Tensor, w: Tensor, moments: Moments) -> None:
    """Nearly all values are equal; one near a tie may fall the other way, and then moves a few behind it."""
    differ = float((ours - theirs).abs().gt(1e-5 * theirs.abs().amax()).double().mean())
    assert differ < 0.02
    assert _loss(ours - w, moments) == pytest.approx(_loss(theirs - w, moments), rel=0.01)


@pytest.mark.parametrize("block", [1, 32, 48, 128, 1000])
@pytest.mark.parametrize(
    "text", ["int4-g32-asym", "int3-g64-sym", "int4-g128-asym", "int4-channel-sym", "nf4-b64"]
)
def test_blocks_and_groups_of_any_width_are_the_textbook(text: str, block: int):
    """Group borders inside a block, at its edge, and wider than it: the classic place for an index mix-up."""
    grid, w, moments = registry.parse_grid(text), _weight(), _moments()
    natural = torch.arange(IN)
    ours = _solve(grid, w, moments, block=block, order="natural").quantized.dense()
    _agree(ours, _textbook(w, grid, moments, natural), w, moments)


@pytest.mark.parametrize("text", ["int4-g32-asym", "int4-channel-sym", "q4_k"])
def test_act_order_is_the_textbook_in_another_order(text: str):
    grid, w, moments = registry.parse_grid(text), _weight(), _moments()
    order = moments.square.argsort(descending=True, stable=True)
    ours = _solve(grid, w, moments).quantized.dense()
    _agree(ours, _textbook(w, grid, moments, order), w, moments)


def test_vectors_are_block_elimination():
    """On spans of 8: the error of a span moves on through the inverse of its pivot block."""
    grid, w, moments = registry.parse_grid("e8p"), _weight(), _moments()
    assert moments.gram is not None
    hessian = moments.gram.double()
    hessian = hessian + DAMP * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    inverse = hessian.inverse()
    params = grid.fit(w, moments.importance)
    ahead, value = w.double().clone(), torch.empty_like(w)
    for first in range(0, IN, 8):
        span, rest = slice(first, first + 8), slice(first + 8, IN)
        value[:, span] = grid.decode(grid.encode(ahead[:, span].float(), params, first), params, first)
        error = (ahead[:, span] - value[:, span].double()) @ inverse[span, span].inverse()
        ahead[:, rest] -= error @ inverse[span, rest]
        inverse = inverse - inverse[:, span] @ inverse[span, span].inverse() @ inverse[span, :]
    ours = _solve(grid, w, moments, order="natural").quantized.dense()
    _agree(ours, value, w, moments)


def _told_grids() -> list[Grid]:
    found = [g for cls in registry.members("grids").values() for g in cls.examples()]
    return [g for g in found if isinstance(g, (AffineGrid, LevelGrid))]


@pytest.mark.parametrize("grid", _told_grids(), ids=str)
def test_the_compiled_loop_is_the_plain_one_bit_for_bit(grid: AffineGrid | LevelGrid):
    w, moments = _weight(), _moments()
    assert moments.gram is not None
    w[3] = 0
    factor = upper_inverse_factor(moments.gram, DAMP, "w").upper
    params = grid.fit(w, moments.importance)
    columns = torch.randperm(IN, generator=torch.Generator().manual_seed(5))
    fast, plain = w[:, columns].contiguous(), w[:, columns].contiguous()
    told = (
        grid.affine(params, columns) if isinstance(grid, AffineGrid) else grid.levels_of(params, columns, OUT)
    )
    errors = round_block(fast, factor, told)
    assert torch.equal(errors, round_spans(plain, factor, grid, params, columns))
    assert torch.equal(fast, plain)


def test_one_output_after_another_is_all_at_once():
    grid, w, moments = registry.parse_grid("int4-g32-asym"), _weight(), _moments()
    whole = _solve(grid, w, moments).quantized
    for rows in (slice(0, 5), slice(5, OUT)):
        part = _solve(grid, w[rows].contiguous(), moments).quantized
        assert torch.equal(part.codes, whole.codes[rows])


def test_problems_that_share_an_input_share_the_factor(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def counted(gram: Tensor, damp: float, where: str, order: Tensor) -> object:
        calls.append(where)
        return upper_inverse_factor(gram, damp, where, order)

    monkeypatch.setattr("bitmill.solvers.gptq.upper_inverse_factor", counted)
    moments = _moments()
    problems = [Problem(name, name, _weight(i), moments) for i, name in enumerate("qkv")]
    together = Gptq().solve(problems, [registry.parse_grid(t) for t in ("int4-g32-sym", "q4_k", "nf4-b64")])
    assert len(calls) == 1
    alone = Gptq().solve(problems[1:2], [registry.parse_grid("q4_k")])
    assert torch.equal(together[1].quantized.codes, alone[0].quantized.codes)


def _gains(texts: Sequence[str]) -> list[float]:
    w, moments = _weight(), _moments()
    gains = []
    for text in texts:
        grid = registry.parse_grid(text)
        plain = Nearest().solve([Problem("w", "q", w, moments)], [grid])[0].quantized.dense()
        gains.append(
            _loss(_solve(grid, w, moments).quantized.dense() - w, moments) / _loss(plain - w, moments)
        )
    return gains


def test_feedback_pays():
    assert max(_gains(["int4-g64-asym", "int3-g64-asym", "q4_k", "mxfp4", "nf4-b64", "e8p"])) < 0.6


def test_dead_channels_are_rounded_and_reported():
    """A channel that calibration never excited keeps its nearest value, and disturbs nobody."""
    grid, w, moments = registry.parse_grid("int4-g32-asym"), _weight(), _moments()
    assert moments.gram is not None
    dead = torch.zeros(IN, dtype=torch.bool)
    dead[[0, 9, 255]] = True
    gram = moments.gram.masked_fill(dead[:, None] | dead[None, :], 0)
    quiet = Moments(TOKENS, gram.diagonal().clone(), moments.magnitude, moments.absmax, gram)
    solution = _solve(grid, w, quiet)
    assert [(n.kind, n.value) for n in solution.notes] == [("dead-channels", 3.0)]
    params, value = solution.quantized.params, solution.quantized.dense()
    nearest = grid.decode(grid.encode(w, params), params)
    assert torch.equal(value[:, dead], nearest[:, dead])
    assert not torch.equal(value[:, ~dead], nearest[:, ~dead])
    residue = gram.clone()  # what a rotation's rounding may leave beside a diagonal of 0
    residue[9, 20] = residue[20, 9] = 0.01 * gram.diagonal().mean()
    again = Moments(TOKENS, quiet.square, quiet.magnitude, quiet.absmax, residue)
    assert torch.equal(_solve(grid, w, again).quantized.codes, solution.quantized.codes)


def test_too_few_samples_raise_the_damping_and_say_so():
    """Eight tokens for 256 inputs, and a Gram that rounding has made indefinite."""
    moments = _moments(tokens=8)
    assert moments.gram is not None
    gram = moments.gram - 0.02 * moments.gram.diagonal().mean() * torch.eye(IN)
    broken = Moments(8, gram.diagonal().clone().clamp_min(1e-3), moments.magnitude, moments.absmax, gram)
    solution = _solve(registry.parse_grid("int4-g32-asym"), _weight(), broken)
    (note,) = (n for n in solution.notes if n.kind == "damping")
    assert note.value is not None
    assert DAMP < note.value <= 1
    assert torch.isfinite(solution.quantized.dense()).all()


def test_what_cannot_be_solved_says_why():
    grid, w, good = registry.parse_grid("int4-g32-asym"), _weight(), _moments()
    assert good.gram is not None

    def with_gram(gram: Tensor | None) -> Moments:
        return Moments(TOKENS, good.square, good.magnitude, good.absmax, gram)

    with pytest.raises(Refused, match="Gram"):
        _solve(grid, w, with_gram(None))
    with pytest.raises(Unsolvable, match="overflow"):
        _solve(grid, w, with_gram(good.gram.clone().index_fill_(0, torch.tensor([3]), torch.inf)))
    with pytest.raises(Unsolvable, match="no calibration token"):
        _solve(grid, w, with_gram(torch.zeros(IN, IN)))
    indefinite = torch.eye(IN) * good.square.mean()
    indefinite[0, 1] = indefinite[1, 0] = 50 * good.square.mean()
    with pytest.raises(Unsolvable, match="positive definite"):
        _solve(grid, w, with_gram(indefinite))
    for options in ({"damp": 0.0}, {"damp": 2.0}, {"block": 0}):
        with pytest.raises(ValueError, match="not"):
            Gptq(**options)


@pytest.mark.parametrize("width", [1, 7, 64, 300])
def test_the_factor_is_that_of_the_inverse(width: int):
    moments = _moments(width=max(width, 8))
    assert moments.gram is not None
    gram = moments.gram[:width, :width]
    upper = upper_inverse_factor(gram, DAMP, "w").upper.double()
    wide = gram.double() / gram.double().diagonal().mean()
    wide = wide + DAMP * torch.eye(width, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    unit = upper.T @ upper @ wide
    torch.testing.assert_close(unit, torch.eye(width, dtype=torch.float64), rtol=0, atol=2e-2)
    assert bool((upper.diagonal() > 0).all())


@pytest.mark.parametrize("text", ["int4-g32-asym", "q4_0", "q4_k", "mxfp4", "nf4-b64"])
def test_a_block_of_dead_channels_keeps_its_weights(text: str):
    """Nothing is known of these inputs, which is no reason to lose what reads them."""
    grid, w, moments = registry.parse_grid(text), _weight(), _moments()
    assert moments.gram is not None
    dead = torch.arange(IN) < 64  # two blocks of 32, and two of the eight sub-blocks of q4_k
    gram = moments.gram.masked_fill(dead[:, None] | dead[None, :], 0)
    quiet = Moments(TOKENS, gram.diagonal().clone(), moments.magnitude, moments.absmax, gram)
    error = (_solve(grid, w, quiet).quantized.dense() - w)[:, dead]
    plain = (grid.round(w).dense() - w)[:, dead]
    assert float(error.norm()) <= 1.1 * float(plain.norm())


def _group_order(moments: Moments, group: int) -> Tensor:
    """Groups by their loudest column, columns inside likewise."""
    power = moments.square.tolist()
    groups = [list(range(a, a + group)) for a in range(0, len(power), group)]
    groups.sort(key=lambda columns: -max(power[c] for c in columns))
    return torch.tensor([c for columns in groups for c in sorted(columns, key=lambda c: -power[c])])


@pytest.mark.parametrize(("text", "group"), [("int4-g32-asym", 32), ("int2-g128-sym", 128), ("q4_k", 256)])
def test_group_order_is_the_textbook_with_groups_kept_together(text: str, group: int):
    grid, w, moments = registry.parse_grid(text), _weight(), _moments()
    order = _group_order(moments, group)
    assert sorted(order.tolist()) == list(range(IN))
    ours = _solve(grid, w, moments, order="group").quantized.dense()
    _agree(ours, _textbook(w, grid, moments, order), w, moments)


@pytest.mark.parametrize("block", [24, 128])
@pytest.mark.parametrize("order", ["natural", "group"])
@pytest.mark.parametrize(("text", "group"), [("int4-g32-asym", 32), ("int3-g64-sym", 64), ("q4_0", 32)])
def test_refitted_groups_see_what_the_columns_before_left_them(text: str, group: int, order: str, block: int):
    """The paper's own way, one column at a time: when a group begins, its range is that of its columns."""
    grid, w, moments = registry.parse_grid(text), _weight(), _moments()
    assert moments.gram is not None
    hessian = moments.gram.double()
    hessian = hessian + DAMP * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    places = torch.arange(IN) if order == "natural" else _group_order(moments, group)
    ahead, inverse = w.double().clone(), hessian[places][:, places].inverse()
    value, params = torch.empty_like(w), {}
    for j, column in enumerate(places.tolist()):
        first = column // group * group
        if j % group == 0:
            own = slice(first, first + group)
            params = grid.fit(ahead[:, own].float(), moments.importance[own])
        now = ahead[:, column : column + 1].float()
        at = column - first
        value[:, column : column + 1] = grid.decode(grid.encode(now, params, at), params, at)
        error = (ahead[:, column] - value[:, column].double()) / inverse[j, j]
        ahead[:, places] -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    solution = _solve(grid, w, moments, order=order, refit=True, block=block)
    ours = solution.quantized.dense()
    early = places[: 2 * group]  # later on a value that fell the other way may have moved a whole range
    assert float((ours - value)[:, early].abs().gt(1e-5).double().mean()) < 0.02
    assert _loss(ours - w, moments) == pytest.approx(_loss(value - w, moments), rel=0.02)
    again = solution.quantized
    assert torch.equal(grid.encode(again.dense(), again.params), again.codes)


def test_refitting_needs_groups_of_their_own_that_stay_together():
    with pytest.raises(ValueError, match="order=group"):
        Gptq(refit=True)
    with pytest.raises(ValueError, match="order is"):
        Gptq(order="random")
    for text in ("nvfp4", "nf4-b64-dq", "fp8-e4m3-b128", "int4-r8-fz"):
        assert "refit=false" in str(Gptq(order="group", refit=True).refuses(registry.parse_grid(text)))
    with pytest.raises(ValueError, match="one group"):
        _solve(registry.parse_grid("nvfp4"), _weight(), _moments(), order="natural", refit=True)
    with pytest.raises(BadRecipe, match="order=group"):
        parse("gptq(refit=true) : int4-g64-asym > gptq")


@pytest.mark.parametrize("cls", registry.members("grids").values(), ids=registry.members("grids"))
def test_every_grid_that_takes_refitting_keeps_what_it_stores(cls: type[Grid]):
    solver, moments = Gptq(order="group", refit=True), _moments()
    w = _weight(out=16)
    for grid in cls.examples():
        if solver.refuses(grid) is None and grid.refuses(tuple(w.shape)) is None:
            quantized = solver.solve([Problem("w", "q", w, moments)], [grid])[0].quantized
            value = quantized.dense()
            assert torch.isfinite(value).all()
            assert _loss(value - w, moments) < _loss(w, moments)
            again = grid.decode(grid.encode(value, quantized.params), quantized.params)
            assert torch.equal(again, value)


def _drifted(seed: int = 0) -> tuple[Moments, Tensor, Tensor]:
    """Moments of inputs that were a little different in the original model; both inputs, float64."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=rng) * torch.logspace(0, -2, IN)[:, None]
    x = torch.randn(TOKENS, IN, generator=rng) @ mix + 0.05 * torch.randn(TOKENS, IN, generator=rng)
    original = x + 0.1 * x @ (torch.randn(IN, IN, generator=rng) / IN**0.5) + 0.01
    cross = (original - x).T @ x
    told = Moments(TOKENS, x.square().sum(0), x.abs().sum(0), x.abs().amax(0), x.T @ x, cross=cross)
    return told, x.double(), original.double()


@pytest.mark.parametrize("order", ["act", "natural"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_asymmetric_calibration_is_the_papers_loop(order: str, share: float):
    """After each column ``q`` its drift ``w_q Δx_q`` is left to the columns ``F`` behind it: plus
    ``w_q Δx_q X_Fᵀ (X_F X_Fᵀ)⁻¹`` of them."""
    moments, x, original = _drifted()
    grid, w = registry.parse_grid("int4-channel-sym"), _weight(out=8)
    hessian = x.T @ x
    hessian = hessian + DAMP * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    places = torch.arange(IN) if order == "natural" else moments.square.argsort(descending=True, stable=True)
    drift = (original - x).T @ x
    shifted = w.double().clone()
    for j, column in enumerate(places.tolist()):
        behind = places[j + 1 :]
        pull = drift[column, behind] @ hessian[behind][:, behind].inverse()
        shifted[:, behind] += share * w.double()[:, column : column + 1] * pull
    theirs = _textbook(shifted.float(), grid, moments, places)
    ours = _solve(grid, w, moments, order=order, asymmetric=share).quantized.dense()
    _agree(ours, theirs, shifted.float(), moments)


def test_asymmetric_calibration_comes_closer_to_the_original_output():
    moments, x, original = _drifted()
    grid, w = registry.parse_grid("int4-g64-asym"), _weight()
    wanted = original @ w.double().T

    def missed(share: float) -> float:
        value = _solve(grid, w, moments, asymmetric=share).quantized.dense().double()
        return float((x @ value.T - wanted).square().sum())

    assert missed(1.0) < 0.8 * missed(0.25) < 0.8 * missed(0.0)


@pytest.mark.parametrize("text", ["int4-g32-asym", "q4_k", "e8p"])
def test_without_a_drift_asymmetric_is_plain_bit_for_bit(text: str):
    grid, w, moments = registry.parse_grid(text), _weight(), _moments()
    still = replace(moments, cross=torch.zeros(IN, IN))
    ours = _solve(grid, w, still, asymmetric=0.25).quantized
    plain = _solve(grid, w, moments).quantized
    assert torch.equal(ours.codes, plain.codes)
    assert all(torch.equal(ours.params[k], plain.params[k]) for k in plain.params)
    with pytest.raises(Refused, match="original model"):
        _solve(grid, w, moments, asymmetric=0.25)
    with pytest.raises(ValueError, match="share"):
        Gptq(asymmetric=1.5)
