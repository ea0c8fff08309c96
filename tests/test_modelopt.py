"""ModelOpt folders as a source. No ModelOpt runs here: folders are made, and decoded a second time, from the
published description of the layout; its readers need a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill import mill
from bitmill.checkpoint.stored_types import unread
from bitmill.containers.modelopt import Modelopt
from bitmill.core.axes import cache_of, inputs_of
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.numerics.inputs import rounded
from bitmill.source import open_path
from tests.tiny import make_model

NAME = "model.layers.0.mlp.up_proj.weight"
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8, NVFP4 = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4", "group_size": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", dtype="bfloat16", num_hidden_layers=1)


def nvfp4(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Stored parts by suffix, and the values they stand for, value by value."""
    whole = (w.abs().max() / (6 * 448)).reshape(())
    blocks = w.reshape(w.shape[0], -1, 16)
    scale = (blocks.abs().amax(-1) / 6 / whole).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    step = scale.float()[..., None] * whole
    nearest = (blocks.abs() / step)[..., None] - torch.tensor(E2M1)
    codes = nearest.abs().argmin(-1) + 8 * (blocks < 0)
    codes = codes.reshape(w.shape).to(torch.uint8)
    values = torch.tensor(E2M1 + [-v for v in E2M1])[codes.long()].reshape(blocks.shape) * step
    packed = codes[:, 0::2] + 16 * codes[:, 1::2]
    return {"": packed, "_scale": scale, "_scale_2": whole}, values.reshape(w.shape)


def fp8(w: torch.Tensor, channel: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    scale = w.abs().amax(1) / 448 if channel else w.abs().max() / 448
    wide = scale[:, None] if channel else scale
    codes = (w / wide).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.float() * wide


def mxfp8(w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    blocks = w.reshape(w.shape[0], -1, 32)
    power = (blocks.abs().amax(-1) / 448).log2().ceil()
    codes = (blocks / power.exp2()[..., None]).to(torch.float8_e4m3fn)
    values = (codes.float() * power.exp2()[..., None]).reshape(w.shape)
    return {"": codes.reshape(w.shape), "_scale": (power + 127).to(torch.uint8)}, values


MAKERS = {
    "nvfp4": nvfp4,
    "fp8-e4m3-tensor": fp8,
    "fp8-e4m3-channel": lambda w: fp8(w, True),
    "mxfp8": mxfp8,
}


def exported(
    model: Path, folder: Path, grids: dict[str, str], settings: dict[str, Any], beside: bool = False
) -> dict[str, torch.Tensor]:
    """A folder as ModelOpt exports it; returns the values of every weight."""
    folder.mkdir()
    tensors, values = load_file(model / "model.safetensors"), {}
    for name in [n for n in tensors if "_proj" in n]:
        role = name.split(".")[-2]
        parts, values[name] = MAKERS[grids.get(role, grids[""])](tensors.pop(name).float())
        tensors.update({name + suffix: part for suffix, part in parts.items()})
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.01)
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(1.0)
    tensors["model.layers.0.self_attn.v_proj.v_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    told = {**settings, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    both = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": told}
    (folder / "hf_quant_config.json").write_text(json.dumps(both))
    if not beside:
        config["quantization_config"] = {"quant_method": "modelopt", **told}
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.mark.parametrize("beside", [False, True], ids=["config", "beside"])
@pytest.mark.parametrize("grid", MAKERS)
def test_values_and_codes(model: Path, tmp_path: Path, grid: str, beside: bool) -> None:
    algorithm = {"nvfp4": NVFP4, "mxfp8": {"quant_algo": "MXFP8"}}.get(grid, FP8)
    values = exported(model, tmp_path / "out", {"": grid}, algorithm, beside)
    source = open_path(tmp_path / "out")
    assert set(source.tensors) == set(load_file(model / "model.safetensors"))
    for name, wanted in values.items():
        # NVFP4: a product of two factors here, a quotient there
        torch.testing.assert_close(source.read(name), wanted, rtol=2.0**-22, atol=0.0)
        stored = source.stored(name)
        assert stored is not None and str(stored.grid) == grid
        assert torch.equal(stored.dense(), source.read(name))
        if grid != "nvfp4":
            assert torch.equal(source.read(name), wanted)


@pytest.mark.parametrize("grid", MAKERS)
def test_inputs_are_rounded_as_its_runtimes_do(model: Path, tmp_path: Path, grid: str) -> None:
    exported(model, tmp_path / "out", {"": grid}, NVFP4 if grid == "nvfp4" else FP8)
    source = open_path(tmp_path / "out")
    found = inputs_of(source)
    assert len(found) == 7 and unread(source) is None
    how = found[NAME]
    wanted = {"nvfp4": "nvfp4", "mxfp8": "mxfp8-ceil"}.get(grid, "fp8-e4m3-tensor-static")
    assert str(how.grid) == wanted
    if wanted == "mxfp8-ceil":
        return
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    if grid == "nvfp4":  # element · block scale · input_scale, all three as ModelOpt has them
        blocks = x.reshape(4, -1, 16)
        scale = (blocks.abs().amax(-1, keepdim=True) / 6 / 0.01).to(torch.float8_e4m3fn).float() * 0.01
        nearest = ((blocks.abs() / scale)[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
        by_hand = (torch.tensor(E2M1)[nearest] * blocks.sign() * scale).reshape(x.shape)
    else:
        by_hand = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01
    torch.testing.assert_close(rounded(how.grid, x, how.fixed), by_hand, rtol=1e-5, atol=1e-7)


def test_without_a_fixed_scale(model: Path, tmp_path: Path) -> None:
    for grid, kind in (("nvfp4", None), ("fp8-e4m3-tensor", None), ("fp8-e4m3-channel", "fp8-e4m3-token")):
        exported(model, tmp_path / grid, {"": grid}, NVFP4 if grid == "nvfp4" else FP8)
        path = tmp_path / grid / "model.safetensors"
        kept = {k: v for k, v in load_file(path).items() if not k.endswith("input_scale")}
        save_file(kept, path, {"format": "pt"})
        assert {str(how.grid) for how in inputs_of(open_path(tmp_path / grid)).values()} == (
            {kind} if kind else set()
        )


def test_mixed_layers_become_another_container(model: Path, tmp_path: Path) -> None:
    grids = {"": "nvfp4", "down_proj": "fp8-e4m3-tensor", "v_proj": "fp8-e4m3-channel"}
    values = exported(model, tmp_path / "out", grids, {"quant_algo": "MIXED_PRECISION"})
    mill.quantize(open_path(tmp_path / "out"), "f32 > safetensors", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert all(torch.allclose(dense[name], value, rtol=1e-6, atol=0) for name, value in values.items())


def test_it_is_not_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="compressed-tensors"):
        mill.quantize(open_path(model), "nearest : nvfp4 > modelopt", tmp_path / "out")
    assert "activations" in str(Modelopt().refuses(parse_grid("fp8-e4m3-tensor"), "q", (64, 64)))


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "NVFP4_SVD", "W8A8_SQ_PER_CHANNEL", 7, ["FP8"]])
def test_other_algorithms_are_named(model: Path, tmp_path: Path, algorithm: Any) -> None:
    exported(model, tmp_path / "out", {"": "nvfp4"}, {"quant_algo": algorithm})
    with pytest.raises(Refused, match="original model|cannot be read"):
        open_path(tmp_path / "out")


@pytest.mark.parametrize(
    ("grid", "wrong"),
    [
        ("nvfp4", {f"{NAME}_scale": torch.ones(256, 7).to(torch.float8_e4m3fn)}),
        ("nvfp4", {f"{NAME}_scale_2": torch.ones(3)}),
        ("nvfp4", {f"{NAME}_scale_2": None}),
        ("nvfp4", {NAME: torch.zeros(256, 64, dtype=torch.int8)}),
        ("nvfp4", {f"{NAME}_scale": None}),
        ("fp8-e4m3-tensor", {f"{NAME}_scale": torch.ones(255)}),
        ("fp8-e4m3-tensor", {f"{NAME}_scale": torch.ones((), dtype=torch.int32)}),
        ("fp8-e4m3-tensor", {f"{NAME}_scale": None}),
        ("fp8-e4m3-tensor", {NAME: torch.zeros(2, 2, 2).to(torch.float8_e4m3fn)}),
    ],
)
def test_parts_that_do_not_fit(
    model: Path, tmp_path: Path, grid: str, wrong: dict[str, torch.Tensor | None]
) -> None:
    exported(model, tmp_path / "out", {"": grid}, NVFP4 if grid == "nvfp4" else FP8)
    path = tmp_path / "out" / "model.safetensors"
    tensors = {k: v for k, v in {**load_file(path), **wrong}.items() if v is not None}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BadFile):
        open_path(tmp_path / "out")


