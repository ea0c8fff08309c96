"""transformers with bitsandbytes as the judge of the folders that carry its name, and as a writer of them.

Decoded weights are equal bit for bit. Logits are compared with dense models, and each forward pass of the
client rounds in its own way, which stands beside its test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.bitsandbytes import Bitsandbytes
from bitmill.core.registry import parse_grid
from bitmill.mill import quantize
from bitmill.numerics import llm_int8
from bitmill.run.load import load_model
from bitmill.source import open_path, open_source
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
TABLES = ["nf4-b64", "nf4-b64-dq", "fp4-b64", "fp4-b64-dq", "nf4-b32", "nf4-b128-dq", "fp4-b256"]
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def written(
    folder: Path,
    dtype: str,
    grid: str,
    tied: bool = True,
    other: Mapping[str, str] | None = None,
    family: str = "llama",
) -> tuple[SafetensorsFolder, Written]:
    source = SafetensorsFolder(make_model(folder / "model", family, tied=tied, dtype=NAMES[dtype], **SIZES))
    chosen = {key: parse_grid(text) for key, text in (other or {}).items()}
    rows = rows_of(Bitsandbytes(), source, dtype, parse_grid(grid), chosen)
    return source, write(Bitsandbytes(), source, rows, folder)


def loaded(path: Path, **options: Any) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype="auto", **options
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def dense_of(model: torch.nn.Module, module: str) -> Tensor:
    """The client's own decoding of one layer, before it has computed anything with it."""
    layer = model.get_submodule(module)
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return layer.weight.data


