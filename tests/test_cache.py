"""Keys and values that a runtime rounds on their way into its cache: planned, calibrated, written, run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill import mill
from bitmill.calibrate.stream import Stream
from bitmill.checkpoint.stored_types import unread
from bitmill.core.axes import cache_of, inputs_of
from bitmill.core.cache_words import parse_cache
from bitmill.core.errors import BadFile, BadRecipe, Refused
from bitmill.core.inputs import CACHES
from bitmill.core.types import Inputs
from bitmill.measurement.measure import Protocol, measure
from bitmill.numerics.inputs import rounded
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from bitmill.source import open_path
from bitmill.transfer import convert
from tests.tiny import make_model, tokens

KEYS = "model.layers.0.self_attn.k_scale"
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
LINE = "nearest : int4-g32-sym, cache={} > compressed-tensors"
SHORT = {"nsamples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("m") / "model", dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    mill.quantize(str(model), LINE.format("fp8"), out, calib=tokens(), **SHORT)
    return out


def edited(folder: Path, out: Path, change: dict[str, torch.Tensor | None], **settings: object) -> Path:
    """A copy with other tensors (None drops one) and other settings."""
    tensors = {**load_file(folder / "model.safetensors"), **change}
    out.mkdir()
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(settings)
    (out / "config.json").write_text(json.dumps(config))
    return out


def seen(folder: Path) -> dict[str, torch.Tensor]:
    """The largest key and value of each head, over the calibration tokens, where nothing rounds them."""
    stream, found = Stream(open_path(folder), inputs={}), {}
    hidden = stream.embed(tokens())
    for block in stream.blocks():

        def note(
            keys: torch.Tensor, values: torch.Tensor, prefix: str = block.prefix
        ) -> tuple[torch.Tensor, ...]:
            found[f"{prefix}self_attn.k_scale"] = keys.abs().amax((0, 2, 3))
            found[f"{prefix}self_attn.v_scale"] = values.abs().amax((0, 2, 3))
            return keys, values

        block.watch_cache("self_attn", note)
        hidden = block.forward(hidden)
    return found


def test_the_file_says_so(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"] == {**SCHEME, "group_size": None}
    stored = load_file(folder / "model.safetensors")
    scales = {name: value for name, value in stored.items() if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 6 and all(value.shape == (1,) for value in scales.values())
    source = open_path(folder)
    assert {name: how.fixed["scale"] for name, how in cache_of(source).items()} == scales
    assert inputs_of(source) == {} and unread(source) is None
    assert not any("scale" in name for name in source.tensors)


@pytest.mark.parametrize(
    ("solver", "grid"),
    [
        ("nearest", "fp8"),
        ("gptq", "int8-head"),
        ("gptq(sequential=false)", "fp8"),
        ("autoround(steps=2)", "int8-head"),
        ("awq + gptq(asymmetric=true)", "fp8"),
    ],
)
def test_scales_are_of_what_the_quantized_blocks_make(
    model: Path, tmp_path: Path, solver: str, grid: str
) -> None:
    line = f"{solver} : int4-g32-sym, cache={grid} > compressed-tensors"
    mill.quantize(str(model), line, tmp_path / "out", calib=tokens(), **SHORT)
    found, wanted = cache_of(open_path(tmp_path / "out")), seen(tmp_path / "out")
    assert set(found) == set(wanted) and {how.grid for how in found.values()} == {parse_cache(grid)}
    for name, largest in wanted.items():
        scale = (largest.max() / 448).reshape(1) if grid == "fp8" else (largest / 127.5).reshape(-1, 1, 1)
        torch.testing.assert_close(found[name].fixed["scale"], scale.bfloat16().float(), rtol=2**-7, atol=0)


def test_it_is_simulated_alike_everywhere(folder: Path, tmp_path: Path) -> None:
    """Stream and model agree; a plain restatement agrees; and it makes a difference."""
    source, ids = open_path(folder), tokens(2, 24, seed=5)
    stream = Stream(source)
    logits = stream.logits(stream.hidden(ids))
    with torch.no_grad():
        loaded = load_model(source)
        torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-4, atol=1e-4)
        grown = loaded(ids[:, :-1], use_cache=True)
        last = loaded(ids[:, -1:], past_key_values=grown.past_key_values).logits
        torch.testing.assert_close(last[:, 0], logits[:, -1], rtol=1e-3, atol=1e-3)
    plain = Stream(source, inputs={})
    hidden = plain.embed(ids)
    for block in plain.blocks():
        scales = [cache_of(source)[f"{block.prefix}self_attn.{x}_scale"] for x in "kv"]

        def change(
            k: torch.Tensor, v: torch.Tensor, scales: list[Inputs] = scales
        ) -> tuple[torch.Tensor, torch.Tensor]:
            made = []
            for x, how in zip((k, v), scales, strict=True):
                scale = how.fixed["scale"]
                made.append((x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
            return made[0], made[1]

        block.watch_cache("self_attn", change)
        hidden = block.forward(hidden)
    torch.testing.assert_close(plain.logits(hidden), logits, rtol=1e-5, atol=1e-5)
    off = Stream(source, inputs={})
    assert float((off.logits(off.hidden(ids)) - logits).abs().max()) > 1e-3


def test_int8_by_head(model: Path, tmp_path: Path) -> None:
    mill.quantize(str(model), LINE.format("int8-head"), tmp_path / "out", calib=tokens(), **SHORT)
    how = cache_of(open_path(tmp_path / "out"))[KEYS]
    assert how.fixed["scale"].shape == (2, 1, 1)
    x = torch.randn(2, 2, 5, 32)
    wanted = torch.clamp((x / how.fixed["scale"]).round(), -128, 127) * how.fixed["scale"]
    torch.testing.assert_close(rounded(how.grid, x, how.fixed), wanted)


def test_it_is_kept_in_other_containers(folder: Path, tmp_path: Path) -> None:
    first = cache_of(open_path(folder))
    assert not convert(str(folder), "bitmill", tmp_path / "own").notes
    convert(str(tmp_path / "own"), "compressed-tensors", tmp_path / "back")
    for name in ("own", "back"):
        again = cache_of(open_path(tmp_path / name))
        assert {k: how.grid for k, how in again.items()} == {k: how.grid for k, how in first.items()}
        assert all(torch.equal(how.fixed["scale"], first[k].fixed["scale"]) for k, how in again.items())
    one, other = ((path / "config.json").read_text() for path in (folder, tmp_path / "back"))
    assert json.loads(one)["quantization_config"] == json.loads(other)["quantization_config"]
    report = convert(str(folder), "gptq", tmp_path / "gptq")
    assert any("source's cache" in text for text in report.plan["remarks"])
    assert cache_of(open_path(tmp_path / "gptq")) == {}


def test_weights_may_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    mill.quantize(
        str(model), "bf16, cache=fp8 > compressed-tensors", tmp_path / "out", calib=tokens(), **SHORT
    )
    source = open_path(tmp_path / "out")
    assert len(cache_of(source)) == 6 and source.stored("model.layers.0.mlp.up_proj.weight") is None


def test_plans_and_measurements_say_so(model: Path, folder: Path, tmp_path: Path) -> None:
    made = plan(parse(LINE.format("fp8-head")), open_path(model))
    assert any("fp8-e4m3-head-static in the cache" in text for text in made.remarks)
    assert made.needs == "diagonal" and made.parameters == plan(parse("hf-f32"), open_path(model)).parameters
    assert any("not taken over" in text for text in plan(parse("hf-f32"), open_path(folder)).remarks)
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 60)
    how = Protocol(window=32, count=2, floor=False)
    record = measure(open_path(folder), open_path(model), texts=[str(text)], protocol=how)
    assert any(note.kind == "cache" and "6 scales of fp8" in note.text for note in record.notes)


def test_what_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    for line in ("nearest : int4-g32-sym, cache=fp8 > gptq", "nearest : nf4-b64, cache=fp8 > bitsandbytes"):
        with pytest.raises(Refused, match="compressed-tensors"):
            plan(parse(line), open_path(model))
    for text in ("int8-tensor", "mxfp8", "int4-tensor-static", "nvfp4"):
        with pytest.raises(BadRecipe, match="no cache"):
            parse(LINE.format(text))
    with pytest.raises(Refused, match="say cache="):
        plan(
            parse("nearest : int8-channel-sym, input=int8-head-static > compressed-tensors"), open_path(model)
        )
    line = LINE.format("fp8")
    assert parse(str(parse(line))) == parse(line) and "cache=fp8-e4m3-tensor-static" in str(parse(line))
    with pytest.raises(BadRecipe, match="one of the two"):
        parse(LINE.format("fp8").replace("nearest", "gptq + tune"))
    matrix = tmp_path / "imatrix"
    matrix.write_bytes(b"")
    with pytest.raises(Refused, match="--calib"):
        mill.quantize(str(model), line, tmp_path / "out", imatrix=matrix)
    assert set(CACHES) == {str(parse_cache(text)) for text in CACHES}


HOSTILE = {
    "no value": ({KEYS.replace("k_scale", "v_scale"): None}, {}, "and no"),
    "no key": ({KEYS: None}, {}, "and no"),
    "negative": ({KEYS: -torch.ones(1)}, {}, "positive and finite"),
    "infinite": ({KEYS: torch.tensor([float("inf")])}, {}, "positive and finite"),
    "many": ({KEYS: torch.ones(64)}, {}, "must be a scale"),
    "bytes": ({KEYS: torch.ones(1, dtype=torch.uint8)}, {}, "must be a scale"),
    "heads": ({}, {"kv_cache_scheme": {**SCHEME, "strategy": "attn_head"}}, "must be a scale"),
    "dynamic": ({}, {"kv_cache_scheme": {**SCHEME, "dynamic": True}}, "cannot be simulated"),
    "skewed": ({}, {"kv_cache_scheme": {**SCHEME, "type": "int", "symmetric": False}}, "cannot be simulated"),
    "four bits": ({}, {"kv_cache_scheme": {**SCHEME, "num_bits": 4}}, "cannot be simulated"),
    "text": ({}, {"kv_cache_scheme": "fp8"}, "means nothing"),
    "twice": ({"model.layers.0.self_attn.k_proj.output_scale": torch.ones(1)}, {}, "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(folder: Path, tmp_path: Path, case: str) -> None:
    change, settings, said = HOSTILE[case]
    with pytest.raises((BadFile, Refused), match=said):
        open_path(edited(folder, tmp_path / "a", change, **settings))


def test_none_at_all(folder: Path, tmp_path: Path) -> None:
    scales = dict.fromkeys(cache_of(open_path(folder)))
    with pytest.raises(BadFile, match="no k_scale"):
        open_path(edited(folder, tmp_path / "a", scales))


def test_older_names(folder: Path, tmp_path: Path) -> None:
    """Before scales stood beside the attention, they were those of its projections' outputs."""
    stored = load_file(folder / "model.safetensors")
    change: dict[str, torch.Tensor | None] = {}
    for name in cache_of(open_path(folder)):
        attention, _, part = name.rpartition(".")
        change |= {name: None, f"{attention}.{part[0]}_proj.output_scale": stored[name]}
    again = open_path(edited(folder, tmp_path / "a", change))
    first = cache_of(open_path(folder))
    assert all(torch.equal(how.fixed["scale"], first[k].fixed["scale"]) for k, how in cache_of(again).items())
    assert set(cache_of(again)) == set(first) and unread(again) is None


def test_scales_that_nobody_speaks_of_are_named(folder: Path, tmp_path: Path) -> None:
    found = open_path(edited(folder, tmp_path / "a", {}, kv_cache_scheme=None))
    assert cache_of(found) == {} and "k_scale, v_scale" in str(unread(found))
