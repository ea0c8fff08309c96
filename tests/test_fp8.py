"""FP8 folders: bytes and settings, tiles at the edges of a weight, the spellings of other people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bitmill import mill
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.checkpoint.stored_types import unread
from bitmill.containers.fp8 import Fp8
from bitmill.core.axes import inputs_of
from bitmill.core.errors import BadFile, BitmillError, Refused
from bitmill.core.inputs import parse_inputs
from bitmill.core.registry import parse_grid
from bitmill.numerics.inputs import rounded
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_path
from bitmill.transfer import convert
from tests.tiny import make_model
from tests.written import Written, rows_of, write

NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{NAME}_scale_inv"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    return SafetensorsFolder(make_model(tmp_path_factory.mktemp("model"), "llama", dtype="bfloat16"))


def written(source: SafetensorsFolder, grid: str, out: Path, **other: str) -> Written:
    chosen = {role: parse_grid(text) for role, text in other.items()}
    return write(Fp8(), source, rows_of(Fp8(), source, "bf16", parse_grid(grid), chosen), out)


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def reconfigured(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


def edited(path: Path, gone: str = "", **changes: torch.Tensor) -> None:
    tensors = {k: v for k, v in load_file(path / "model.safetensors").items() if k != gone}
    made = {k: v.contiguous() for k, v in {**tensors, **changes}.items()}
    save_file(made, path / "model.safetensors", {"format": "pt"})


def test_the_scale_is_a_factor(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "fp8-e4m3-b128", tmp_path)
    stored = load_file(out.path / "model.safetensors")
    assert stored[NAME].dtype is torch.float8_e4m3fn and stored[SCALE].dtype is torch.float32
    assert stored[SCALE].shape == (2, 1)
    whole = stored[NAME].float() * stored[SCALE].repeat_interleave(128, 0)
    assert (whole - source.read(NAME).float()).abs().max() < 0.07 * source.read(NAME).abs().max()
    found = settings_of(out.path)
    wanted = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert {k: found[k] for k in wanted} == wanted and "dequantize" not in found
    assert found["modules_to_not_convert"] == ["lm_head"]


def test_settings_by_grid(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "fp8-e4m3-tensor", tmp_path / "tensor", o="bf16")
    found = settings_of(out.path)
    assert found["weight_block_size"] is None
    assert found["modules_to_not_convert"][0] == "model.layers.0.self_attn.o_proj"
    assert len(found["modules_to_not_convert"]) == 4
    assert load_file(out.path / "model.safetensors")[SCALE].shape == ()
    found = settings_of(written(source, "mxfp8", tmp_path / "mx").path)
    assert (found["quant_method"], found["weight_block_size"], found["scale_fmt"]) == (
        "mxfp8",
        [1, 32],
        "ue8m0",
    )
    for grid in ("fp8-e5m2-channel", "mxfp8-e5m2"):  # no kernel multiplies these
        assert settings_of(written(source, grid, tmp_path / grid).path)["dequantize"] is True


@pytest.mark.parametrize(
    ("grid", "role", "shape", "said"),
    [
        ("fp8-e4m3-channel", "q", (256, 256), "> compressed-tensors"),
        ("nvfp4", "q", (256, 256), "> compressed-tensors"),
        ("int4-g32-sym", "q", (256, 256), "> bitmill"),
        ("fp8-e4m3-tensor", "embed", (256, 256), "layers of the blocks"),
        ("fp8-e4m3-b128", "q", (256, 192), "256 × 192"),
        ("fp8-e4m3-b128", "q", (576, 256), "fp8-e4m3-tensor"),
        ("mxfp8", "q", (256, 80), "multiple"),
    ],
)
def test_refusals_say_where_to_go(grid: str, role: str, shape: tuple[int, int], said: str) -> None:
    assert said in str(Fp8().refuses(parse_grid(grid), role, shape))


@pytest.mark.parametrize("shape", [(64, 256), (128, 96), (32, 48)])
def test_one_tile_may_be_small(shape: tuple[int, int]) -> None:
    assert Fp8().refuses(parse_grid("fp8-e4m3-b128"), "q", shape) is None


def test_one_grid_for_all(source: SafetensorsFolder, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="one grid") as caught:
        written(source, "fp8-e4m3-b128", tmp_path, down="fp8-e4m3-tensor")
    assert "compressed-tensors" in str(caught.value.fix)


def test_experts_go_together(tmp_path: Path) -> None:
    """transformers has one module for all experts of a block; joined gate and up need a scale each."""
    source = SafetensorsFolder(make_model(tmp_path / "model", "qwen3moe", num_hidden_layers=1))
    whole = written(source, "fp8-e4m3-tensor", tmp_path / "whole")
    assert settings_of(whole.path)["dequantize"] is True
    kept = dict.fromkeys(("gate", "up", "down"), "f32")
    found = settings_of(written(source, "fp8-e4m3-tensor", tmp_path / "kept", **kept).path)
    assert "model.layers.0.mlp.experts" in found["modules_to_not_convert"] and "dequantize" not in found
    with pytest.raises(Refused, match="all together"):
        written(source, "fp8-e4m3-tensor", tmp_path, down="f32")


def test_tiles_at_the_edges(source: SafetensorsFolder, tmp_path: Path) -> None:
    """DeepSeek's tiles start at the corner and are cut at the edges; 576 rows have five scales."""
    out = written(source, "fp8-e4m3-b128", tmp_path)
    codes = torch.ones(192, 160).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    edited(out.path, **{NAME: codes, SCALE: scales})
    again = open_path(out.path)
    values = again.read(NAME)
    assert again.tensors[NAME].shape == (192, 160)
    assert values[127, 127] == 1 and values[128, 127] == 3 and values[127, 128] == 2 and values[191, 159] == 4
    stored = again.stored(NAME)
    assert stored is not None and torch.equal(stored.dense(), values) and str(stored.grid) == "fp8-e4m3-b128"


