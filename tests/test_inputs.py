"""Input grids: their names, their rounding against a loop over tokens, and a model run with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitmill.calibrate.stream import Stream
from bitmill.core.errors import BadRecipe, Refused
from bitmill.core.inputs import EXAMPLES, InputGrid, find_inputs, parse_inputs
from bitmill.core.types import Inputs, Moments
from bitmill.numerics import llm_int8
from bitmill.numerics.inputs import fixed_params, rounded
from bitmill.numerics.linear_maps import Diagonal, Permutation
from bitmill.source import open_source
from tests.tiny import make_model, tokens

GRIDS = [parse_inputs(text) for text in EXAMPLES if text != "llm-int8"]  # which leaves channels out
LEVELS = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [m / 8 for m in range(16)]
    + [2 * m / 8 for m in range(8, 16)]
    + [4 * m / 8 for m in range(8, 16)],
}
every = pytest.mark.parametrize("grid", GRIDS, ids=str)


def activations(seed: int = 0) -> Tensor:
    """Two sequences of five tokens: a loud channel, a silent one, a token of zeros, a block of zeros."""
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(seed))
    x[..., 7] *= 40
    x[..., 3] = 0
    x[0, 2] = 0
    x[1, 1, 128:160] = 0
    return x


def fixed_by(grid: InputGrid, x: Tensor) -> dict[str, Tensor]:
    return dict(fixed_params(grid, x.min(), x.max(), torch.float32))


def element(grid: InputGrid, value: float) -> float:
    """The nearest of an element's values: by a table, or by torch's own eight bits."""
    if grid.element == "e4m3":
        return float(torch.tensor(max(-448.0, min(448.0, value))).to(torch.float8_e4m3fn))
    levels = LEVELS[grid.element]
    size = min(abs(value), levels[-1])
    best = min(range(len(levels)), key=lambda i: (abs(levels[i] - size), i % 2))
    return levels[best] * (-1 if value < 0 else 1)


def one(grid: InputGrid, values: list[float], gain: float) -> list[float]:
    """A run of values that share a scale, as the paragraph of the specification says it."""
    largest = max(abs(v) for v in values)
    if largest == 0:
        return [0.0] * len(values)
    if grid.scaling == "bitnet":
        return [min(max(round(v * 127 / largest), -128), 127) * largest / 127 for v in values]
    if grid.element == "int":
        top = 2**grid.bits - 1
        if grid.symmetric:
            scale, zero = largest / (top / 2), 0
        else:
            low, high = min(0.0, *values), max(0.0, *values)
            scale = (high - low) / top
            zero = round(-(2 ** (grid.bits - 1)) - low / scale)
        ends = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
        return [(min(max(round(v / scale + zero), ends[0]), ends[1]) - zero) * scale for v in values]
    top = {"e4m3": 448.0, "e2m3": 7.5, "e2m1": 6.0}[grid.element]
    scale = largest / top
    if grid.scaling == "mx":
        power = 0
        while 2.0**power > largest:
            power -= 1
        while 2.0 ** (power + 1) <= largest:
            power += 1
        power += largest / 2.0**power >= (1.9375 if grid.element == "e2m3" else 1.75)
        scale = 2.0 ** (power - {"e4m3": 8, "e2m3": 2, "e2m1": 2}[grid.element])
    if grid.scaling == "ceil":
        scale = 2.0**-126
        while 448 * scale < largest:
            scale *= 2
    if grid.scaling == "nv":
        scale = element(InputGrid("e4m3", 8, "token"), scale * gain) / gain
    return [element(grid, v / scale) * scale for v in values]


@every
def test_rounding_is_what_a_loop_over_tokens_does(grid: InputGrid) -> None:
    x = activations().double().float()
    fixed = fixed_by(grid, x)
    gain = float(fixed["gain"]) if "gain" in fixed else 1.0
    expected = torch.empty(x.shape, dtype=torch.float64)
    for s, sequence in enumerate(x):
        if grid.extent == "tensor":
            seen = x if grid.static else sequence
            whole = one(grid, seen.flatten().tolist(), gain)
            expected[s] = torch.tensor(whole, dtype=torch.float64).reshape(seen.shape)[
                s if grid.static else ...
            ]
            continue
        for t, token in enumerate(sequence):
            width = grid.group or len(token)
            runs = [one(grid, token[a : a + width].tolist(), gain) for a in range(0, len(token), width)]
            expected[s, t] = torch.tensor([v for run in runs for v in run], dtype=torch.float64)
    found = rounded(grid, x, fixed).double()
    near = (found - expected).abs() <= 1e-5 * expected.abs() + 1e-9
    assert float(near.double().mean()) > 0.998  # the loop is in double precision: ties fall elsewhere


@every
def test_one_token_more_changes_no_other(grid: InputGrid) -> None:
    x = activations()
    fixed = fixed_by(grid, x)
    whole = rounded(grid, x, fixed)
    assert whole.shape == x.shape and torch.isfinite(whole).all()
    for s in range(2):
        assert torch.equal(rounded(grid, x[s : s + 1], fixed)[0], whole[s])
    if grid.extent != "tensor" or grid.static:
        assert torch.equal(rounded(grid, x[:, 1:3], fixed), whole[:, 1:3])
        assert torch.equal(rounded(grid, x.flatten(0, 1), fixed), whole.flatten(0, 1))
    assert torch.equal(rounded(grid, x, fixed), whole)
    assert rounded(grid, x.bfloat16(), fixed).dtype is torch.bfloat16
    assert torch.equal(rounded(grid, torch.zeros(1, 2, 256), fixed), torch.zeros(1, 2, 256))


@every
def test_with_fixed_scales_rounding_twice_is_rounding_once(grid: InputGrid) -> None:
    x = activations()
    if grid.static:
        once = rounded(grid, x, fixed_by(grid, x))
        assert torch.equal(rounded(grid, once, fixed_by(grid, x)), once)
    assert set(fixed_by(grid, x)) == set(grid.fixed)


def test_names_and_the_closest_of_them() -> None:
    for text in EXAMPLES:
        grid = parse_inputs(text)
        assert str(grid) == text and find_inputs(text) == grid
    same = {"int8-token-sym": "int8-token", "int4-g128": "int4-g128-token", "mxfp6": "mxfp6-e2m3"}
    same |= {"int8-tensor-asym-static": "int8-tensor-static-asym"}
    assert {text: str(parse_inputs(text)) for text in same} == same
    for wrong in ("int9-token", "int8", "fp8-e4m3-token-asym", "int8-tensor-static-static", "int8-g0-token"):
        assert find_inputs(wrong) is None
    with pytest.raises(BadRecipe, match="did you mean int8-token"):
        parse_inputs("int8-tokens")
    with pytest.raises(BadRecipe, match="one static scale serves a whole tensor"):
        parse_inputs("int8-token-static")
    assert parse_inputs("int4-g128-token").refuses(192) is not None
    assert parse_inputs("int4-g64-token").refuses(192) is None


def test_a_block_rounds_what_its_linears_multiply_and_watchers_see_it_before(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path)))
    path, grid = "mlp.down_proj", parse_inputs("int4-token")
    name = f"model.layers.1.{path}.weight"
    plain, rounding = Stream(source), Stream(source, inputs={name: Inputs(grid)})
    hidden, seen = plain.embed(tokens(2, 12)), []
    by_hand = plain.block(1).watched(hidden, {path: lambda x: rounded(grid, x, {})})
    block = rounding.block(1)
    assert torch.equal(block.watched(hidden, {path: lambda x: seen.append(x.clone())}), by_hand)
    assert torch.equal(block.forward(hidden), by_hand)
    assert not torch.equal(rounded(grid, seen[0], {}), seen[0])
    assert torch.equal(rounding.block(0).forward(hidden), plain.block(0).forward(hidden))
    stepped = hidden.clone()

    class Gate:
        def see(self, x: Tensor) -> None:
            assert not torch.equal(rounded(grid, x, {}), x)

        def close(self) -> None:
            block.inputs[path] = Inputs(grid)

    block.inputs.clear()
    block.in_step(stepped, {path: Gate()}, 1)  # what is set at a gate holds for what waits there
    torch.testing.assert_close(stepped, by_hand, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_rounded_is_not_run(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path)))
    for name, grid in (
        ("model.norm.weight", "int8-token"),
        ("model.layers.0.mlp.up_proj.weight", "int8-g96"),
    ):
        with pytest.raises(Refused, match=name):
            Stream(source, inputs={name: Inputs(parse_inputs(grid))})


def test_ranges_follow_the_channels_through_maps_and_sums() -> None:
    low, high = torch.tensor([-1.0, -4.0, 0.0]), torch.tensor([2.0, 3.0, 0.5])
    size = torch.maximum(-low, high)
    moments = Moments(4, size.square(), size, size, None, low, high, sample=low[None])
    assert [float(v) for v in moments.range or ()] == [-4.0, 3.0]
    mapped = Diagonal(torch.tensor([-2.0, 0.5, 1.0])).moments(moments)
    assert mapped.low is not None and mapped.low.tolist() == [-1.0, -8.0, 0.0]
    assert mapped.high is not None and mapped.high.tolist() == [0.5, 6.0, 0.5]
    assert mapped.sample is not None and mapped.sample.tolist() == [[0.5, -8.0, 0.0]]
    turned = Permutation(torch.tensor([2, 0, 1])).moments(moments)
    assert turned.low is not None and turned.low.tolist() == [0.0, -1.0, -4.0]
    assert moments.merged(mapped).range == (torch.tensor(-8.0), torch.tensor(6.0))
    assert Moments(4, size.square(), size, size).range == (torch.tensor(-4.0), torch.tensor(4.0))
    assert Moments(4, size.square()).range is None


def test_llm_int8_rounds_by_token_and_leaves_loud_channels() -> None:
    """Against its product on codes, sequence by sequence."""
    grid, x = parse_inputs("llm-int8"), activations()
    codes = torch.randint(-127, 128, (24, 256), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    absmax = torch.rand(24, generator=torch.Generator().manual_seed(2))
    made = rounded(grid, x, {})
    assert torch.equal(made[..., 7], x[..., 7]) and not torch.equal(made, x)
    for sequence, values in zip(x, made, strict=True):
        want = llm_int8.matmul(sequence, codes, absmax)
        torch.testing.assert_close(
            values @ llm_int8.decode(codes, absmax[:, None]).T,
            want,
            rtol=0,
            atol=1e-5 * float(want.abs().max()),
        )
    assert parse_inputs("llm-int8-0").threshold == 0
    assert not torch.equal(rounded(parse_inputs("llm-int8-0"), x, {})[..., 7], x[..., 7])
