"""Recipes that round inputs: plans, files that hold it, runs that propagate it, hostile folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill import mill
from bitmill.calibrate.damage import measure_damage
from bitmill.calibrate.stream import Stream
from bitmill.calibrate.tokens import Calibration
from bitmill.core.axes import inputs_of
from bitmill.core.errors import BadFile, BadRecipe, Refused
from bitmill.core.inputs import parse_inputs
from bitmill.known import KNOWN
from bitmill.measurement.measure import Protocol, measure
from bitmill.numerics.inputs import rounded
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from bitmill.source import open_source
from bitmill.transfer import convert
from tests.tiny import make_model, tokens

IDS = tokens(8, 32)
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def made(model: Path, recipe: str, out: Path) -> Any:
    return mill.quantize(str(model), recipe, out, calib=IDS, nsamples=8, seqlen=32)


def test_input_is_an_option_like_others(tmp_path: Path) -> None:
    recipe = parse("nearest : int8-channel-sym, keep=v, input=int8-token-sym")
    assert (recipe.input, recipe.container) == ("int8-token", "compressed_tensors")
    assert str(recipe) == "nearest : int8-channel-sym, input=int8-token, keep=v > compressed-tensors"
    assert parse(str(recipe)) == recipe
    assert parse("nearest : int4-g64-fz, input=int8-token").container == "bitmill"
    (tmp_path / "r.toml").write_text('grid = "int8-channel-sym"\nkeep = "v"\ninput = "int8-token"\n')
    assert parse(str(tmp_path / "r.toml")) == recipe
    with pytest.raises(BadRecipe, match="int8-token"):
        parse("nearest : int8-channel-sym, input=int8-tokem")
    for name in (
        "w8a8",
        "w8a8-static",
        "w4a8",
        "w4a4",
        "fp8-dynamic",
        "fp8-static",
        "nvfp4",
        "mxfp4",
        "mxfp8",
    ):
        assert parse(name).input is not None, name
    assert all(parse(name).input is None for name in KNOWN if "a16" in name)


def test_a_plan_says_whose_inputs_and_what_is_calibrated(model: Path) -> None:
    source = open_source(str(model))
    plain = plan(parse("nearest : int8-channel-sym, keep=v, input=int8-token"), source)
    rows = {row.name: row for row in plain.rows}
    assert str(rows[f"{Q0}.weight"].inputs) == "int8-token"
    untouched = ("model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight", "model.norm.weight")
    assert all(rows[name].inputs is None for name in untouched)
    assert plain.needs == "nothing"
    assert any("18 linears are rounded to int8-token" in r and "3 kept" in r for r in plain.remarks)
    assert plain.explain(f"{Q0}.weight").endswith("its inputs on int8-token")
    told = {r["name"]: r["inputs"] for r in plain.to_json()["rows"]}
    assert told[f"{Q0}.weight"] == "int8-token" and told["model.norm.weight"] is None
    static = plan(parse("nearest : int8-channel-sym, input=int8-tensor-static"), source)
    assert static.needs == "diagonal" and static.nsamples > 0
    assert any("scale of each input is fixed by calibration" in r for r in static.remarks)
    assert plain.digest != plan(parse("nearest : int8-channel-sym, keep=v"), source).digest


@pytest.mark.parametrize(
    ("recipe", "what", "fix"),
    [
        ("nearest : Q4_0, input=int8-token > gguf", "gguf files do not say", "compressed-tensors"),
        ("gptq : int4-g32-sym, input=int8-token > gptq", "gptq files do not say", "bitmill"),
        ("nearest : fp8-e4m3-channel, input=int8-token", "FP8 weights go with fp8-e4m3-token", None),
        ("nearest : int8-channel-sym, input=mxfp8", "whole numbers go with int8-token", None),
        ("nearest : mxfp8, input=mxfp4, dtype=bf16", "with this weight go mxfp8", None),
        ("nearest : int4-g32-sym, input=int8-g96-token", "not a multiple", None),
        ("nearest : f32, input=int8-token > bitmill", "stay as they are", "drop input"),
    ],
)
def test_what_no_file_says_is_refused_in_the_plan(
    model: Path, recipe: str, what: str, fix: str | None
) -> None:
    with pytest.raises(Refused, match=what) as refusal:
        plan(parse(recipe), open_source(str(model)))
    assert fix is None or fix in str(refusal.value.fix)


def test_experts_take_no_scale_of_a_whole_tensor(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path, "mixtral")))
    with pytest.raises(Refused, match="single experts"):
        plan(parse("w8a8-static"), source)


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts_round_what_they_multiply(family: str, tmp_path: Path) -> None:
    """Layer 0's experts, one token and one expert at a time, with the rounding written out."""
    source = open_source(str(make_model(tmp_path / "model", family, num_hidden_layers=1)))
    recipe = "nearest : int8-channel-sym, input=int8-token > bitmill"
    mill.quantize(source, recipe, tmp_path / "out")
    made = open_source(str(tmp_path / "out"))
    model = load_model(made)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    seen: list[tuple[torch.Tensor, ...]] = []
    experts.register_forward_hook(lambda _, args, out: seen.append((*args, out)))
    with torch.no_grad():
        found = model(tokens(2, 6)).logits
    stream = Stream(made)
    assert torch.equal(stream.logits(stream.hidden(tokens(2, 6))), found)
    hidden, index, weights, out = seen[0]
    path = "block_sparse_moe.experts" if family == "mixtral" else "mlp.experts"
    parts = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    grid = parse_inputs("int8-token")
    for token in range(0, len(hidden), 5):
        wanted = torch.zeros_like(out[token])
        for slot, expert in enumerate(index[token].tolist()):
            gate, up, down = (made.read(f"model.layers.0.{path}.{expert}.{p}.weight") for p in parts)
            x = rounded(grid, hidden[token, None], {})
            middle = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            wanted += weights[token, slot] * (rounded(grid, middle, {}) @ down.T)[0]
        torch.testing.assert_close(out[token], wanted, rtol=1e-4, atol=1e-4)