@pytest.mark.parametrize("dtype", ["u8", "e8m0"])
def test_powers_of_two(source: SafetensorsFolder, tmp_path: Path, dtype: str) -> None:
    """``ue8m0`` scales, as bytes or as the type of their own: over tiles, and over MX blocks."""
    out = written(source, "fp8-e4m3-b128", tmp_path)
    kind = {"u8": torch.uint8, "e8m0": torch.float8_e8m0fnu}[dtype]
    edited(out.path, **{SCALE: torch.tensor([[127], [130]], dtype=torch.uint8).view(kind)})
    again = open_path(out.path)
    stored = again.stored(NAME)
    assert stored is not None and stored.params["scale"].tolist() == [[1.0], [8.0]]
    bytes_ = torch.arange(120, 124, dtype=torch.uint8).repeat(256, 1).view(kind)
    edited(out.path, **{SCALE: bytes_})
    again = open_path(out.path)
    stored = again.stored(NAME)
    assert stored is not None and str(stored.grid) == "mxfp8"
    assert torch.equal(stored.dense(), again.read(NAME))
    nibbles = torch.full((256, 64), 0x21, dtype=torch.uint8).view(torch.int8)
    edited(out.path, **{SCALE: bytes_, NAME: nibbles})
    again = open_path(out.path)
    stored = again.stored(NAME)
    assert stored is not None and str(stored.grid) == "mxfp4" and stored.shape == (256, 128)
    assert again.read(NAME)[0, :2].tolist() == [0.5 * 2**-7, 2**-7]
    assert torch.equal(stored.dense(), again.read(NAME))


