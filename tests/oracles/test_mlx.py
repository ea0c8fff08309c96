"""mlx-lm as the judge of MLX folders: it loads whole checkpoints, decodes to our values, and writes.

``mx.dequantize`` in single precision is ours bit for bit; in 16 bits it rounds the same value. Logits are
compared in single precision, whatever is stored: they differ by the order of summing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm import convert, generate, load
from transformers import AutoConfig, AutoModelForCausalLM

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.mlx import Mlx
from bitmill.core.registry import parse_grid
from bitmill.grids.biased import Biased
from bitmill.run.load import load_model
from bitmill.source import open_path, open_source
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

FULL = {"f32": "float32", "bf16": "bfloat16"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
GRIDS = [
    *("int2-g32-bias", "int3-g64-bias", "int4-g64-bias", "int5-g128-bias", "int6-g64-bias", "int8-g32-bias"),
    *("int4-g64-sym", "int3-g32-sym", "int4-g64-asym", "int4-g64-fz", "mxfp4", "mxfp8", "nvfp4"),
]
MODES = {"affine": {"q_bits": 4, "q_group_size": 64}, "mxfp4": {}, "mxfp8": {}, "nvfp4": {}}
DISTANCE = 2e-4
"""Norm of the difference of logits, as a share of their norm."""


def numbers(array: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def written(
    folder: Path, dtype: str, grid: str, tied: bool, family: str = "llama", **other: str
) -> tuple[SafetensorsFolder, Written]:
    container = Mlx()
    sizes = {**SIZES, "num_hidden_layers": 6 if family == "gemma3" else 2}
    source = SafetensorsFolder(make_model(folder / "model", family, tied=tied, dtype=FULL[dtype], **sizes))
    chosen = {key: container.adapt(parse_grid(text), dtype) for key, text in other.items()}
    rows = rows_of(container, source, dtype, container.adapt(parse_grid(grid), dtype), chosen)
    return source, write(container, source, rows, folder)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.set_dtype(mx.float32)
    return numbers(model(mx.array(ids.numpy())))


@torch.no_grad()
def expected(source: SafetensorsFolder, output: Written, ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits of the dense model of our own decoding."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(output.quantized[name].dense())
    return model(ids).logits.float()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def decoded(parts: dict[str, mx.array], about: dict[str, Any]) -> torch.Tensor:
    """What MLX makes of a stored layer, in single precision."""
    scales = parts["scales"]
    if "biases" not in parts:
        return numbers(mx.dequantize(parts["weight"], scales, dtype=mx.float32, **about))
    biases = parts["biases"].astype(mx.float32)
    return numbers(mx.dequantize(parts["weight"], scales.astype(mx.float32), biases, **about))


def layer(model: Any, name: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Stored arrays of a quantized layer of a loaded model, and how it is quantized."""
    found = model
    for part in name.removesuffix(".weight").split("."):
        found = found[int(part)] if part.isdecimal() else found[part]
    return dict(tree_flatten(found)), {"group_size": found.group_size, "bits": found.bits, "mode": found.mode}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("grid", GRIDS)
def test_mlx_lm_decodes_to_our_values(tmp_path: Path, dtype: str, grid: str, tied: bool) -> None:
    other = {"embed": grid} if tied else {"embed": grid, "head": "int8-g64-bias"}
    source, output = written(tmp_path, dtype, grid, tied, **other)
    model, tokenizer = load(str(output.path))
    for row in output.rows:
        if row.solved:
            parts, about = layer(model, row.name)
            assert torch.equal(decoded(parts, about), output.quantized[row.name].dense()), row.name
    ids = tokens(2, 24)
    assert isinstance(generate(model, tokenizer, prompt="the quick", max_tokens=4), str)
    assert distance(logits(model, ids), expected(source, output, ids)) < DISTANCE


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3", "mistral"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """mlx-lm reads rotary settings by their older names, and stands on a default where it finds none. Its
    Gemma 2 has no sliding window, which begins at 16 tokens here; its Gemma 3 has at least six layers."""
    source, output = written(tmp_path, "f32", "int4-g64-bias", True, family, embed="int6-g64-bias")
    model, _ = load(str(output.path))
    ids = tokens(2, 12 if family == "gemma2" else 24)
    assert distance(logits(model, ids), expected(source, output, ids)) < DISTANCE


@pytest.mark.parametrize("grid", ["int4-g64-bias", "int3-g32-sym", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts(tmp_path: Path, family: str, grid: str) -> None:
    """Stacks of experts load as mlx-lm's own; transformers runs our decoding of the same file."""
    _, output = written(tmp_path, "bf16", grid, False, family)
    model, tokenizer = load(str(output.path))
    switch = "block_sparse_moe" if family == "mixtral" else "mlp"
    name = f"model.layers.1.{switch}.switch_mlp.down_proj"
    values = decoded(*layer(model, name))
    part = "experts.{}.w2" if family == "mixtral" else "experts.{}.down_proj"
    for expert, value in enumerate(values):
        wanted = output.quantized[f"model.layers.1.{switch}.{part.format(expert)}.weight"]
        assert torch.equal(value, wanted.dense())
    ids = tokens(2, 12)
    with torch.no_grad():
        wanted_logits = load_model(open_path(output.path))(ids).logits
    found = logits(model, ids)
    near = (found - wanted_logits).norm(dim=-1) / wanted_logits.norm(dim=-1)
    assert float((near < 1e-3).float().mean()) > 0.9  # a tie may send a token to another expert
    assert generate(model, tokenizer, "hello", max_tokens=4) is not None


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts_that_mlx_lm_converts(tmp_path: Path, family: str) -> None:
    path = make_model(tmp_path / "model", family, tied=False, dtype="bfloat16", **SIZES)
    config = json.loads((path / "config.json").read_text())
    older = {"num_experts": config.get("num_local_experts"), "rope_theta": 10000.0}
    (path / "config.json").write_text(json.dumps({**older, **config}))
    convert(str(path), str(tmp_path / "out"), quantize=True, q_bits=4, q_group_size=32)
    again, source = open_path(tmp_path / "out"), SafetensorsFolder(path)
    assert set(again.tensors) == set(source.tensors)
    model, _ = load(str(tmp_path / "out"))
    switch = "block_sparse_moe" if family == "mixtral" else "mlp"
    part = "experts.{}.w1" if family == "mixtral" else "experts.{}.gate_proj"
    values = decoded(*layer(model, f"model.layers.0.{switch}.switch_mlp.gate_proj"))
    for expert, value in enumerate(values):
        name = f"model.layers.0.{switch}.{part.format(expert)}.weight"
        assert torch.equal(again.read(name), value)
        near = again.read(name) - source.read(name).float()
        assert float(near.norm() / source.read(name).float().norm()) < 0.2