def expected(source: SafetensorsFolder, output: Written, dtype: torch.dtype) -> torch.nn.Module:
    """The dense model of our own decoding."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(output.quantized[name].dense())
    return model


def portable(model: torch.nn.Module) -> torch.nn.Module:
    """The model without the kernels for AVX512-BF16, whose layout also takes rows by 32 only."""
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(tokens(2, 24)).logits.float()


def apart(one: Tensor, other: Tensor) -> float:
    """Distance in units of the spread of logits."""
    return float((one - other).abs().max() / other.std())


def check_weights(model: torch.nn.Module, output: Written) -> None:
    for row in output.rows:
        if row.solved:
            found = dense_of(model, row.name.removesuffix(".weight"))
            wanted = output.quantized[row.name].dense()
            assert torch.equal(found, wanted.to(found.dtype)), row.name


@tied_or_not
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", TABLES)
def test_tables_decode_to_our_values(tmp_path: Path, grid: str, dtype: str, tied: bool) -> None:
    """Logits are equal. Where the processor can, the client's usual forward pass multiplies in bfloat16 and
    rounds block scales to it, and is as near as that is."""
    source, output = written(tmp_path, dtype, grid, tied)
    model = loaded(output.path)
    check_weights(model, output)
    wanted = logits(expected(source, output, DTYPES[dtype]))
    assert torch.equal(logits(portable(model)), wanted)
    assert apart(logits(loaded(output.path)), wanted) < 0.3


@pytest.mark.parametrize(("stored", "kept"), [("f16", "f32"), ("f32", "bf16"), ("bf16", "f16")])
def test_tables_in_another_precision_than_the_source(tmp_path: Path, stored: str, kept: str) -> None:
    path = make_model(tmp_path / "model", dtype=NAMES[stored], **SIZES)
    quantize(str(path), f"nf4-b64-dq, dtype={kept} > bitsandbytes", tmp_path / "out")
    model, ours = loaded(tmp_path / "out"), load_model(open_source(str(tmp_path / "out")), DTYPES[kept])
    module = "model.layers.0.mlp.up_proj"
    found = dense_of(model, module)
    assert found.dtype is DTYPES[kept]
    assert torch.equal(found, ours.get_submodule(module).weight)
    assert torch.equal(logits(portable(model)), logits(ours))


@tied_or_not
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_decode_to_our_values(tmp_path: Path, dtype: str, tied: bool) -> None:
    """The forward pass is ours, bit for bit."""
    source, output = written(tmp_path, dtype, "llm-int8", tied)
    model = loaded(output.path)
    check_weights(model, output)
    reference = expected(source, output, DTYPES[dtype])
    found = logits(model)
    assert apart(found, logits(reference)) < 0.3
    for row in output.rows:
        if row.solved:
            simulate(reference.get_submodule(row.name.removesuffix(".weight")), output, row.name)
    assert torch.equal(found, logits(reference))


def simulate(layer: torch.nn.Module, output: Written, name: str) -> None:
    quantized = output.quantized[name]
    absmax = quantized.params["absmax"].reshape(-1)
    layer.forward = lambda x: llm_int8.matmul(x, quantized.codes, absmax, layer.bias)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "mistral", "phi3"])
@pytest.mark.parametrize("grid", ["nf4-b64-dq", "llm-int8"])
def test_other_families(tmp_path: Path, family: str, grid: str) -> None:
    source, output = written(tmp_path, "bf16", grid, family=family)
    model = loaded(output.path)
    check_weights(model, output)
    assert apart(logits(model), logits(expected(source, output, torch.bfloat16))) < 0.5


@tied_or_not
def test_several_tables_and_layers_left_out(tmp_path: Path, tied: bool) -> None:
    other = {
        "down": "fp4-b128",
        "v": "nf4-b32",
        "gate": "bf16",
        "model.layers.1.self_attn.o_proj.weight": "bf16",
        **({} if tied else {"head": "nf4-b64-dq"}),
    }
    source, output = written(tmp_path, "bf16", "nf4-b64-dq", tied, other)
    model = loaded(output.path)
    check_weights(model, output)
    kinds = {row.name: type(model.get_submodule(row.name.removesuffix(".weight"))) for row in output.rows}
    for row in output.rows:
        table = str(row.grid).startswith(("nf4", "fp4"))
        assert (kinds[row.name] is bnb.nn.Linear4bit) == table, row.name
    assert torch.equal(logits(portable(model)), logits(expected(source, output, torch.bfloat16)))


@pytest.mark.parametrize("grid", ["nf4-b64", "nf4-b64-dq", "fp4-b64", "fp4-b64-dq", "llm-int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_folders_that_bitsandbytes_wrote(tmp_path: Path, grid: str, dtype: str) -> None:
    """Their quantization of the same model, saved by them, read by us: bit for bit what they decode."""
    folder = make_model(tmp_path / "model", "llama", tied=False, dtype=NAMES[dtype], **SIZES)
    if grid == "llm-int8":
        wanted = BitsAndBytesConfig(load_in_8bit=True)
    else:
        wanted = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=grid[:3],
            bnb_4bit_use_double_quant=grid.endswith("-dq"),
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], quantization_config=wanted)
    model.save_pretrained(tmp_path / "theirs")
    again = open_path(tmp_path / "theirs")
    source = SafetensorsFolder(folder)
    assert set(again.tensors) == set(source.tensors)
    found = 0
    for name, fact in source.tensors.items():
        assert again.tensors[name].shape == fact.shape
        stored = again.stored(name)
        if stored is None:
            assert torch.equal(again.read(name), source.read(name))
            continue
        found += 1
        assert str(stored.grid) == grid
        theirs = dense_of(model, name.removesuffix(".weight"))
        assert torch.equal(stored.dense().to(theirs.dtype), theirs)
        assert torch.equal(again.read(name), stored.dense())
        if grid == "llm-int8":
            ours = parse_grid(grid).round(source.read(name).half().float())
            assert torch.equal(ours.codes, stored.codes) and torch.equal(ours.dense(), stored.dense())
    assert found == 7 * SIZES["num_hidden_layers"]


def test_blocks_across_rows(tmp_path: Path) -> None:
    """Blocks of 64 in rows of 96: no grid of ours, and still every value. (The client's CPU kernel gets such
    rows wrong; asked for one long row, it does not.)"""
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24, "intermediate_size": 96}
    folder = make_model(tmp_path / "model", "llama", dtype="float32", **sizes)
    wanted = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=wanted)
    model.save_pretrained(tmp_path / "theirs")
    again = open_path(tmp_path / "theirs")
    name = "model.layers.0.mlp.up_proj"
    assert again.stored(f"{name}.weight") is None
    model.get_submodule(name).weight.quant_state.shape = torch.Size((1, 96 * 96))
    assert torch.equal(again.read(f"{name}.weight"), dense_of(model, name).reshape(96, 96))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_the_embedded_model_writes_text(tmp_path: Path, name: str) -> None:
    quantize("smollm2", name, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    model = loaded(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in text