RECIPES = [
    "nearest : int8-channel-sym, input=int8-token > compressed-tensors",
    "nearest : int8-channel-asym-sf32, input=int8-tensor-static-asym > compressed-tensors",
    "gptq : int4-g32-sym, input=int8-token > compressed-tensors",
    "hadamard + gptq : int4-g32-sym, input=int4-token > compressed-tensors",
    "awq + gptq : int4-g32-sym, input=int8-tensor-static > compressed-tensors",
    "smoothquant + gptq : int8-channel-sym, input=int8-tensor-static > compressed-tensors",
    "gptq : fp8-e4m3-tensor, input=fp8-e4m3-tensor-static > compressed-tensors",
    "nearest : int5-g32-fz, input=int8-tensor-static-asym > bitmill",
    "gptq : nvfp4, input=nvfp4 > bitmill",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_walk_the_stream_and_the_loaded_model_compute_the_same(
    recipe: str, model: Path, tmp_path: Path
) -> None:
    report = made(model, recipe, tmp_path / "out")
    checkpoint = open_source(str(tmp_path / "out"))
    inputs = inputs_of(checkpoint)
    assert len(inputs) == 21 and {str(how.grid) for how in inputs.values()} == {parse(recipe).input}
    assert all(set(how.fixed) == set(how.grid.fixed) for how in inputs.values())
    stream = Stream(checkpoint)
    simulated = stream.logits(stream.hidden(IDS[:2]))
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(IDS[:2]).logits, simulated)
    bare = Stream(checkpoint, inputs={})
    assert not torch.equal(bare.logits(bare.hidden(IDS[:2])), simulated)
    if "hadamard" in recipe or "awq" in recipe or "smooth" in recipe:
        return
    dense, hidden = Stream(open_source(str(model))), stream.embed(IDS)
    for index in range(stream.layers):  # what the run said of each block is what the file does
        first, before = hidden[:1].clone(), dense.block(index).forward(hidden[:1])
        hidden = stream.block(index).forward(hidden)
        error = (hidden[:1] - before).norm() / (before - first).norm()
        assert report.blocks[f"block {index}"] == pytest.approx(float(error), rel=1e-3)


