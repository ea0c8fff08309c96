"""SmoothQuant against the paper's formula written out, its fold in a whole model, and what it wins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitmill import mill
from bitmill.calibrate.stream import Stream
from bitmill.core.axes import Seam
from bitmill.core.errors import BadRecipe
from bitmill.core.inputs import parse_inputs
from bitmill.core.registry import parse_grid
from bitmill.core.types import Moments, Problem
from bitmill.numerics.inputs import fixed_params, rounded
from bitmill.recipe import parse
from bitmill.source import open_source
from bitmill.transforms.smoothquant import SmoothQuant
from tests.tiny import make_model, tokens

IN, TOKENS = 96, 400
SEAM = Seam("attn_in", ("norm",), ("q", "k"), frozenset({"diagonal"}))
GRID = parse_grid("int8-channel-sym-sf32")


def layer(seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Inputs with three loud channels, and two weights that read them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, IN, generator=rng)
    x[:, [3, 40, 77]] *= 60
    return x, [torch.randn(out, IN, generator=rng) * 0.05 for out in (48, 32)]


def fitted(transform: SmoothQuant, x: Tensor, weights: list[Tensor], inputs: str) -> tuple[Tensor, float]:
    moments = Moments(TOKENS, x.square().sum(0), x.abs().sum(0), x.abs().amax(0), sample=x[::2])
    grid = parse_inputs(inputs)
    readers = [(Problem(f"w{i}", "q", w, moments, grid), GRID) for i, w in enumerate(weights)]
    map_, gain = transform.fit(SEAM, 0, IN, readers)
    assert gain is not None
    return map_.read(torch.ones(1, IN))[0], gain


def loss(x: Tensor, weights: list[Tensor], scale: Tensor, inputs: str) -> float:
    """Squared output error, relative to the output, of both sides rounded after scaling; of all tokens."""
    grid, smooth = parse_inputs(inputs), x / scale
    seen = rounded(grid, smooth[None], fixed_params(grid, smooth.min(), smooth.max(), torch.float32))[0]
    pairs = [(seen @ GRID.round(w * scale).dense().T, x @ w.T) for w in weights]
    return float(sum(((is_ - was).square().sum(1) / was.square().sum(1)).mean() for is_, was in pairs))


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.5, 0.85, 1.0])
def test_it_is_the_papers_formula_channel_by_channel(alpha: float) -> None:
    x, weights = layer()
    scale, _ = fitted(SmoothQuant(alpha), x, weights, "int8-token")
    for j in range(IN):
        loud = max(abs(float(v)) for v in x[:, j])
        heavy = max(abs(float(row[j])) for w in weights for row in w)
        assert float(scale[j]) == pytest.approx(loud**alpha / heavy ** (1 - alpha), rel=1e-5)


@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor-static", "int4-token"])
def test_auto_never_loses_on_its_sample_and_is_near_the_best_exponent(inputs: str) -> None:
    x, weights = layer()
    scale, gain = fitted(SmoothQuant("auto"), x, weights, inputs)
    assert gain <= 1
    losses = [loss(x, weights, fitted(SmoothQuant(k / 20), x, weights, inputs)[0], inputs) for k in range(21)]
    plain = loss(x, weights, torch.ones(IN), inputs)
    found = loss(x, weights, scale, inputs)
    assert found < 0.5 * plain
    assert found < 1.1 * min(losses)
    assert found / plain == pytest.approx(gain, rel=0.2)  # half of the tokens speak for all


def test_without_outliers_auto_leaves_nearly_everything() -> None:
    rng = torch.Generator().manual_seed(1)
    x, weights = torch.randn(TOKENS, IN, generator=rng), [torch.randn(40, IN, generator=rng)]
    scale, gain = fitted(SmoothQuant("auto"), x, weights, "int8-token")
    assert 0.5 < gain <= 1
    assert loss(x, weights, scale, "int8-token") < 1.1 * loss(x, weights, torch.ones(IN), "int8-token")


def test_silent_channels_and_weights_are_finite() -> None:
    x, weights = layer()
    x[:, 5], weights[0][:, 9], weights[1][:, 9] = 0, 0, 0
    for alpha in (0.0, 0.5, 1.0, "auto"):
        scale, _ = fitted(SmoothQuant(alpha), x, weights, "int8-token")
        assert bool(((scale >= 1e-4) & (scale <= 1e4)).all())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("inner", ["false", "true"])
def test_a_whole_model_computes_the_same(family: str, inner: str, tmp_path: Path) -> None:
    model, ids = make_model(tmp_path / "model", family), tokens(4, 24)
    recipe = f"smoothquant(alpha=0.7, inner={inner}) + nearest : f32 > safetensors"
    mill.quantize(str(model), recipe, tmp_path / "out", calib=ids, nsamples=4, seqlen=24)
    before, after = (Stream(open_source(str(p))) for p in (model, tmp_path / "out"))
    wanted = before.logits(before.hidden(ids))
    torch.testing.assert_close(
        after.logits(after.hidden(ids)), wanted, rtol=0, atol=2e-4 * float(wanted.abs().max())
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(after.checkpoint.read(name), before.checkpoint.read(name))


def test_options_that_mean_nothing_are_refused() -> None:
    for options in ("alpha=1.5", "alpha=automatic", "grid_points=0", "rows=0"):
        with pytest.raises(BadRecipe):
            parse(f"smoothquant({options}) + nearest : int8-channel-sym")
    assert SmoothQuant(inner=True, norms=False).seams() == ("value", "mlp_mid")
    with pytest.raises(BadRecipe, match="inner"):
        parse("smoothquant(norms=false, inner=false) + nearest : int8-channel-sym")
    assert SmoothQuant(inner=True).seams() == ("attn_in", "value", "mlp_in", "mlp_mid")
    assert str(parse("smoothquant(alpha=auto) + nearest : int8-channel-sym, input=int8-token")).startswith(
        "smoothquant(alpha=auto)"
    )
