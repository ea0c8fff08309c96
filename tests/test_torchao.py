"""torchao folders: parts and metadata as its flattened tensors have them, and folders that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.torchao import Torchao
from bitmill.core.errors import BadFile, BitmillError, Refused
from bitmill.core.registry import parse_grid
from bitmill.source import open_path
from tests.tiny import make_model
from tests.written import Written, rows_of, write

NAME = "model.layers.0.mlp.up_proj.weight"
PART = "model.layers.0.mlp.up_proj._weight_"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    return SafetensorsFolder(make_model(tmp_path_factory.mktemp("model"), "llama", dtype="bfloat16"))


def written(source: SafetensorsFolder, grid: str, out: Path, **other: str) -> Written:
    chosen = {role: Torchao().adapt(parse_grid(text), "bf16") for role, text in other.items()}
    rows = rows_of(Torchao(), source, "bf16", Torchao().adapt(parse_grid(grid), "bf16"), chosen)
    return write(Torchao(), source, rows, out)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return dict(file.metadata())


def edited(path: Path, gone: str = "", about: dict[str, str] | None = None, **changes: torch.Tensor) -> None:
    tensors = {k: v for k, v in load_file(path / "model.safetensors").items() if k != gone}
    made = {k: v.contiguous() for k, v in {**tensors, **changes}.items()}
    save_file(made, path / "model.safetensors", {**metadata_of(path), **(about or {})})


def redescribed(path: Path, **attributes: Any) -> None:
    about = json.loads(metadata_of(path)[NAME])
    about["_data"].update(attributes)
    edited(path, about={NAME: json.dumps(about)})


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def test_int8_is_signed_and_by_row(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "int8-channel-sym", tmp_path)
    stored, about = load_file(out.path / "model.safetensors"), metadata_of(out.path)
    codes, scale = stored[f"{PART}qdata"], stored[f"{PART}scale"]
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (256, 1))
    assert torch.equal(codes.float() * scale, out.quantized[NAME].dense())
    assert not stored[f"{PART}zero_point"].any()
    described = json.loads(about[NAME])
    assert described["_type"] == "Int8Tensor" and described["_data"]["block_size"] == [1, 128]
    assert described["_data"]["dtype"] == {"_type": "torch.dtype", "_data": "bfloat16"}
    assert set(json.loads(about["tensor_names"])) == set(out.quantized)
    assert json.loads(about["model.norm.weight"]) == {"_type": "Tensor"}
    assert not any("." in name for name in about if name.startswith("bitmill"))
    assert settings_of(out.path)["quant_type"]["default"]["_type"] == "Int8WeightOnlyConfig"


def test_several_grids_are_named(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "int4-g32-asym", tmp_path, down="fp8-e4m3-channel", v="nvfp4", o="bf16")
    found = settings_of(out.path)
    named = found["quant_type"]["default"]["_data"]["fqn_to_config"]
    kinds = {about["_type"] for about in named.values()}
    assert kinds == {"IntxWeightOnlyConfig", "Float8WeightOnlyConfig", "NVFP4WeightOnlyConfig"}
    assert "model.layers.2.self_attn.o_proj" in found["modules_to_not_convert"]
    again = open_path(out.path)
    assert all(torch.equal(again.read(n).float(), q.dense()) for n, q in out.quantized.items())


@pytest.mark.parametrize(
    ("grid", "role", "said"),
    [
        ("int4-g32-fz", "q", "-asym"),
        ("int8-tensor-sym", "q", "whole integer tensor"),
        ("mxfp8", "q", "> compressed-tensors"),
        ("fp8-e4m3-b128", "q", "> bitmill"),
        ("q4_k", "q", "> bitmill"),
        ("int8-channel-sym", "embed", "layers of the blocks"),
        ("int4-g96-sym", "q", "96"),
    ],
)
def test_refusals_say_where_to_go(grid: str, role: str, said: str) -> None:
    assert said in str(Torchao().refuses(parse_grid(grid), role, (256, 256)))


def test_experts_stay_out(tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", "qwen3moe", num_hidden_layers=1))
    with pytest.raises(Refused, match="experts"):
        Torchao().files(rows_of(Torchao(), source, "f32", parse_grid("fp8-e4m3-channel")), source, {})


def test_scales_in_the_order_of_cublas(source: SafetensorsFolder, tmp_path: Path) -> None:
    """What torchao itself writes: tiles of 128 rows × 4 scales, rows beyond the weight as padding."""
    out = written(source, "nvfp4", tmp_path)
    stored = load_file(out.path / "model.safetensors")
    for name in (NAME, "model.layers.0.self_attn.k_proj.weight"):
        part = name.replace(".weight", "._weight_")
        scale = stored[f"{part}scale"].view(torch.uint8)
        rows, columns = scale.shape
        down, across = -(-rows // 128), -(-columns // 4)
        tiled = torch.zeros(down, across, 512, dtype=torch.uint8)
        for r in range(rows):
            for c in range(columns):
                tiled[r // 128, c // 4, 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = scale[r, c]
        about = json.loads(metadata_of(out.path)[name])
        about["_data"]["is_swizzled_scales"] = True
        shaped = tiled.reshape(down * 32, across * 16).view(torch.float8_e4m3fn)
        edited(out.path, about={name: json.dumps(about)}, **{f"{part}scale": shaped})
    again = open_path(out.path)
    assert all(torch.equal(again.read(n).float(), q.dense()) for n, q in out.quantized.items())


def test_what_no_grid_has_is_still_read(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "int8-g32-sym", tmp_path)
    codes = load_file(out.path / "model.safetensors")[f"{PART}qdata"].float()
    parts = {f"{PART}{p}": torch.full((128, 4), v) for p, v in (("scale", 2.0), ("zero_point", 0.25))}
    edited(out.path, **parts)
    redescribed(out.path, block_size=[2, 32])
    again = open_path(out.path)
    assert again.stored(NAME) is None and torch.equal(again.read(NAME), (codes - 0.25) * 2)


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_parts_that_do_not_fit(source: SafetensorsFolder, tmp_path: Path, part: str) -> None:
    for grid in ("int8-channel-sym", "fp8-e4m3-channel", "nvfp4"):
        out = written(source, grid, tmp_path / grid)
        whole = load_file(out.path / "model.safetensors")[PART + part]
        for wrong in ({}, {PART + part: whole[:-1]}, {PART + part: whole.view(torch.uint8)[None]}):
            edited(out.path, PART + part, **wrong)
            with pytest.raises(BadFile):
                open_path(out.path)


def test_what_is_not_read_says_so(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "int8-channel-sym", tmp_path / "scaled")
    edited(out.path, **{f"{PART}act_pre_scale": torch.ones(128)})
    with pytest.raises(Refused, match="is scaled while"):
        open_path(out.path)
    out = written(source, "int8-channel-sym", tmp_path / "kind")
    edited(out.path, about={NAME: json.dumps({"_type": "Int4Tensor", "_data": {}})})
    with pytest.raises(Refused, match="Int4Tensor"):
        open_path(out.path)
    edited(out.path, about={NAME: "no text of ours"})
    with pytest.raises(BadFile, match="belongs to no weight"):
        open_path(out.path)


@pytest.fixture(scope="module")
def folder(source: SafetensorsFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(source, "int4-g32-asym", tmp_path_factory.mktemp("hostile"), up="nvfp4").path


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.just(1 << 80) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_type", "_data"]), inner),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([NAME, NAME.replace("up", "down")]),
    st.sampled_from(["_type", "block_size", "target_dtype", "is_swizzled_scales", "all"]),
    _ANY,
)
def test_any_description(folder: Path, name: str, key: str, value: Any) -> None:
    before = (folder / "model.safetensors").read_bytes()
    about = json.loads(metadata_of(folder)[name])
    (about if key == "_type" else about["_data"])[key] = value
    try:
        edited(folder, about={name: json.dumps(value if key == "all" else about)})
        checkpoint = open_path(folder)
        for tensor, facts in checkpoint.tensors.items():
            assert tuple(checkpoint.read(tensor).shape) == facts.shape
            checkpoint.stored(tensor)
    except BitmillError as refusal:
        assert refusal.what
    finally:
        (folder / "model.safetensors").write_bytes(before)