def test_static_scales_are_those_of_the_inputs_that_the_linear_got(model: Path, tmp_path: Path) -> None:
    made(model, "nearest : int8-channel-sym, input=int8-tensor-static", tmp_path / "s")
    made(model, "nearest : int8-channel-sym, input=int8-tensor-static-asym", tmp_path / "a")
    seen: dict[str, torch.Tensor] = {}
    stream = Stream(open_source(str(model)))
    watch = {"self_attn.q_proj": lambda x: seen.update(q=x.clone())}
    stream.block(0).watched(stream.embed(IDS), watch)
    low, high = float(seen["q"].min()), float(seen["q"].max())
    files = {name: load_file(tmp_path / name / "model.safetensors") for name in "sa"}
    scale = files["s"][f"{Q0}.input_scale"]
    assert scale.shape == (1,) and float(scale) == pytest.approx(max(-low, high) / 127.5, rel=1e-6)
    assert float(files["a"][f"{Q0}.input_scale"]) == pytest.approx((high - low) / 255, rel=1e-6)
    zero = files["a"][f"{Q0}.input_zero_point"]
    assert zero.dtype is torch.int8 and int(zero) == round(-128 - low / ((high - low) / 255))
    assert f"{Q0}.input_zero_point" not in files["s"]
    assert files["s"][f"{Q0}.weight"].dtype is torch.int8
    for name in ("k_proj", "v_proj"):  # what is multiplied with one input has one scale
        assert torch.equal(files["s"][f"model.layers.0.self_attn.{name}.input_scale"], scale)


def test_settings_of_compressed_tensors(model: Path, tmp_path: Path) -> None:
    made(model, "nearest : int8-channel-sym, v=int4-g32-sym, input=int8-token", tmp_path / "out")
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    groups = list(settings["config_groups"].values())
    assert [g["format"] for g in groups] == ["int-quantized", "pack-quantized"]
    wanted = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    assert all(g["input_activations"] == wanted for g in groups)


def test_calibration_that_cannot_fix_a_scale_is_refused(model: Path, tmp_path: Path) -> None:
    source, kept = str(model), tmp_path / "m.safetensors"
    mill.quantize(
        source, "gptq : int4-g32-sym > bitmill", tmp_path / "a", calib=IDS, nsamples=8, seqlen=32, save=kept
    )
    symmetric = "nearest : int8-channel-sym, input=int8-tensor-static"
    mill.quantize(source, symmetric, tmp_path / "b", moments=kept)
    assert len(inputs_of(open_source(str(tmp_path / "b")))) == 21
    with pytest.raises(Refused, match="range of inputs"):
        mill.quantize(source, f"{symmetric}-asym", tmp_path / "c", moments=kept)
    with pytest.raises(Refused, match="importance matrix"):
        mill.quantize(source, symmetric, tmp_path / "d", imatrix=tmp_path / "none.gguf")
    assert not any((tmp_path / name).exists() for name in "cd")


def test_measure_counts_rounded_inputs_and_says_so(model: Path, tmp_path: Path) -> None:
    for name, more in (("a16", ""), ("a4", ", input=int4-token")):
        made(model, f"nearest : int8-channel-sym{more} > compressed-tensors", tmp_path / name)
    how, texts = Protocol(window=32, count=2, floor=False), [str(Path(__file__))]
    records = [measure(str(tmp_path / n), str(model), texts=texts, protocol=how) for n in ("a16", "a4")]
    assert records[1].summary.kld.mean > 3 * records[0].summary.kld.mean
    said = [[n.text for n in record.notes if n.kind == "inputs"] for record in records]
    assert said[0] == [] and "21 linears are rounded to int4-token" in said[1][0]


def test_a_source_that_rounds_inputs_is_said_or_refused(model: Path, tmp_path: Path) -> None:
    made(model, "w8a8", tmp_path / "out")
    source = open_source(str(tmp_path / "out"))
    remarks = plan(parse("hf-f32"), source).remarks
    assert any("the source rounds inputs" in text and "21 to int8-token" in text for text in remarks)
    with pytest.raises(Refused, match="no gradient"):
        measure_damage(source, Calibration(IDS, {}))


