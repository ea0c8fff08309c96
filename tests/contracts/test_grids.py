"""The laws of a grid, run over every member the registry finds and every example it gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.core import registry
from bitmill.core.axes import Grid, ScalarGrid
from bitmill.core.types import Params

MEMBERS = registry.members("grids")
GRIDS = [grid for cls in MEMBERS.values() for grid in cls.examples()]
SCALARS = [grid for grid in GRIDS if isinstance(grid, ScalarGrid)]

every = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_scalar = pytest.mark.parametrize("grid", SCALARS, ids=str)

OUT, IN = 16, 512
TERNARY = ("tq1_0", "tq2_0", "ternary-tensor", "ternary-tensor-sf32")
LOUD = ("iq1_s", "iq1_m", "iq2_xxs")
"""In llama.cpp's files silent runs beside a loud one get the smallest scale, which is not 0."""
SIZE = {"nvfp4-flat": 1024.0}
"""Without a factor for the whole tensor, block scales of small weights are few and far between, or 0."""
ORDERS = {"spqr3-g16-o1-act": 16 * IN}
"""Bits of an order of columns, which all rows share."""
PUBLISHED_BPW = {
    "f32": 32.0,
    "bf16": 16.0,
    "int4-g128-sym": 4.125,
    "int4-g64-asym": 4.3125,
    "int4-g64-fz": 4.5,
    "int4-g128-qoq": 4.125 + 16 / IN,
    "int3-r16-fz": 5.0,
    "int8-channel-sym-sf32": 8.0625,
    "llm-int8": 8.0625,
    "q4_0": 4.5,
    "q4_1": 5.0,
    "q8_0": 8.5,
    "q2_k": 2.625,
    "q3_k": 3.4375,
    "q4_k": 4.5,
    "q5_k": 5.5,
    "q6_k": 6.5625,
    "iq1_s": 1.5625,
    "iq1_m": 1.75,
    "iq2_xxs": 2.0625,
    "iq2_xs": 2.3125,
    "iq2_s": 2.5625,
    "iq3_xxs": 3.0625,
    "iq3_s": 3.4375,
    "iq4_nl": 4.5,
    "iq4_xs": 4.25,
    "tq1_0": 1.6875,
    "tq2_0": 2.0625,
    "mxfp4": 4.25,
    "mxfp4-floor": 4.25,
    "nvfp4-flat": 4.5,
    "mxfp6-e2m3": 6.25,
    "mxfp8": 8.25,
    "nvfp4": 4.5 + 32 / (OUT * IN),
    "fp8-e4m3-channel": 8.0625,
    "nf4-b64": 4.5,
    "nf4-b64-dq": 4.125 + 2 * 32 / (OUT * IN),
    "e8p": 2.0625,
    "spqr3-g16-o1": 3.625 + 32 * (82 + OUT + 1) / (OUT * IN),
}


