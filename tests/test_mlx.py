"""MLX folders: the layout by a decoder of its own, settings layer by layer, folders that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.gptq import Gptq
from bitmill.containers.mlx import Mlx
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Row
from bitmill.grids.biased import Biased
from bitmill.grids.integer import Integer
from bitmill.source import open_path
from tests.tiny import make_model
from tests.written import Written, rows_of, write

NAME = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NAME}.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    return SafetensorsFolder(make_model(tmp_path_factory.mktemp("model"), "llama", tied=True))


def written(source: SafetensorsFolder, out: Path, grid: str, dtype: str = "f32", **other: str) -> Written:
    container = Mlx()
    chosen = {key: container.adapt(parse_grid(text), dtype) for key, text in other.items()}
    rows = rows_of(container, source, dtype, container.adapt(parse_grid(grid), dtype), chosen)
    return write(container, source, rows, out)


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def by_hand(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes as MLX documents them: one stream of bits a row, lowest first."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return np.packbits(stream.reshape(len(words), -1, bits), axis=-1, bitorder="little")[..., 0]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_scales_and_biases(source: SafetensorsFolder, tmp_path: Path, bits: int, dtype: str) -> None:
    out = written(source, tmp_path, f"int{bits}-g32-bias", dtype)
    stored = load_file(out.path / "model.safetensors")
    words, scales, biases = (stored[f"{NAME}.{part}"] for part in ("weight", "scales", "biases"))
    assert words.dtype is torch.uint32 and words.shape == (256, 128 * bits // 32)
    assert scales.dtype is biases.dtype is stored["model.norm.weight"].dtype
    codes = torch.from_numpy(by_hand(words.numpy(), bits)).float().reshape(256, 4, 32)
    value = codes * scales.float()[..., None] + biases.float()[..., None]
    assert torch.equal(value.reshape(256, 128), out.quantized[WEIGHT].dense())


def test_settings_name_every_layer_of_another_kind(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, tmp_path, "int4-g64-bias", "bf16", embed="int6-g64-bias", v="mxfp4", o="bf16")
    config = config_of(out.path)
    wanted: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
    wanted["model.embed_tokens"] = {"group_size": 64, "bits": 6, "mode": "affine"}
    for layer in range(3):
        wanted[f"model.layers.{layer}.self_attn.v_proj"] = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert config["quantization"] == config["quantization_config"] == wanted
    again = open_path(out.path)
    assert {name for name in again.tensors if again.stored(name)} == {
        r.name for r in out.rows if r.solved
    } - {r.name for r in out.rows if r.role == "o"}
    for name, quantized in out.quantized.items():
        assert torch.equal(again.read(name).float(), quantized.dense())


def test_zero_points_as_biases() -> None:
    container = Mlx()
    for asked, dtype, settled in (
        ("int4-g64-asym", "f32", "int4-g64-asym-sf16"),
        ("int4-g64-asym-sbf16-z1", "f32", "int4-g64-asym-sbf16"),
        ("int4-g64-asym-sf32", "f32", "int4-g64-bias-sf32"),
        ("int4-g64-asym", "bf16", "int4-g64-bias-sbf16"),
        ("int4-g64-fz", "f16", "int4-g64-bias-sf16"),
        ("int4-g64-sym", "bf16", "int4-g64-sym-sbf16"),
        ("int4-g64-sym", "f32", "int4-g64-bias-sf32"),
        ("nvfp4", "bf16", "nvfp4-flat"),
    ):
        assert str(container.adapt(parse_grid(asked), dtype)) == settled


@pytest.mark.parametrize(
    ("grid", "role", "said"),
    [
        ("int7-g64-bias", "q", "2, 3, 4, 5, 6 or 8"),
        ("int4-g256-bias", "q", "32, 64 or 128"),
        ("int4-channel-sym", "q", "32, 64 or 128"),
        ("mxfp6-e2m3", "q", "> bitmill"),
        ("nf4-b64", "q", "> bitmill"),
        ("int4-g64-bias", "norm", "not the norm"),
    ],
)
def test_refusals(grid: str, role: str, said: str) -> None:
    assert said in str(Mlx().refuses(parse_grid(grid), role, (256, 256)))


def test_single_experts_are_refused(source: SafetensorsFolder) -> None:
    row = Row("model.layers.0.mlp.experts.3.fc1.weight", "up", 0, (64, 64), Biased(4, 64), True, "test")
    with pytest.raises(Refused, match="no place"):
        Mlx().files([row], source, {})


@pytest.mark.parametrize("grid", ["int4-g32-bias", "int3-g64-sym", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts_are_stacks(family: str, grid: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family, dtype="bfloat16", num_hidden_layers=1)
    source = SafetensorsFolder(model)
    out = written(source, tmp_path, grid)
    stored = load_file(out.path / "model.safetensors")
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    stack = stored[f"model.layers.0.{block}.switch_mlp.down_proj.weight"]
    assert stack.dim() == 3 and len(stack) == (4 if family == "mixtral" else 8)
    assert not any(".experts." in name for name in stored)
    again = open_path(out.path)
    assert set(again.tensors) == set(source.tensors)
    for name, quantized in out.quantized.items():
        assert torch.equal(again.read(name).float(), quantized.dense()), name
        found = again.stored(name)
        assert found is None or torch.equal(found.dense(), quantized.dense())


def test_experts_go_together(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen3moe", dtype="bfloat16", num_hidden_layers=1)
    source = SafetensorsFolder(model)
    grids = {"gate": "int8-g32-bias", "up": "int8-g32-bias", "down": "mxfp8"}
    out = written(source, tmp_path / "several", "int4-g32-bias", **grids)
    said = json.loads((out.path / "config.json").read_text())["quantization"]
    assert said["model.layers.0.mlp.switch_mlp.down_proj"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    kept = written(source, tmp_path / "kept", "int4-g32-bias", gate="bf16", up="bf16", down="bf16")
    assert set(open_path(kept.path).tensors) == set(source.tensors)
    with pytest.raises(Refused, match="all together"):
        written(source, tmp_path / "up", "int4-g32-bias", up="bf16")
    odd = {"model.layers.0.mlp.experts.3.up_proj.weight": "int8-g32-bias"}
    with pytest.raises(Refused, match="all on one grid"):
        written(source, tmp_path / "odd", "int4-g32-bias", **odd)
    odd = {"model.layers.0.mlp.experts.3.up_proj.weight": "bf16"}
    with pytest.raises(Refused, match="all together"):
        written(source, tmp_path / "one", "int4-g32-bias", **odd)
    path = written(source, tmp_path / "bad", "int4-g32-bias").path / "model.safetensors"
    tensors, name = load_file(path), "model.layers.0.mlp.switch_mlp.up_proj"
    for wrong in ({f"{name}.scales": tensors[f"{name}.scales"][:-1]}, {f"{name}.weight": None}):
        made = {k: v.contiguous() for k, v in {**tensors, **wrong}.items() if v is not None}
        save_file(made, path, {"format": "mlx"})
        with pytest.raises(BadFile):
            open_path(path.parent)


def test_integers_of_gptq_are_the_same_integers(source: SafetensorsFolder, tmp_path: Path) -> None:
    """Half-precision scales and whole zero points, from GPTQ into a single-precision MLX folder and back."""
    gptq = Gptq(version=2)
    grid = gptq.adapt(parse_grid("int4-g32-asym"), "f32")
    first = write(gptq, source, rows_of(gptq, source, "f32", grid), tmp_path / "gptq")
    found = open_path(first.path).stored(WEIGHT)
    assert found is not None
    settled = Mlx().adapt(found.grid, "f32")
    assert isinstance(settled, Integer) and settled.zero == "asym"
    out = written(source, tmp_path / "mlx", "int4-g32-asym")
    row = next(r for r in out.rows if r.name == WEIGHT)
    parts = Mlx().pack(row, found, source)
    tensors = load_file(out.path / "model.safetensors")
    for name, data in parts.items():
        dtype = tensors[name].dtype
        tensors[name] = torch.frombuffer(bytearray(data), dtype=dtype).reshape(tensors[name].shape)
    save_file(tensors, out.path / "model.safetensors", {"format": "mlx"})
    again = open_path(out.path).stored(WEIGHT)
    assert again is not None and again.same_values(found) and torch.equal(again.codes, found.codes)
    assert all(torch.equal(again.params[key], found.params[key]) for key in ("scale", "zero"))


def test_rotary_settings_by_their_older_names(source: SafetensorsFolder, tmp_path: Path) -> None:
    found = config_of(written(source, tmp_path / "plain", "int4-g64-bias").path)
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] and "rope_scaling" not in found
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    path = make_model(tmp_path / "yarn", "qwen3", rope_parameters=rope)
    found = config_of(written(SafetensorsFolder(path), tmp_path, "int4-g64-bias").path)
    assert found["rope_theta"] == 5000.0
    assert found["rope_scaling"]["type"] == "yarn" and found["rope_scaling"]["factor"] == 4.0
    local = make_model(tmp_path / "local", "gemma3")
    found = config_of(written(SafetensorsFolder(local), tmp_path / "gemma", "int4-g64-bias").path)
    ropes = found["rope_parameters"]
    assert found["rope_theta"] == ropes["full_attention"]["rope_theta"]
    assert found["rope_local_base_freq"] == ropes["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 7},
        {"bits": 5},
        {"bits": "4"},
        {"bits": True},
        {"group_size": 0},
        {"group_size": 64},
        {"group_size": 1 << 40},
        {"mode": "nf4"},
        {"mode": ["affine"]},
        {"mode": "mxfp4"},
        {NAME: True},
        {NAME: {"bits": 8, "group_size": 32}},
        {NAME: {}},
    ],
    ids=str,
)
def test_settings_that_lie(source: SafetensorsFolder, tmp_path: Path, changes: dict[str, Any]) -> None:
    out = written(source, tmp_path, "int4-g32-bias")
    config = config_of(out.path)
    config["quantization"] |= changes
    (out.path / "config.json").write_text(json.dumps(config))
    with pytest.raises((BadFile, Refused)):
        open_path(out.path)


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_parts_that_do_not_fit(source: SafetensorsFolder, tmp_path: Path, part: str) -> None:
    out = written(source, tmp_path, "int4-g32-bias")
    path = out.path / "model.safetensors"
    tensors = load_file(path)
    name = f"{NAME}.{part}"
    for wrong in ({}, {name: tensors[name][:-1]}, {name: tensors[name].view(torch.int16)}):
        others = {key: value for key, value in tensors.items() if key != name}
        save_file({k: v.contiguous() for k, v in {**others, **wrong}.items()}, path, {"format": "mlx"})
        with pytest.raises((BadFile, Refused)):
            open_path(out.path).read(WEIGHT)


def test_joined_experts_are_not_read(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, tmp_path, "int4-g32-bias")
    path = out.path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.switch_mlp.up_proj.global_scale"] = torch.ones(4)
    save_file(tensors, path, {"format": "mlx"})
    with pytest.raises(Refused, match="share a scale"):
        open_path(out.path)
