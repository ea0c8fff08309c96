"""Learned rounding: derivatives against autograd, blocks against plain rounding, resume, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitmill import mill
from bitmill.calibrate.moments import load_moments
from bitmill.core import registry
from bitmill.core.axes import ScalarGrid
from bitmill.core.errors import Interrupted, Refused
from bitmill.core.learning import BlockTask
from bitmill.core.types import Moments, Problem
from bitmill.grids.integer import Integer
from bitmill.numerics.learned import Learned
from bitmill.numerics.lessons import Course
from bitmill.solvers.autoround import AutoRound
from bitmill.source import open_source
from tests.tiny import make_model, tokens

GRIDS = (
    "int4-g32-asym",
    "int3-g32-sym",
    "nf4-b64",
    "mxfp4",
    "nvfp4",
    "fp8-e4m3-channel",
    "q4_0",
    "q4_1",
    "q4_k",
    "q6_k",
)


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


def _straight(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


@pytest.mark.parametrize("seed", range(3))
def test_steps_are_those_of_the_straight_through_derivative(seed: int) -> None:
    """Written out for an integer grid with free ends, as the paper has it, and left to autograd."""
    grid, w, rng = Integer(bits=3, group=32, zero="fz", scale="f32"), _weight(seed), torch.Generator()
    gradient = torch.randn(w.shape, generator=rng.manual_seed(seed))
    start = grid.fit(w)
    state = Learned.of(w, grid, start)
    high, low = (0.7 + 0.3 * torch.rand(state.high.shape, generator=rng) for _ in range(2))
    offset = torch.rand(w.shape, generator=rng) - 0.5
    state = Learned(w, grid, start, offset, high, low, state.top, state.bottom, True, True)
    assert state.ends_apart and state.elastic
    leaves = [t.clone().requires_grad_() for t in (offset, high, low)]
    v, a, b = leaves[0], *(t.repeat_interleave(32, 1) for t in leaves[1:])
    top, bottom = (t.repeat_interleave(32, 1) for t in (state.top, state.bottom))
    scale = (a * top - b * bottom) / 7
    code = (_straight(w / scale + v - b * bottom / scale)).clamp(0, 7)
    value = code * scale + b * bottom
    (value * gradient).sum().backward()
    params = state.params()
    quantized = state.quantized(params).dense()
    torch.testing.assert_close(quantized, value.detach(), rtol=1e-4, atol=1e-4)
    moved = state.moved(gradient, quantized, params, 1e-3, ranges=True)
    for ours, before, leaf in zip(
        (moved.offset, moved.high, moved.low), (offset, high, low), leaves, strict=True
    ):
        large = leaf.grad.abs() > 1e-3 * leaf.grad.abs().max()  # type: ignore[union-attr]
        agree = (before - ours).sign() == leaf.grad.sign()  # type: ignore[union-attr]
        free = (before.abs() < 0.498) if ours is moved.offset else (before < 0.998)
        assert agree[large & free].float().mean() > 0.99


@pytest.mark.parametrize("text", GRIDS)
def test_it_starts_where_plain_rounding_ends(text: str) -> None:
    grid, w = registry.parse_grid(text), _weight()
    assert isinstance(grid, ScalarGrid)
    params = grid.fit(w)
    state = Learned.of(w, grid, params)
    torch.testing.assert_close(
        state.quantized(state.params()).dense(),
        grid.decode(grid.encode(w, params), params),
        rtol=0.02,
        atol=1e-6,
    )


@pytest.mark.parametrize("text", GRIDS)
def test_a_layers_own_error_falls(text: str) -> None:
    grid, w, moments = registry.parse_grid(text), _weight(), _gram()
    assert moments.gram is not None

    def loss(value: Tensor) -> float:
        return float((((value - w) @ moments.gram) * (value - w)).sum())

    [solution] = AutoRound(steps=100).solve([Problem("w", "q", w, moments)], [grid])
    plain = loss(grid.round(w, moments.importance).dense())
    ratio = loss(solution.quantized.dense()) / plain
    assert ratio < (0.7 if text != "fp8-e4m3-channel" else 1)  # steps grow with the values there
    assert solution.notes[0].value == pytest.approx(ratio, rel=1e-3)


def test_lessons_in_half_the_bits_point_the_same_way_and_are_judged_alike() -> None:
    grid, w, x = registry.parse_grid("int4-g32-asym"), _weight(), torch.randn(16, 24, 256)
    wanted = x @ w.T
    task = BlockTask(
        "block", [Problem("w", "q", w, _gram())], [grid], 16,
        lambda values, windows: torch.nn.functional.linear(x[windows], values[0]), wanted.__getitem__,
    )  # fmt: skip
    full, half = (Course.of_block(task, 4, 0, half) for half in (False, True))
    assert full.first == half.first
    found = [course.gradients([course.best[0].dense()]) for course in (full, half)]
    exact, rough = (one[0] for one in found if one is not None)
    assert exact is not None and rough is not None and rough.dtype == torch.float32
    assert float(torch.cosine_similarity(exact.flatten(), rough.flatten(), dim=0)) > 0.98


@pytest.mark.parametrize("grid", ["int2-g32-asym", "int4-g32-sym", "nf4-b64"])
def test_a_block_comes_closer_than_rounding_leaves_it(grid: str, model: Path, tmp_path: Path) -> None:
    ids = tokens(64, 48)
    learned, plain = (
        mill.quantize(str(model), f"{solver} : {grid} > bitmill", tmp_path / str(at), calib=ids)
        for at, solver in enumerate(("autoround(steps=100)", "nearest"))
    )
    gains = {note.where: note.value for note in learned.notes if note.kind == "learned"}
    assert set(gains) == {"block 0", "block 1", "block 2"}
    values = [gain for gain in gains.values() if gain is not None]
    assert len(values) == 3 and max(values) <= 1 and min(values) < 0.95  # the inputs differ, too: that stays
    assert set(learned.tensors) == set(plain.tensors)


def test_a_resumed_run_writes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    recipe, ids = "autoround(steps=5) : int4-g32-asym > compressed-tensors", tokens(8, 32)
    mill.quantize(str(model), recipe, tmp_path / "whole", calib=ids)

    def stop(event: str) -> None:
        if event == "block 1: journaled":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        mill.quantize(str(model), recipe, tmp_path / "parts", calib=ids, boundary=stop)
    assert mill.quantize(str(model), recipe, tmp_path / "parts", calib=ids).resumed == 3
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts_learn_too(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family)
    report = mill.quantize(
        str(model),
        "awq + autoround(steps=10) : int3-g32-asym > bitmill",
        tmp_path / "out",
        calib=tokens(8, 32),
    )
    gains = [note.value for note in report.notes if note.kind == "learned"]
    assert len(gains) == 3 and all(gain is not None and gain <= 1 for gain in gains)
    assert set(open_source(str(tmp_path / "out")).tensors) >= set(report.tensors)


def test_kept_moments_are_of_the_model_before_a_fold(model: Path, tmp_path: Path) -> None:
    """The first block's inputs are the same whatever is done to it, until its norms are folded."""
    ids, known = tokens(4, 32), {}
    for transform in ("", "awq + "):
        recipe = f"{transform}autoround(steps=1) : int4-g32-asym > bitmill"
        file = tmp_path / f"moments{len(known)}"
        mill.quantize(str(model), recipe, tmp_path / f"out{len(known)}", calib=ids, save=file)
        known[transform] = load_moments(file)[0]["model.layers.0.self_attn.q_proj.weight"].square
    torch.testing.assert_close(known["awq + "], known[""])


def test_moments_do_not_teach(model: Path, tmp_path: Path) -> None:
    known, ids = tmp_path / "moments", tokens(4, 32)
    mill.quantize(str(model), "gptq : int4-g32 > bitmill", tmp_path / "a", calib=ids, save=known)
    with pytest.raises(Refused, match="calibrate"):
        mill.quantize(str(model), "autoround : int4-g32 > bitmill", tmp_path / "b", moments=known)


@pytest.mark.parametrize("options", ["steps=0", "batch=0", "rate=2"])
def test_options_that_teach_nothing_are_refused(options: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=options.partition("=")[0]):
        mill.quantize(str(model), f"autoround({options}) : int4-g32 > bitmill", tmp_path / "out")
