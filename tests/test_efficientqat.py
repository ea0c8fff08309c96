"""Block-AP: derivatives against autograd, layers and blocks against plain rounding, both stages together."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitmill import mill
from bitmill.core import registry
from bitmill.core.axes import ScalarGrid
from bitmill.core.errors import Interrupted, Refused
from bitmill.core.types import Moments, Problem
from bitmill.grids.integer import Integer
from bitmill.numerics.adam import Adam
from bitmill.numerics.learned import Learned
from bitmill.solvers.efficientqat import EfficientQat
from bitmill.source import open_source
from tests.tiny import make_model, tokens

GRIDS = ("int2-g32-asym", "int3-g64-asym", "int4-g128-sym", "nvfp4", "nf4-b64", "q2_k", "q4_k", "q4_0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def _weight(seed: int = 0) -> Tensor:
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed))
    w[0, 5] = 4.0
    return w


def _gram(seed: int = 1) -> Moments:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 8, generator=rng) @ torch.randn(8, 256, generator=rng)
    x += torch.randn(512, 256, generator=rng)
    return Moments(512, x.square().sum(0), x.abs().sum(0), x.abs().amax(0), x.T @ x)


def _straight(x: Tensor, amplitude: float = 0.0) -> Tensor:
    """Rounded, with StableQAT's derivative, as its authors write it; at 0, that of the identity."""
    turned = torch.cos(math.pi * (x + x.round()))
    through = 2 / (1 + math.sqrt(2) * math.pi * amplitude * turned) - 1
    return x.round().detach() + through.detach() * (x - x.detach())


@pytest.mark.parametrize("amplitude", [0.0, 0.21])
@pytest.mark.parametrize("seed", range(3))
def test_slopes_are_those_that_autograd_finds(seed: int, amplitude: float) -> None:
    """A whole-number grid with free ends, written out: weights, and both ends of each range."""
    grid, w, rng = Integer(bits=2, group=32, zero="fz", scale="f32"), _weight(seed), torch.Generator()
    gradient = torch.randn(w.shape, generator=rng.manual_seed(seed))
    state = Learned.of(w, grid, grid.fit(w))
    high, low = (0.6 + 0.6 * torch.rand(state.high.shape, generator=rng) for _ in range(2))
    ones = torch.zeros_like(w)
    state = Learned(w, grid, state.start, ones, high, low, state.top, state.bottom, True, True)
    leaves = [t.clone().requires_grad_() for t in (w, high, low)]
    v, a, b = leaves[0], *(t.repeat_interleave(32, 1) for t in leaves[1:])
    top, bottom = (t.repeat_interleave(32, 1) for t in (state.top, state.bottom))
    scale = (a * top - b * bottom) / 3
    code = (_straight((v - b * bottom) / scale, amplitude)).clamp(0, 3)
    value = code * scale + b * bottom
    (value * gradient).sum().backward()
    params = state.params()
    quantized = state.quantized(params).dense()
    by_weight, by_high, by_low = state.slopes(gradient, quantized, params, amplitude)
    assert leaves[0].grad is not None
    same = (by_weight == leaves[0].grad) | (by_weight - leaves[0].grad).abs().lt(1e-5)
    assert same.float().mean() > 0.999  # a value on the very edge of its range may fall on either side
    for ours, leaf, factor in ((by_high, leaves[1], high), (by_low, leaves[2], low)):
        assert leaf.grad is not None
        both = torch.stack([ours.flatten(), (leaf.grad * factor).flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.999
        assert float(both[0].norm() / both[1].norm()) == pytest.approx(1, abs=0.02)


def test_adam_is_torchs() -> None:
    rng = torch.Generator().manual_seed(0)
    ours = torch.randn(5, generator=rng)
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99), eps=1e-12)
    adam = Adam.of({"x": ours})
    for _ in range(20):
        gradient = torch.randn(5, generator=rng)
        theirs.grad = gradient.clone()
        optimizer.step()
        adam = adam.seen({"x": gradient})
        ours = ours - 0.01 * adam.direction("x")
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", GRIDS)
def test_a_layers_own_error_falls(text: str) -> None:
    grid, w, moments = registry.parse_grid(text), _weight(), _gram()
    assert moments.gram is not None

    def loss(value: Tensor) -> float:
        return float((((value - w) @ moments.gram) * (value - w)).sum())

    [solution] = EfficientQat(steps=200).solve([Problem("w", "q", w, moments)], [grid])
    ratio = loss(solution.quantized.dense()) / loss(grid.round(w, moments.importance).dense())
    assert ratio < 0.7
    assert solution.notes[0].value == pytest.approx(ratio, rel=1e-3)