def test_several_grids(tmp_path: Path) -> None:
    other = {"down": "int8-g32-sym", "v": "mxfp8", "o": "bf16", "gate": "int3-g128-bias"}
    source, output = written(tmp_path, "bf16", "int4-g64-bias", False, **other)
    model, _ = load(str(output.path))
    ids = tokens(2, 24)
    assert distance(logits(model, ids), expected(source, output, ids)) < DISTANCE


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("mode", MODES)
def test_what_mlx_lm_converts(tmp_path: Path, dtype: str, mode: str) -> None:
    """Every layer is what MLX itself decodes, bit for bit."""
    path = make_model(tmp_path / "model", "llama", tied=False, dtype=FULL[dtype], **SIZES)
    convert(str(path), str(tmp_path / "out"), quantize=True, q_mode=mode, **MODES[mode])
    model, _ = load(str(tmp_path / "out"))
    again = open_path(tmp_path / "out")
    assert set(again.tensors) == set(SafetensorsFolder(path).tensors)
    seen = 0
    for name in again.tensors:
        stored = again.stored(name)
        if stored is not None:
            parts, about = layer(model, name)
            assert (
                torch.equal(again.read(name), decoded(parts, about)) and stored.dense().shape == stored.shape
            )
            seen += 1
    assert seen == 2 * 7 + 2


def test_mixed_recipes_of_mlx_lm_are_read(tmp_path: Path) -> None:
    path = make_model(
        tmp_path / "model",
        "llama",
        tied=False,
        **SIZES,
    )
    convert(str(path), str(tmp_path / "out"), quantize=True, quant_predicate="mixed_3_6", q_group_size=32)
    model, _ = load(str(tmp_path / "out"))
    again = open_path(tmp_path / "out")
    grids = set()
    for name in again.tensors:
        stored = again.stored(name)
        if stored is not None:
            grids.add(str(stored.grid))
            assert torch.equal(again.read(name), decoded(*layer(model, name)))
    assert grids == {"int3-g32-bias-sf32", "int6-g32-bias-sf32"}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", FULL)
def test_the_plain_rule_is_mlx_s(bits: int, dtype: str) -> None:
    """In single precision to the bit; in 16 bits MLX rounds on the way, and errs more."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).mul(0.05)
    w = w.to(getattr(torch, FULL[dtype])).float()
    array = mx.array(w.numpy()).astype(getattr(mx, FULL[dtype]))
    words, scales, biases = mx.quantize(array, group_size=64, bits=bits)
    ours = Biased(bits, 64, dtype).round(w)
    theirs = decoded({"weight": words, "scales": scales, "biases": biases}, {"group_size": 64, "bits": bits})
    if dtype == "f32":
        assert torch.equal(theirs, ours.dense())
        assert torch.equal(numbers(scales), ours.params["scale"])
    else:
        assert (ours.dense() - w).square().sum() <= (theirs - w).square().sum() * 1.0001


def test_the_embedded_model_speaks(tmp_path: Path) -> None:
    """SmolLM2, embedding too: the whole checkpoint, its logits, and words."""
    source = open_source("smollm2")
    grid = Mlx().adapt(parse_grid("int8-g64-bias"), "f32")
    output = write(Mlx(), source, rows_of(Mlx(), source, "f32", grid, {"embed": grid}), tmp_path)
    model, tokenizer = load(str(output.path))
    prompt = "The capital of France is"
    said = generate(model, tokenizer, prompt=prompt, max_tokens=8)
    ids = torch.tensor([tokenizer.encode(prompt)])
    settings = {k: v for k, v in source.config.items() if k != "model_type"}
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(source.config["model_type"], **settings)
    ).eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(output.quantized[name].dense())
        wanted = dense(ids).logits
        words = dense.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert distance(logits(model, ids), wanted) < DISTANCE
    assert said.strip() and said.strip() == tokenizer.decode(words.tolist()).strip(), said