def test_a_conversion_carries_input_grids_or_says_that_it_does_not(model: Path, tmp_path: Path) -> None:
    made(model, "nearest : int8-channel-sym-sf32, input=int8-tensor-static-asym", tmp_path / "ct")
    convert(str(tmp_path / "ct"), "bitmill", tmp_path / "own")
    convert(str(tmp_path / "own"), "compressed-tensors", tmp_path / "back")
    source, *others = (inputs_of(open_source(str(tmp_path / name))) for name in ("ct", "own", "back"))
    for found in others:
        assert {n: how.grid for n, how in found.items()} == {n: how.grid for n, how in source.items()}
        assert all(
            torch.equal(found[n].fixed[k], v) for n, how in source.items() for k, v in how.fixed.items()
        )
    report = convert(str(tmp_path / "ct"), "safetensors", tmp_path / "dense", dtype="f32")
    said = [text for text in report.plan["remarks"] if "inputs" in text]
    assert len(said) == 1 and "the inputs of 21 weights are rounded to int8-tensor-static-asym" in said[0]
    convert(str(tmp_path / "ct"), "nearest : int8-channel-sym-sf32, input=int8-token", tmp_path / "token")
    assert {str(how.grid) for how in inputs_of(open_source(str(tmp_path / "token"))).values()} == {
        "int8-token"
    }
    with pytest.raises(Refused, match="a conversion runs no model"):
        convert(str(tmp_path / "ct"), "nearest : int8-channel-sym, input=int8-tensor-static", tmp_path / "no")


def test_a_conversion_to_dense_weights_says_of_no_inputs(model: Path, tmp_path: Path) -> None:
    made(model, "nearest : int8-channel-sym-sf32, input=int8-token", tmp_path / "ct")
    report = convert(str(tmp_path / "ct"), "nearest : f32 > bitmill", tmp_path / "own")
    assert inputs_of(open_source(str(tmp_path / "own"))) == {}
    said = [text for text in report.plan["remarks"] if "inputs" in text]
    assert len(said) == 1 and "does not say so" in said[0]


def settings(folder: Path, **changes: Any) -> None:
    """Change the description of the only group's inputs."""
    whole = json.loads((folder / "config.json").read_text())
    group = whole["quantization_config"]["config_groups"]["group_0"]
    group.update({k: v for k, v in changes.items() if k.endswith("activations")})
    group["input_activations"].update({k: v for k, v in changes.items() if not k.endswith("activations")})
    (folder / "config.json").write_text(json.dumps(whole))


def test_folders_that_make_no_sense_are_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(model, "nearest : int8-channel-sym, input=int8-tensor-static-asym", out)
    text, file = (out / "config.json").read_text(), out / "model.safetensors"
    good = load_file(file)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"strategy": "token"}, "cannot be simulated"),
        ({"strategy": "group", "group_size": 32}, "cannot be simulated"),
        ({"type": "float", "symmetric": False}, "cannot be simulated"),
        ({"num_bits": [8]}, "cannot be simulated"),
        ({"dynamic": "local"}, "cannot be simulated"),
        ({"output_activations": {"num_bits": 8}}, "outputs of layers"),
        ({"strategy": "group", "group_size": 48, "dynamic": True}, "not a multiple"),
    ]
    for changes, what in refused:
        settings(out, **changes)
        with pytest.raises((Refused, BadFile), match=what):
            open_source(str(out))
        (out / "config.json").write_text(text)
    scale, zero = f"{Q0}.input_scale", f"{Q0}.input_zero_point"
    broken: list[tuple[dict[str, torch.Tensor], str]] = [
        ({scale: torch.zeros(1)}, "no scale"),
        ({scale: torch.tensor([float("nan")])}, "no scale"),
        ({scale: torch.ones(2)}, "one number"),
        ({zero: torch.tensor([1.5])}, "no zero"),
        ({zero: torch.tensor([300.0])}, "no zero"),
    ]
    for tensors, what in broken:
        save_file({**good, **tensors}, file)
        with pytest.raises(BadFile, match=what):
            open_source(str(out))
    save_file({k: v for k, v in good.items() if k != scale}, file)
    with pytest.raises(BadFile, match="input_scale"):
        open_source(str(out))
    save_file(good, file)
    x = torch.randn(1, 4, 128)
    how = inputs_of(open_source(str(out)))[f"{Q0}.weight"]
    assert torch.isfinite(rounded(how.grid, x, how.fixed)).all()
