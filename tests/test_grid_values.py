"""Values and codes of single grids against arithmetic done another way: torch's casts, brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.core.registry import parse_grid
from bitmill.numerics import e8, floats
from bitmill.numerics.search import _PRECISION, _rounded, stored

FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _weight(out: int = 32, columns: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def _importance(columns: int = 256) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 3 + 0.01


def _error(text: str, w: Tensor, u: Tensor | None, measure: Tensor) -> float:
    return float((measure.double() * (parse_grid(text).round(w, u).dense().double() - w) ** 2).sum())


@pytest.mark.parametrize("name", FP8)
def test_the_arithmetic_of_elements_is_that_of_torch(name: str):
    """Every finite code, every midpoint between two, and random values of all sizes."""
    generic = floats.Element("", *(getattr(floats.ELEMENTS[name], k) for k in _FIELDS))
    values = torch.arange(256, dtype=torch.uint8).view(FP8[name]).float()
    values = values[values.isfinite()]
    between = (values[1:] + values[:-1]) / 2
    rng = torch.Generator().manual_seed(0)
    sizes = 10 ** (torch.rand(100_000, generator=rng) * 8 - 5)
    x = torch.cat((values, between, torch.randn(100_000, generator=rng) * sizes))
    theirs = x.clamp(-generic.largest, generic.largest).to(FP8[name]).view(torch.uint8)
    assert torch.equal(floats.encode(x, generic), theirs)
    assert torch.equal(floats.encode(x, floats.ELEMENTS[name]), theirs)
    assert torch.equal(floats.decode(theirs, generic), theirs.view(FP8[name]).float())
    assert torch.equal(floats.decode(theirs, floats.ELEMENTS[name]), floats.decode(theirs, generic))


_FIELDS = ("exponent", "mantissa", "bias", "largest")


def test_fp4_magnitudes_and_ties():
    e2m1 = floats.ELEMENTS["e2m1"]
    assert floats.decode(torch.arange(8), e2m1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 100.0])
    assert floats.round_to(ties, e2m1).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert floats.encode(-ties, e2m1).tolist() == [8, 10, 10, 12, 12, 14, 14, 15]


@pytest.mark.parametrize(
    ("name", "largest", "smallest"), [("e2m3", 7.5, 0.125), ("e3m2", 28.0, 0.0625), ("e4m3", 448.0, 2.0**-9)]
)
def test_ranges_of_elements(name: str, largest: float, smallest: float):
    element = floats.ELEMENTS[name]
    assert floats.round_to(torch.tensor([1e9, -1e9]), element).tolist() == [largest, -largest]
    assert floats.round_to(torch.tensor([smallest, smallest * 0.49]), element).tolist() == [smallest, 0]


def test_powers_of_two():
    assert floats.power_of_two(torch.tensor([0, 1, 127, 254])).tolist() == [2.0**-127, 2.0**-126, 1, 2.0**127]
    assert bool(floats.power_of_two(torch.tensor([255])).isnan())


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_the_search_rounds_scales_like_torch(dtype: str):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(4000, generator=rng) * 10 ** (torch.rand(4000, generator=rng) * 14 - 9)
    one_by_one = torch.tensor([_rounded(float(v), _PRECISION[dtype]) for v in x])
    assert torch.equal(one_by_one, stored(x, dtype))


def test_symmetric_and_asymmetric_plain_rules():
    w = torch.tensor([[-0.75, 0.3, 0.75, 0.0], [0.2, 1.5, 0.4, 0.9]])
    sym = parse_grid("int4-channel-sym-sf32").fit(w)
    assert torch.allclose(sym["scale"], torch.tensor([[0.1], [0.2]]))
    asym = parse_grid("int4-channel-asym-sf32")
    params = asym.fit(w)
    assert torch.allclose(params["scale"], torch.tensor([[0.1], [0.1]]))
    assert params["zero"].tolist() == [[8.0], [0.0]]  # 7.5 to even
    floor = parse_grid("int4-channel-asym-sf32-z1").fit(w)
    assert floor["zero"].tolist() == [[8.0], [1.0]]
    assert torch.allclose(floor["scale"][1], torch.tensor(1.5 / 14))


@pytest.mark.parametrize(
    "text",
    [
        *(f"int{b}-g64-{z}" for b in (2, 3, 4, 8) for z in ("sym", "asym", "fz")),
        "int4-g32-asym-sbf16-z1",
        "int4-tensor-asym",
        "int8-channel-sym",
        *("fp8-e4m3-channel", "fp8-e4m3-b128", "fp4-e2m1-channel", "mxfp4", "mxfp6-e2m3", "mxfp8", "nvfp4"),
        *("nf4-b64", "nf4-b64-dq", "fp4-b64", "e8p"),
    ],
)
def test_the_weighted_search_never_loses_to_the_plain_rule(text: str):
    for seed in range(3):
        w = _weight(seed=seed)
        for u in (_importance(), torch.ones(256), torch.rand(32, 256) ** 4):
            assert _error(text, w, u, u) <= _error(text, w, None, u) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("int4-g64-asym", 0.9),
        ("int4-g128-sym", 0.8),
        ("int2-g32-sym", 0.5),
        ("nvfp4", 0.85),
        ("nf4-b64", 0.9),
    ],
)
def test_the_weighted_search_is_worth_it(text: str, ratio: float):
    w, u = _weight(64), _importance()
    assert _error(text, w, u, u) <= ratio * _error(text, w, None, u)


def test_no_asymmetric_range_on_a_dense_raster_beats_the_search():
    """Brute force over scale and zero, one group at a time: the search is within two per cent of its best."""
    w, u = _weight(8, 32), _importance(32)
    grid = parse_grid("int3-g32-asym-sf32")
    q = grid.round(w, u)
    found = (u * (q.dense() - w) ** 2).sum(1)
    span = (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 7
    best = torch.full_like(found, torch.inf)
    for factor in torch.linspace(0.3, 1.1, 161):
        for zero in range(8):
            params = {"scale": span * factor, "zero": torch.full_like(span, float(zero))}
            value = grid.decode(grid.encode(w, params), params)
            best = torch.minimum(best, (u * (value - w) ** 2).sum(1))
    assert float(found.sum()) <= 1.02 * float(best.sum())


def test_nvfp4_gain_and_block_scales():
    w = _weight(4, 64)
    params = parse_grid("nvfp4").fit(w)
    assert torch.equal(params["gain"], 448 * 6 / w.abs().max())
    blocks = w.reshape(4, 4, 16).abs().amax(-1) * params["gain"] / 6
    assert torch.equal(params["scale"], blocks.to(torch.float8_e4m3fn).float())


def test_mx_exponents_are_one_of_the_two_rules_whichever_errs_less():
    w = _weight(16, 128)
    grid = parse_grid("mxfp4")
    largest = w.reshape(16, 4, 32).abs().amax(-1)
    floor, ceil = largest.log2().floor() - 2 + 127, (largest / 6).log2().ceil() + 127
    exponent = grid.fit(w)["exponent"].float()
    assert bool(((exponent == floor) | (exponent == ceil)).all())
    errors = []
    for choice in (floor, ceil, exponent):
        params = {"exponent": choice.to(torch.uint8)}
        miss = (grid.decode(grid.encode(w, params), params) - w) ** 2
        errors.append(miss.reshape(16, 4, 32).sum(-1))
    assert bool((errors[2] <= torch.minimum(errors[0], errors[1]) * (1 + 1e-6)).all())


def test_arbitrary_levels_round_trip_and_bad_ones_are_refused():
    levels = ",".join(str(k / 7.5 - 1) for k in range(16))
    grid = parse_grid(f"levels({levels})-b32")
    assert parse_grid(str(grid)) == grid
    assert type(grid).parse("levels(0,1)-b32") is None
    assert type(grid).parse(f"levels({levels.replace('-1.0', '0.5')})-b32") is None


def test_the_lattice_codebook_is_whole():
    book = e8.decode(torch.arange(2**16))
    assert len(book.unique(dim=0)) == 2**16
    assert bool(((book - 0.25).sum(1) % 2 == 0).all())
    sizes = e8.patterns()
    norms = sizes.square().sum(1)
    assert [int((norms == n).sum()) for n in (2, 4, 6, 8, 10, 12)] == [1, 8, 28, 64, 126, 29]
    assert torch.equal(e8.encode(book).to(torch.int64), torch.arange(2**16))


def test_the_nearest_lattice_point_is_exact():
    book = e8.decode(torch.arange(2**16)).double()
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(600, 8, generator=rng) * 3 * torch.rand(600, 1, generator=rng)
    found = (book[e8.encode(x).long()] - x).square().sum(1)
    best = torch.cdist(x.double(), book).amin(1).square()
    assert torch.allclose(found, best, rtol=1e-5, atol=1e-5)


def test_two_bits_of_lattice_on_a_gaussian():
    w = _weight(64, 512) * 20
    error = (parse_grid("e8p").round(w).dense() - w).square().mean() / w.square().mean()
    assert error <= 0.093
    scalar = (parse_grid("int2-channel-sym").round(w, torch.ones(512)).dense() - w).square().mean()
    assert error <= 0.85 * scalar / w.square().mean()