def _weight(seed: int = 0, out: int = OUT, columns: int = IN) -> Tensor:
    """Rows of unlike size, a few outliers, a shifted block, a zero block, exact zeros."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(out, columns, generator=rng) * torch.logspace(-3, 0, out)[:, None]
    w[torch.rand(out, columns, generator=rng) < 0.005] *= 8
    w[1 % out, :64] += 3 * w[1 % out].std()
    w[2 % out, :256] = 0
    w[:, -3] = 0
    return w


def _rows(grid: Grid, few: int) -> int:
    """A few rows where they can be stored, else as many as usual."""
    return few if grid.refuses((few, IN)) is None else OUT


def _importance(seed: int = 1) -> Tensor:
    u = torch.rand(IN, generator=torch.Generator().manual_seed(seed)) ** 4
    u[5], u[-1] = 40.0, 0.0
    return u


def _value(grid: Grid, w: Tensor, params: Params) -> Tensor:
    return grid.decode(grid.encode(w, params), params)


def _miss(grid: Grid, w: Tensor, value: Tensor) -> Tensor:
    """Squared error of what is encoded together."""
    rows, columns = grid.span
    square = (value.double() - w.double()) ** 2
    return square.unfold(0, rows, rows).unfold(1, columns, columns).sum((-1, -2))


def test_every_file_of_the_axis_is_found():
    assert {"dense", "integer", "kquant", "minifloat", "table", "lattice"} <= set(MEMBERS)
    assert {"iquant", "nonlinear", "ggml_floats"} <= set(MEMBERS)


@every
def test_text_is_canonical_and_belongs_to_one_member(grid: Grid):
    assert type(grid).parse(str(grid)) == grid
    assert registry.parse_grid(str(grid)) == grid
    assert registry.parse_grid(f"  {str(grid).upper()} ") == grid
    assert [name for name, cls in MEMBERS.items() if cls.parse(str(grid)) is not None] == [
        name for name, cls in MEMBERS.items() if cls is type(grid)
    ]


@pytest.mark.parametrize(
    "text", ["", "int4", "int9-g64", "int4-g0-sym", "int4-g64-", "fp4", "nf4-b0", "q9_k"]
)
def test_a_text_that_names_nothing_is_no_grid(text: str):
    assert [cls.parse(text) for cls in MEMBERS.values()] == [None] * len(MEMBERS)


@every
def test_round_is_fit_and_encode(grid: Grid):
    """``round`` may keep codes of its search (llama.cpp's, to the byte); those of ``encode`` are as near or
    nearer, and not by much. (Searches in codebooks look around a point, and weigh what is large.)"""
    w = _weight()
    for importance in (None, _importance()):
        whole = grid.round(w, importance)
        params = grid.fit(w, importance)
        assert whole.params.keys() == params.keys()
        assert all(torch.equal(whole.params[k], params[k]) for k in params)
        nearest, kept = _miss(grid, w, _value(grid, w, params)), _miss(grid, w, whole.dense())
        assert (nearest <= kept * (1 + 1e-6) + 1e-15).all()
        assert kept.sum() <= nearest.sum() * (1.05 if grid.span == (1, 1) else 2)


@every
def test_shapes_and_types_of_what_comes_back(grid: Grid):
    q = grid.round(_weight())
    rows, columns = grid.span
    assert q.grid == grid
    assert q.shape == (OUT, IN)
    assert q.codes.shape == (OUT // rows, IN // columns)
    assert q.dense().dtype == torch.float32
    assert q.dense().shape == (OUT, IN)
    assert all(p.dtype in (torch.float32, torch.uint8, torch.int8, torch.int32) for p in q.params.values())


@every
def test_what_is_stored_is_a_fixed_point(grid: Grid):
    params = grid.fit(_weight())
    once = _value(grid, _weight(3), params)
    assert torch.equal(_value(grid, once, params), once)


@every
def test_no_other_codes_are_nearer(grid: Grid):
    """Whatever codes a moved weight gets, they were no better for the weight where it was."""
    w = _weight(out=_rows(grid, 6))
    rng = torch.Generator().manual_seed(7)
    size = w.std(1, keepdim=True)
    for importance in (None, _importance()):
        params = grid.fit(w, importance)
        best = _miss(grid, w, _value(grid, w, params))
        for k in range(24):
            move = torch.randn(w.shape, generator=rng) * size * 2.0 ** (k % 12 - 9)
            other = _miss(grid, w, _value(grid, w + move, params))
            assert (best <= other * (1 + 1e-4) + 1e-14 * size**2).all()


@every_scalar
def test_no_reachable_code_is_nearer(grid: ScalarGrid):
    """Brute force: every code that any value reaches, at every weight."""
    w = _weight(out=_rows(grid, 4))
    params = grid.fit(w)
    if grid.encode(w, params).is_floating_point():
        return
    sweep = torch.linspace(-4, 4, 4 * IN).sinh()
    codes = [grid.encode((part * w.abs().amax(1, keepdim=True) / 20), params) for part in sweep.split(IN)]
    best = (_value(grid, w, params).double() - w).abs()
    for code in torch.cat(codes).unique():
        other = grid.decode(code.expand(w.shape).contiguous(), params)
        assert (best <= (other.double() - w).abs() * (1 + 1e-4) + 1e-12).all()


@every
def test_a_slice_of_columns_gets_the_codes_it_has_in_the_whole(grid: Grid):
    w = _weight()
    params = grid.fit(w, _importance())
    codes, value = grid.encode(w, params), _value(grid, w, params)
    width = grid.span[1]
    for a, b in [(0, width), (8, 16), (56, 72), (128, 256), (200, 512), (IN - width, IN)]:
        part = grid.encode(w[:, a:b], params, at=a)
        assert torch.equal(part, codes[:, a // width : b // width])
        assert torch.equal(grid.decode(part, params, at=a), value[:, a:b])


@every
def test_memory_layout_does_not_matter_and_input_is_left_alone(grid: Grid):
    w = _weight()
    kept, spread = w.clone(), w.t().contiguous().t()
    u = torch.stack((_importance(), _importance()), 1)[:, 0]
    a, b = grid.round(w, _importance()), grid.round(spread, u)
    assert torch.equal(w, kept)
    assert torch.equal(a.codes, b.codes)
    codes = a.codes.t().contiguous().t()
    assert torch.equal(grid.decode(codes, a.params), a.dense())
    assert torch.equal(a.codes, b.codes)


@every
def test_the_same_weight_gets_the_same_codes(grid: Grid):
    a, b = grid.round(_weight(), _importance()), grid.round(_weight(), _importance())
    assert torch.equal(a.codes, b.codes)
    assert a.same_values(b)


@every
def test_zero_weights_stay_zero(grid: Grid):
    for importance in (None, torch.ones(IN), torch.zeros(IN)):
        q = grid.round(torch.zeros(OUT, IN), importance)
        assert not q.dense().any()
        assert all(bool(p.to(torch.float32).isfinite().all()) for p in q.params.values())


@every
@pytest.mark.parametrize("kind", ["constant", "negative", "positive", "one", "tiny", "dead"])
def test_degenerate_rows_stay_finite_and_near(grid: Grid, kind: str):
    w = _weight()
    importance = None
    if kind == "constant":
        w = torch.full_like(w, 0.37)
    elif kind in ("negative", "positive"):
        w = (w.abs() + 0.01) * (1 if kind == "positive" else -1)
    elif kind == "one":
        w = torch.zeros_like(w)
        w[:, 17] = -2.0
    elif kind == "tiny":
        w = w * 1e-12
    else:
        importance = torch.zeros(IN)
    q = grid.round(w, importance)
    value = q.dense()
    assert bool(value.isfinite().all())
    assert all(bool(p.to(torch.float32).isfinite().all()) for p in q.params.values())
    if not (kind == "one" and str(grid) in LOUD):
        assert float((value - w).norm()) <= 1.001 * float(w.norm())
    if grid.span == (1, 1) and str(grid) not in TERNARY and kind in ("constant", "positive", "negative"):
        assert float((value - w).norm()) <= 0.5 * float(w.norm())


@every
@pytest.mark.parametrize("matrix", [False, True], ids=["channel", "weight"])
def test_the_weighted_fit_is_no_worse_in_weighted_error(grid: Grid, matrix: bool):
    w = _weight()
    for u in (_importance(), torch.ones(IN), _importance(4) * 1e-9):
        shaped = u.expand(OUT, IN).contiguous() if matrix else u
        plain = (u.double() * (grid.round(w).dense().double() - w) ** 2).sum()
        searched = (u.double() * (grid.round(w, shaped).dense().double() - w) ** 2).sum()
        assert searched <= plain * 1.005  # another tool's search may weigh errors a little otherwise


@every
def test_size_is_what_is_published_and_grows_with_rows(grid: Grid):
    bits = grid.storage_bits((OUT, IN))
    assert isinstance(bits, int)
    codes = grid.round(_weight()).codes
    if not codes.is_floating_point():
        assert bits >= codes.numel() * len(codes.unique()).bit_length() - codes.numel()
    assert grid.storage_bits((2 * OUT, IN)) <= 2 * bits
    assert grid.storage_bits((2 * OUT, IN)) >= 2 * bits - 256 - ORDERS.get(str(grid), 0)
    if str(grid) in PUBLISHED_BPW:
        assert bits == PUBLISHED_BPW[str(grid)] * OUT * IN


def test_published_sizes_cover_examples():
    assert len(PUBLISHED_BPW.keys() & {str(g) for g in GRIDS}) >= 16


@every
@pytest.mark.parametrize("shape", [(3, 5), (4, 96), (2, 256), (1, 1), (5, 32), (130, 200)])
def test_what_is_not_refused_is_stored(grid: Grid, shape: tuple[int, int]):
    reason = grid.refuses(shape)
    if reason is not None:
        assert len(reason) > 20
        assert str(shape[1]) in reason
        return
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for importance in (None, torch.rand(shape[1], generator=torch.Generator().manual_seed(3))):
        q = grid.round(w, importance)
        assert q.dense().shape == shape
        assert float((q.dense() - w).norm()) <= float(w.norm())
    assert grid.storage_bits(shape) > 0


@every
def test_vectors_and_ragged_rows_are_refused_with_a_reason(grid: Grid):
    if grid.block[1] > 1:
        ragged = grid.refuses((OUT, 8 * grid.block[1] + 1))
        assert grid.block[0] > 1 or (
            ragged is not None and ("multiple" in ragged or "whole blocks" in ragged)
        )
    vector = grid.refuses((IN,))
    assert grid.block == (1, 1) or (vector is not None and len(vector) > 20)


@every
def test_rows_can_be_permuted(grid: Grid):
    if grid.block[0] != 1:
        return
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(5))
    q = grid.round(_weight(), _importance())
    assert torch.equal(q.rows(order).dense(), q.dense()[order])
    if not q.codes.is_floating_point():
        assert torch.equal(grid.round(_weight()[order], _importance()).dense(), q.dense()[order])


@every_scalar
def test_a_range_scaled_by_one_is_the_same_range(grid: ScalarGrid):
    w = _weight()
    params = grid.fit(w)
    same = grid.scaled(params, torch.ones(()))
    assert same.keys() == params.keys()
    assert all(torch.equal(same[k], params[k]) for k in params)


@every_scalar
def test_a_narrower_range_holds_smaller_values(grid: ScalarGrid):
    w = _weight() * SIZE.get(str(grid), 1)
    params = grid.fit(w)
    half = grid.scaled(params, torch.full((1, 1), 0.5))
    rows = (1,) if grid.block[0] == 1 else (0, 1)
    full_range = _value(grid, 1e6 * w, params).abs().amax(rows)
    half_range = _value(grid, 1e6 * w, half).abs().amax(rows)
    assert (half_range <= 0.76 * full_range).all()
    assert (half_range >= 0.24 * full_range).all()


@every_scalar
def test_steps_are_distances_between_neighbours(grid: ScalarGrid):
    w = _weight() * SIZE.get(str(grid), 1)
    params = grid.fit(w)
    step = grid.step(params, 0, IN)
    assert step.shape in ((OUT, IN), (1, IN))
    assert bool(step.isfinite().all())
    assert bool((step >= 0).all())
    assert torch.equal(grid.step(params, 40, 48), step[:, 40:88])
    inside = (_value(grid, w / 2, params) - w / 2).abs()
    most = 0.85 if "ternary" in str(grid) else 0.95  # a mean is in the middle: more lies outside of it
    assert (inside <= step * 0.5001 + 1e-7).double().mean() > most