def test_ranges_may_stay() -> None:
    grid, w, moments = registry.parse_grid("int3-g32-asym"), _weight(), _gram()
    [solution] = EfficientQat(steps=50, ranges=False).solve([Problem("w", "q", w, moments)], [grid])
    plain = grid.round(w, moments.importance)
    torch.testing.assert_close(solution.quantized.params["scale"], plain.params["scale"], rtol=2e-3, atol=0)


@pytest.mark.parametrize("grid", ["int2-g32-asym", "nvfp4"])
def test_a_block_comes_closer_than_rounding_leaves_it(grid: str, model: Path, tmp_path: Path) -> None:
    report = mill.quantize(
        str(model), f"efficientqat(steps=80) : {grid} > bitmill", tmp_path / "out", calib=tokens(64, 48)
    )
    gains = {note.where: note.value for note in report.notes if note.kind == "learned"}
    assert set(gains) == {"block 0", "block 1", "block 2"}
    values = [gain for gain in gains.values() if gain is not None]
    assert len(values) == 3 and max(values) <= 1 and min(values) < 0.95


def test_both_stages_beat_one_and_resume(model: Path, tmp_path: Path) -> None:
    ids = tokens(32, 32)
    known = "efficientqat(steps=20) + tune(steps=10, rate=0.004) : int2-g64-asym > gptq(version=2)"

    def stop(event: str) -> None:
        if event == "block 1: journaled":
            raise KeyboardInterrupt

    whole = mill.quantize(str(model), known, tmp_path / "whole", calib=ids)
    assert whole.tuning["least"] < whole.tuning["first"]
    with pytest.raises(Interrupted):
        mill.quantize(str(model), known, tmp_path / "parts", calib=ids, boundary=stop)
    assert mill.quantize(str(model), known, tmp_path / "parts", calib=ids).resumed == 3
    ours, theirs = (open_source(str(tmp_path / name)) for name in ("parts", "whole"))
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in theirs.tensors)


@pytest.mark.parametrize("options", ["steps=0", "batch=0", "rate=2", "amplitude=0.3"])
def test_options_that_teach_nothing_are_refused(options: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=options.partition("=")[0]):
        mill.quantize(str(model), f"efficientqat({options}) : int4-g32 > bitmill", tmp_path / "out")


def test_points_have_no_steps_to_train_by(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="use gptq"):
        mill.quantize(str(model), "efficientqat : e8p > bitmill", tmp_path / "out", calib=tokens())


@pytest.mark.parametrize("grid", ["int2-g32-asym", "int3-g64-sym"])
def test_a_wave_for_a_derivative_learns_too(grid: str) -> None:
    w, moments = _weight(), _gram()
    assert moments.gram is not None
    found = []
    for amplitude in (0.0, 0.21):
        solver = EfficientQat(steps=60, amplitude=amplitude)
        [solution] = solver.solve([Problem("w", "q", w, moments)], [registry.parse_grid(grid)])
        error = solution.quantized.dense() - w
        found.append(float(((error @ moments.gram) * error).sum()))
        [note] = [note for note in solution.notes if note.kind == "learned"]
        assert note.value is not None and note.value < 0.8
    assert found[0] != found[1] and found[1] < 1.5 * found[0]


@pytest.mark.parametrize("text", ["int4-g32-asym", "int3-channel-sym", "nf4-b64", "fp8-e4m3-b128", "mxfp4"])
def test_compiled_slopes_are_those_that_torch_finds(text: str) -> None:
    """A wave without height is the identity, and goes by torch; also where the last blocks are short."""
    grid, rng = registry.parse_grid(text), torch.Generator().manual_seed(1)
    assert isinstance(grid, ScalarGrid)
    w = torch.randn(200, 192, generator=rng)
    state = Learned.of(w, grid, grid.fit(w))
    offset = torch.rand(w.shape, generator=rng) - 0.5
    state = replace(state, offset=offset, high=0.8 * state.high, low=0.7 * state.low)
    params = state.params()
    value, gradient = state.quantized(params).dense(), torch.randn(w.shape, generator=rng)
    compiled, plain = (state.slopes(gradient, value, params, height) for height in (0.0, 1e-30))
    assert 0 < int((compiled[0] == 0).sum()) < w.numel()
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
