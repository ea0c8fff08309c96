"""SmoothAttention and the order of channels: exact folds in whole models, and what QoQ wins by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill import mill
from bitmill.calibrate.stream import Stream
from bitmill.core.axes import Seam
from bitmill.core.errors import BadRecipe, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Moments, Problem
from bitmill.known import KNOWN
from bitmill.numerics.linear_maps import Permutation
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_path, open_source
from bitmill.transforms.reorder import Reorder
from bitmill.transforms.smoothattention import SmoothAttention
from tests.tiny import make_model, tokens

QOQ = KNOWN["qoq"].partition(" + gptq")[0]
SHORT = {"calib": tokens(4, 24), "nsamples": 4, "seqlen": 24}


def logits(folder: Path) -> torch.Tensor:
    stream = Stream(open_source(str(folder)))
    return stream.logits(stream.hidden(tokens(2, 24, seed=3)))


@pytest.mark.parametrize(
    ("family", "transforms"),
    [
        ("llama", QOQ),
        ("qwen2", QOQ),
        ("qwen3", QOQ),
        ("gemma3", "smoothattention(alpha=1) + reorder"),
        ("gemma2", "smoothattention + reorder"),
        ("llama", "hadamard(r1=false, r2=false, r3=true) + smoothattention"),
    ],
)
def test_the_function_does_not_change(family: str, transforms: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family)
    end = ", cache=int4-token > bitmill" if "r3" in transforms else " > safetensors"
    mill.quantize(str(model), f"{transforms} + nearest : f32{end}", tmp_path / "out", **SHORT)
    wanted, made = logits(model), open_path(tmp_path / "out")
    stream = Stream(made, inputs={})
    found = stream.logits(stream.hidden(tokens(2, 24, seed=3)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    name = "self_attn.k_norm" if family in ("qwen3", "gemma3") else "self_attn.k_proj"
    assert not torch.equal(
        made.read(f"model.layers.0.{name}.weight"), open_path(model).read(f"model.layers.0.{name}.weight")
    )


def test_the_factors_are_the_papers(tmp_path: Path) -> None:
    """What the walk folds, from keys as transformers' own model makes them behind their rotation."""
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    mill.quantize(str(model), "smoothattention + nearest : f32 > safetensors", tmp_path / "out", **SHORT)
    stream, seen = Stream(open_path(model)), []
    block = stream.block(0)

    def see(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(keys)
        return keys, values

    block.watch_cache("self_attn", see)
    block.forward(stream.embed(SHORT["calib"]))
    largest = seen[0].abs().amax((0, 2))  # heads, channels
    pair = torch.maximum(largest[:, :16], largest[:, 16:])
    factor = torch.cat((pair, pair), 1).sqrt()
    before, after = (open_path(path) for path in (model, tmp_path / "out"))
    for role, wide in (("k", 1 / factor), ("q", factor.repeat_interleave(2, 0))):
        name = f"model.layers.0.self_attn.{role}_proj.weight"
        torch.testing.assert_close(after.read(name), before.read(name) * wide.reshape(-1, 1))


def test_loud_keys_gain() -> None:
    seam = Seam("key", ("k",), ("q",), frozenset({"diagonal"}))
    largest = torch.ones(2, 32)
    largest[0, [3, 30]] = torch.tensor([40.0, 15.0])
    moments = Moments(10, largest.square().flatten(), absmax=largest.flatten())
    problem = Problem("k", "q", torch.ones(64, 8), moments)
    map_, gain = SmoothAttention().fit(seam, 0, 32, [(problem, parse_grid("f32"))])
    scale = map_.read(torch.ones(1, 64))[0].reshape(2, 32)
    assert gain is not None and 0 < gain < 0.2
    assert torch.equal(scale[:, :16], scale[:, 16:]) and torch.equal(scale[1], torch.ones(32))
    torch.testing.assert_close(scale[0, [3, 19, 14]], torch.tensor([40.0, 40.0, 15.0]).sqrt())
    with pytest.raises(BadRecipe, match="alpha"):
        parse("smoothattention(alpha=2) + nearest : int4-g32-sym")


def test_the_order_is_by_size_and_groups_gain() -> None:
    rng = torch.Generator().manual_seed(0)
    loud = torch.rand(256, generator=rng) ** 4 * 20 + 0.1
    weight = torch.randn(32, 256, generator=rng) / loud
    moments = Moments(100, 100 * loud.square(), absmax=loud)
    seam = Seam("mlp_order", ("gate", "up"), ("down",), frozenset({"permutation"}))
    map_, gain = Reorder().fit(
        seam, 0, 256, [(Problem("w", "down", weight, moments), parse_grid("int4-g64-sym"))]
    )
    assert isinstance(map_, Permutation) and gain is not None and gain < 0.8
    assert torch.equal(loud[map_.index], loud.sort(descending=True).values)


def test_qoq_by_name_and_what_it_does_not_go_with(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    mill.quantize(str(model), "qoq", tmp_path / "out", **SHORT)
    assert torch.isfinite(logits(tmp_path / "out")).all()
    source = open_path(model)
    with pytest.raises(Refused, match="r4 mixes"):
        plan(
            parse("hadamard(r4=true) + reorder + nearest : int4-g32-sym, input=int8-token > bitmill"), source
        )
    matrix = tmp_path / "moments.safetensors"
    mill.quantize(str(model), "gptq : int4-g32-sym", tmp_path / "two", save=matrix, **SHORT)
    with pytest.raises(Refused, match="range of keys"):
        mill.quantize(str(model), "smoothattention + gptq : int4-g32-sym", tmp_path / "three", moments=matrix)