def test_inputs_that_are_scaled(model: Path, tmp_path: Path) -> None:
    exported(model, tmp_path / "out", {"": "nvfp4"}, NVFP4)
    path = tmp_path / "out" / "model.safetensors"
    more = {NAME.replace("weight", "pre_quant_scale"): torch.ones(128)}
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    with pytest.raises(Refused, match="pre_quant_scale"):
        open_path(tmp_path / "out")


def test_the_cache_is_rounded_as_its_runtimes_do(model: Path, tmp_path: Path) -> None:
    """Scales stand beside the projections; one that is not stored is 1."""
    exported(model, tmp_path / "out", {"": "fp8-e4m3-tensor"}, FP8)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.25)
    tensors = {name: value for name, value in tensors.items() if not name.endswith("v_scale")}
    tensors["model.layers.0.self_attn.v_proj.v_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    source = open_path(tmp_path / "out")
    layers = int(source.config["num_hidden_layers"])
    found = {name: float(how.fixed["scale"]) for name, how in cache_of(source).items()}
    wanted = {f"model.layers.{i}.self_attn.{x}_scale": 1.0 for i in range(layers) for x in "kv"}
    wanted |= {"model.layers.0.self_attn.k_scale": 0.25, "model.layers.0.self_attn.v_scale": 0.5}
    assert found == wanted
    assert {str(how.grid) for how in cache_of(source).values()} == {"fp8-e4m3-tensor-static"}


@pytest.mark.parametrize(
    ("told", "scales"),
    [
        ({"kv_cache_quant_algo": None}, 0),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, 2),
        ({"kv_cache_quant_algo": "NVFP4"}, None),
        ({"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, None),
    ],
)
def test_how_settings_speak_of_the_cache(
    model: Path, tmp_path: Path, told: dict[str, Any], scales: int | None
) -> None:
    exported(model, tmp_path / "out", {"": "fp8-e4m3-tensor"}, FP8)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["kv_cache_quant_algo"]
    config["quantization_config"] |= told
    path.write_text(json.dumps(config))
    if scales is None:
        with pytest.raises(Refused, match="keys and values"):
            open_path(tmp_path / "out")
        return
    source = open_path(tmp_path / "out")
    assert len(cache_of(source)) == scales * int(source.config["num_hidden_layers"])
    assert (unread(source) is None) == bool(scales)