def test_other_spellings(source: SafetensorsFolder, tmp_path: Path) -> None:
    """AutoFP8 says ``weight_scale``; static activations and caches have scales that are no weights'."""
    out = written(source, "fp8-e4m3-tensor", tmp_path)
    aside = {
        "model.layers.0.mlp.up_proj.activation_scale": torch.tensor(0.1),
        "model.layers.0.mlp.down_proj.input_scale": torch.ones(1),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    edited(out.path, SCALE, **{SCALE.removesuffix("_inv"): torch.tensor([0.5]).bfloat16()}, **aside)
    again = open_path(out.path)
    assert set(again.tensors) == set(out.quantized)
    stored = again.stored(NAME)
    assert stored is not None and stored.params["scale"].tolist() == [[0.5]]


def test_layers_round_their_inputs_unasked(source: SafetensorsFolder, tmp_path: Path) -> None:
    """By the weight's own runs of channels as they come; where weights are decoded on loading, not at all."""
    wanted = {"fp8-e4m3-tensor": {"fp8-e4m3-token"}, "mxfp8": {"mxfp8-ceil"}, "fp8-e5m2-channel": set()}
    wanted |= {"fp8-e4m3-b128": {"fp8-e4m3-token", "fp8-e4m3-g128-token"}}  # 128 channels, and 256
    for grid, kinds in wanted.items():
        out = written(source, grid, tmp_path / grid)
        found = inputs_of(open_path(out.path))
        assert {str(how.grid) for how in found.values()} == kinds
        assert {r.name: r.inputs for r in out.rows if r.inputs} == {n: h.grid for n, h in found.items()}
    reconfigured(tmp_path / "fp8-e4m3-b128" / "out", weight_block_size=[64, 64])
    tiles = {f"model.layers.{i}.mlp.down_proj.weight_scale_inv": torch.ones(2, 4) for i in range(3)}
    edited(tmp_path / "fp8-e4m3-b128" / "out", **tiles)
    found = inputs_of(open_path(tmp_path / "fp8-e4m3-b128" / "out"))
    assert str(found["model.layers.1.mlp.down_proj.weight"].grid) == "fp8-e4m3-g64-token"
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    runs = x.unflatten(-1, (-1, 128))
    scale = runs.abs().amax(-1, keepdim=True) / 448
    by_hand = ((runs / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    assert torch.equal(rounded(parse_inputs("fp8-e4m3-g128-token"), x, {}), by_hand)


@pytest.mark.parametrize("spelling", ["activation_scale", "input_scale", "qscale_act"])
def test_fixed_scales_of_inputs(source: SafetensorsFolder, tmp_path: Path, spelling: str) -> None:
    out = written(source, "fp8-e4m3-tensor", tmp_path)
    modules = [row.name.removesuffix(".weight") for row in out.rows if row.solved]
    fixed = {f"{module}.{spelling}": torch.tensor(0.01 * i + 0.01) for i, module in enumerate(modules)}
    edited(out.path, **fixed)
    reconfigured(out.path, activation_scheme="static")
    again = open_path(out.path)
    found = inputs_of(again)
    assert unread(again) is None
    assert {f"{n.removesuffix('.weight')}.{spelling}": h.fixed["scale"][0] for n, h in found.items()} == fixed
    assert {str(how.grid) for how in found.values()} == {"fp8-e4m3-tensor-static"}
    convert(str(out.path), "compressed-tensors", tmp_path / "ct")
    convert(str(tmp_path / "ct"), "fp8", tmp_path / "back")
    back = open_path(tmp_path / "back")
    assert settings_of(tmp_path / "back")["activation_scheme"] == "static"
    assert all(torch.equal(how.fixed["scale"], found[n].fixed["scale"]) for n, how in inputs_of(back).items())
    assert set(inputs_of(back)) == set(found) and torch.equal(back.read(NAME), again.read(NAME))
    edited(out.path, gone=f"{modules[0]}.{spelling}")
    with pytest.raises(BadFile, match="activation_scale"):
        open_path(out.path)
    edited(out.path, **{f"{modules[0]}.{spelling}": torch.tensor(-1.0)})
    with pytest.raises(BadFile, match="no scale of inputs"):
        open_path(out.path)


def test_calibration_fixes_the_scales(source: SafetensorsFolder, tmp_path: Path) -> None:
    recipe = "nearest : fp8-e4m3-b128, input=fp8-e4m3-tensor-static > fp8"
    mill.quantize(source, recipe, tmp_path / "out", calib=[__file__], nsamples=2, seqlen=32)
    found = inputs_of(open_path(tmp_path / "out"))
    assert len(found) == 21 and all(float(how.fixed["scale"]) > 0 for how in found.values())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.activation_scale"].shape == ()


def test_what_no_fp8_folder_says(source: SafetensorsFolder, tmp_path: Path) -> None:
    for recipe, said in (
        ("fp8-e4m3-tensor, input=int8-token", "fp8-e4m3-token, fp8-e4m3-tensor-static"),
        ("mxfp8, input=mxfp8", "mxfp8-ceil"),
        ("fp8-e5m2-tensor, input=fp8-e4m3-token", "decoded on loading"),
        ("fp8-e4m3-b128, input=fp8-e4m3-token", "fp8-e4m3-g128-token as they come"),
    ):
        with pytest.raises(Refused, match=said):
            plan(parse(f"nearest : {recipe} > fp8"), source)
    out = written(source, "fp8-e4m3-tensor", tmp_path)
    reconfigured(out.path, activation_scheme="sometimes")
    with pytest.raises(BadFile, match="activation_scheme"):
        open_path(out.path)


def test_even_cuts_that_no_grid_has(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "fp8-e5m2-tensor", tmp_path)
    edited(out.path, **{SCALE: torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    again = open_path(out.path)
    assert again.stored(NAME) is None
    codes = load_file(out.path / "model.safetensors")[NAME].float()
    assert torch.equal(again.read(NAME)[128:, :64], codes[128:, :64] * 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {SCALE: torch.ones(3, 1)},
        {SCALE: torch.ones(0, 1)},
        {SCALE: torch.ones(2)},
        {SCALE: torch.ones(2, 1, 1)},
        {SCALE: torch.ones(2, 1, dtype=torch.int32)},
        {SCALE: torch.ones(2, 1), NAME: torch.ones(4, 4, 4).to(torch.float8_e4m3fn)},
    ],
    ids=str,
)
def test_scales_that_do_not_fit(
    source: SafetensorsFolder, tmp_path: Path, wrong: dict[str, torch.Tensor]
) -> None:
    out = written(source, "fp8-e4m3-b128", tmp_path)
    edited(out.path, SCALE, **wrong)
    with pytest.raises(BadFile, match="up_proj"):
        open_path(out.path)


@pytest.fixture(scope="module")
def folder(source: SafetensorsFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(source, "fp8-e4m3-b128", tmp_path_factory.mktemp("hostile")).path


_BLOCKS = st.lists(st.integers(-1, 300) | st.just(1 << 80), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.none() | st.booleans() | st.floats() | st.text(max_size=3) | _BLOCKS)
def test_any_block_size(folder: Path, value: Any) -> None:
    before = (folder / "config.json").read_text()
    try:
        reconfigured(folder, weight_block_size=value)
        checkpoint = open_path(folder)
        for name, facts in checkpoint.tensors.items():
            assert tuple(checkpoint.read(name).shape) == facts.shape
            checkpoint.stored(name)
    except BitmillError as refusal:
        assert refusal.what
    finally:
        (folder / "config.json").write_text(before)
