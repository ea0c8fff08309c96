"""bitsandbytes folders byte by byte, what they refuse to hold, and parts that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.bitsandbytes import Bitsandbytes
from bitmill.core.axes import inputs_of
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.core.types import Quantized, Row
from bitmill.mill import quantize
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_path
from bitmill.transfer import convert
from tests.tiny import EXPERTS, make_model
from tests.written import Written, rows_of, write

NAME = "model.layers.0.mlp.up_proj"
WEIGHT = f"{NAME}.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    folder = tmp_path_factory.mktemp("model")
    return SafetensorsFolder(make_model(folder, "llama", tied=True, dtype="bfloat16"))


def written(source: SafetensorsFolder, grid: str, out: Path, **other: str) -> Written:
    chosen = {role: parse_grid(text) for role, text in other.items()}
    return write(
        Bitsandbytes(), source, rows_of(Bitsandbytes(), source, "bf16", parse_grid(grid), chosen), out
    )


def settings_of(out: Written) -> dict[str, Any]:
    return json.loads((out.path / "config.json").read_text())["quantization_config"]


def tensors_of(out: Written) -> dict[str, Tensor]:
    return load_file(out.path / "model.safetensors")


def save(out: Written, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in tensors.items()}, out.path / "model.safetensors")


def text_of(state: Tensor) -> dict[str, Any]:
    return json.loads(bytes(state.tolist()))


def as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_the_first_code_is_in_the_high_half(source: SafetensorsFolder) -> None:
    grid, shape = parse_grid("nf4-b64"), (1, 64)
    codes = torch.tensor([7, 8] * 32, dtype=torch.uint8)[None]
    row = Row(WEIGHT, "up", 0, shape, grid, True, "test")
    parts = Bitsandbytes().pack(row, Quantized(grid, codes, {"absmax": torch.ones(1, 1)}, shape), source)
    assert parts[WEIGHT] == b"\x78" * 32


@pytest.mark.parametrize("grid", ["nf4-b64", "fp4-b64", "nf4-b64-dq", "fp4-b32-dq"])
def test_their_own_reader_of_the_state(source: SafetensorsFolder, tmp_path: Path, grid: str) -> None:
    out = written(source, grid, tmp_path)
    tensors = tensors_of(out)
    for row in out.rows:
        if row.solved:
            mine = {k.removeprefix(f"{row.name}."): v for k, v in tensors.items() if k.startswith(row.name)}
            state = bnb.QuantState.from_dict(
                {k: v for k, v in mine.items() if k != row.name}, device=torch.device("cpu")
            )
            assert (state.dtype, tuple(state.shape)) == (torch.bfloat16, row.shape)
            wanted = out.quantized[row.name].dense(torch.bfloat16)
            assert torch.equal(bnb.dequantize_4bit(mine[row.name], state), wanted)


def test_the_offset_of_any_number_fits(source: SafetensorsFolder) -> None:
    grid = parse_grid("nf4-b64-dq")
    row = Row(WEIGHT, "up", 0, (1, 64), grid, True, "test")
    sizes = Bitsandbytes().slots(row, source)
    for value in (0.0, -0.0, 1 / 3, -1.1754943508222875e-38, 3.4028234663852886e38, 1e-45, -16777217.0):
        offset = torch.tensor(value)
        params = {
            "absmax_code": torch.zeros(1, 1, dtype=torch.uint8),
            "absmax_scale": torch.ones(1),
            "absmax_offset": offset,
        }
        quantized = Quantized(grid, torch.zeros(1, 64, dtype=torch.uint8), params, (1, 64))
        parts = Bitsandbytes().pack(row, quantized, source)
        assert {name: len(data) for name, data in parts.items()} == sizes
        assert torch.equal(torch.tensor(json.loads(parts[STATE])["nested_offset"]), offset)


def test_settings(source: SafetensorsFolder, tmp_path: Path) -> None:
    found = settings_of(written(source, "nf4-b64-dq", tmp_path / "a", o="bf16"))
    assert (found["load_in_4bit"], found["load_in_8bit"]) == (True, False)
    assert (found["bnb_4bit_quant_type"], found["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert found["bnb_4bit_compute_dtype"] == "bfloat16"
    skipped = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    assert found["llm_int8_skip_modules"] == [*skipped, "lm_head"]
    found = settings_of(written(source, "llm-int8", tmp_path / "b"))
    assert (found["load_in_4bit"], found["load_in_8bit"]) == (False, True)
    assert found["llm_int8_threshold"] == 6.0 and found["llm_int8_skip_modules"] == ["lm_head"]


def test_integers_and_tables_do_not_mix(source: SafetensorsFolder, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="4-bit or 8-bit") as caught:
        written(source, "llm-int8", tmp_path, down="nf4-b64")
    assert "> bitmill" in str(caught.value.fix)


def test_experts_are_refused(tmp_path: Path) -> None:
    family = next(iter(EXPERTS))
    model = SafetensorsFolder(make_model(tmp_path / "model", family))
    with pytest.raises(Refused, match="experts"):
        written(model, "nf4-b64", tmp_path)


@pytest.mark.parametrize(
    ("grid", "role", "said"),
    [
        (
            "levels(-1.0,-0.9,-0.8,-0.7,-0.6,-0.5,-0.4,-0.3,0.0,0.1,0.2,0.3,0.4,0.5,0.6,0.7)-b64",
            "q",
            "> bitmill",
        ),
        ("nf4-b96", "q", "not 96"),
        ("int8-channel-sym", "q", "llm-int8 is nearest"),
        ("nf4-b64", "embed", "linear layers"),
        ("nf4-b64", "router", "linear layers"),
        ("nf4-b512", "q", "multiple of 512"),
    ],
)
def test_refusals_say_where_to_go(grid: str, role: str, said: str) -> None:
    assert said in str(Bitsandbytes().refuses(parse_grid(grid), role, (256, 256)))


@pytest.mark.parametrize("grid", ["nf4-b64-dq", "nf4-b64", "llm-int8"])
def test_parts_that_do_not_fit(source: SafetensorsFolder, tmp_path: Path, grid: str) -> None:
    out = written(source, grid, tmp_path)
    tensors = tensors_of(out)
    mine = [name for name in tensors if name.startswith(f"{NAME}.") and not name.endswith("weight_format")]
    assert len(mine) == {"nf4-b64-dq": 6, "nf4-b64": 4, "llm-int8": 2}[grid]
    for name in mine:
        for wrong in ({}, {name: tensors[name][: len(tensors[name]) // 2]}, {name: tensors[name].short()}):
            save(out, {**{k: v for k, v in tensors.items() if k != name}, **wrong})
            with pytest.raises((BadFile, Refused)):
                open_path(out.path).read(WEIGHT)
    save(out, tensors)
    assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [256, 1 << 40]},
        {"shape": [256]},
        {"shape": [0, 128]},
        {"shape": [True, 128]},
        {"shape": [128, 128]},
        {"shape": "big"},
        {"blocksize": 0},
        {"blocksize": 32},
        {"blocksize": 10**30},
        {"blocksize": "64"},
        {"quant_type": "fp4"},
        {"nested_blocksize": 128},
        {"nested_offset": None},
        {"nested_offset": "1"},
        {"nested_offset": True},
        {"nested_offset": float("nan")},
        {"nested_offset": 1e300},
    ],
    ids=str,
)
def test_a_state_that_lies(source: SafetensorsFolder, tmp_path: Path, changes: dict[str, Any]) -> None:
    out = written(source, "nf4-b64-dq", tmp_path)
    tensors = tensors_of(out)
    state = {**text_of(tensors[STATE]), **changes}
    save(out, {**tensors, STATE: as_tensor(json.dumps(state))})
    with pytest.raises((BadFile, Refused)):
        open_path(out.path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 4000, "x" * 5000, "\x00"])
def test_a_state_that_is_no_state(source: SafetensorsFolder, tmp_path: Path, text: str) -> None:
    out = written(source, "nf4-b64", tmp_path)
    save(out, {**tensors_of(out), STATE: as_tensor(text)})
    with pytest.raises(BadFile):
        open_path(out.path)


def test_a_table_of_ones_own(source: SafetensorsFolder, tmp_path: Path) -> None:
    """bitsandbytes decodes by its built-in table whatever the file says, so another one is no help."""
    out = written(source, "nf4-b64", tmp_path)
    tensors = tensors_of(out)
    save(out, {**tensors, f"{WEIGHT}.quant_map": tensors[f"{WEIGHT}.quant_map"] + 0.01})
    with pytest.raises(Refused, match="table"):
        open_path(out.path)


def test_other_storage_types(source: SafetensorsFolder, tmp_path: Path) -> None:
    """Files for sharded training keep the same bytes as wider numbers."""
    out = written(source, "nf4-b64-dq", tmp_path)
    tensors = tensors_of(out)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        save(out, {**tensors, WEIGHT: tensors[WEIGHT].reshape(-1).view(dtype)[:, None]})
        assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())


def test_rows_that_were_tiled_for_a_gpu(source: SafetensorsFolder, tmp_path: Path) -> None:
    out = written(source, "llm-int8", tmp_path)
    tensors = tensors_of(out)
    save(out, {**tensors, f"{NAME}.weight_format": torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(Refused, match="tiled"):
        open_path(out.path)
    save(out, {k: v for k, v in tensors.items() if not k.endswith("weight_format")})
    assert torch.equal(open_path(out.path).read(WEIGHT), out.quantized[WEIGHT].dense())


def test_eight_bits_say_what_their_inputs_become(tmp_path: Path) -> None:
    """The runtime rounds them unasked: the plan and the file say so. Those of 4 bits it leaves."""
    source = SafetensorsFolder(make_model(tmp_path / "model"))
    made = plan(parse("int8"), source)
    assert {str(row.inputs) for row in made.rows if row.solved} == {"llm-int8"}
    assert any("llm-int8 at run time" in text for text in made.remarks)
    quantize(source, "int8", tmp_path / "eight")
    found = inputs_of(open_path(tmp_path / "eight"))
    assert set(found) == {row.name for row in made.rows if row.solved}
    assert not any(row.inputs for row in plan(parse("nf4"), source).rows)
    with pytest.raises(Refused, match="8-bit layers round inputs to llm-int8"):
        plan(parse("nearest : llm-int8, input=int8-token > bitsandbytes"), source)
    config = tmp_path / "eight" / "config.json"
    config.write_text(config.read_text().replace('"llm_int8_threshold": 6.0', '"llm_int8_threshold": "6"'))
    with pytest.raises(BadFile, match="llm_int8_threshold"):
        open_path(tmp_path / "eight")


@pytest.mark.parametrize("kept", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_layers_are_decoded_to_what_the_recipe_keeps(tmp_path: Path, stored: str, kept: str) -> None:
    """Not to the source's type: bitsandbytes would round weights to it between file and product."""
    model = make_model(tmp_path / "model", dtype=stored)
    quantize(str(model), f"nf4-b64-dq, dtype={kept} > bitsandbytes", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    wanted = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kept]
    assert {text_of(v)["dtype"] for name, v in tensors.items() if "bitsandbytes__" in name} == {wanted}
    assert config["dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == wanted


def test_converted_layers_are_decoded_to_what_is_kept(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype="bfloat16")
    quantize(str(model), "nf4-b64 > bitmill", tmp_path / "own")
    convert(str(tmp_path / "own"), "bitsandbytes", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert text_of(tensors[STATE])["dtype"] == "bfloat16"
