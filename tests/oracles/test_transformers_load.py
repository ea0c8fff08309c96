"""transformers as the judge of what the folder containers write: no key missing or unexpected, equal logits.

compressed-tensors decodes on the first forward pass; GPTQModel decodes in half precision. What a client is
known to compute differently stands beside its test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.compressed_tensors import CompressedTensors
from bitmill.containers.gptq import Gptq
from bitmill.core.axes import Container
from bitmill.core.errors import Refused
from bitmill.core.registry import parse_grid
from bitmill.run.load import load_model
from bitmill.source import open_path
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
EXACT = {
    "f32": [
        *("int2-g32-sym", "int3-g32-sym", "int4-g64-sym", "int5-g64-sym", "int6-g128-sym", "int7-g32-sym"),
        *("int8-channel-sym", "int4-channel-sym", "int4-g64-sym-sf32", "int4-g64-sym-sbf16"),
        *("fp8-e4m3-channel", "fp8-e4m3-tensor", "fp8-e4m3-b128"),
    ],
    "bf16": [
        *("int2-g32-sym", "int3-g32-sym", "int4-g64-sym", "int8-channel-sym"),
        *("mxfp4", "mxfp8", "mxfp6-e2m3", "nvfp4"),
    ],
}
CASES = [(dtype, grid) for dtype, grids in EXACT.items() for grid in grids]
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def written(
    container: Container,
    folder: Path,
    dtype: str,
    grid: str,
    tied: bool,
    other: Mapping[str, str] | None = None,
    family: str = "llama",
) -> tuple[SafetensorsFolder, Written]:
    full = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    source = SafetensorsFolder(make_model(folder / "model", family, tied=tied, dtype=full, **SIZES))
    chosen = {key: container.adapt(parse_grid(text), dtype) for key, text in (other or {}).items()}
    rows = rows_of(container, source, dtype, container.adapt(parse_grid(grid), dtype), chosen)
    return source, write(container, source, rows, folder)


def loaded(path: Path, **options: Any) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def expected(source: SafetensorsFolder, output: Written, dtype: torch.dtype) -> torch.nn.Module:
    """The dense model of our own decoding."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(output.quantized[name].dense())
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens(2, 24)).logits


@tied_or_not
@pytest.mark.parametrize(("dtype", "grid"), CASES)
def test_compressed_tensors_is_exact(tmp_path: Path, dtype: str, grid: str, tied: bool) -> None:
    source, output = written(CompressedTensors(), tmp_path, dtype, grid, tied)
    found = logits(loaded(output.path, dtype="auto"))
    assert found.dtype is DTYPES[dtype]
    assert torch.equal(found, logits(expected(source, output, DTYPES[dtype])))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "mistral"])
def test_compressed_tensors_in_other_families(tmp_path: Path, family: str) -> None:
    source, output = written(CompressedTensors(), tmp_path, "bf16", "int4-g32-sym", True, family=family)
    found = logits(loaded(output.path, dtype="auto"))
    assert torch.equal(found, logits(expected(source, output, torch.bfloat16)))


@tied_or_not
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_with_several_grids(tmp_path: Path, dtype: str, tied: bool) -> None:
    other = {
        "down": "int8-channel-sym",
        "gate": "int3-g32-sym",
        "up": "int3-g32-sym",
        "v": "fp8-e4m3-channel" if dtype == "f32" else "mxfp8",
        "model.layers.0.mlp.down_proj.weight": "int2-g32-sym" if dtype == "f32" else "mxfp4",
        "model.layers.1.self_attn.o_proj.weight": dtype,
        **({} if tied else {"head": "int8-channel-sym"}),
    }
    source, output = written(CompressedTensors(), tmp_path, dtype, "int4-g64-sym", tied, other)
    settings = json.loads((output.path / "config.json").read_text())["quantization_config"]
    assert len(settings["config_groups"]) == 5 and settings["format"] == "mixed-precision"
    found = logits(loaded(output.path, dtype="auto"))
    assert torch.equal(found, logits(expected(source, output, DTYPES[dtype])))


@tied_or_not
@pytest.mark.parametrize(
    ("dtype", "grid"), [("bf16", "int4-g64-asym"), ("bf16", "int3-g32-asym"), ("f32", "int4-g64-asym-sf32")]
)
def test_zero_points_by_the_dequantizing_route(tmp_path: Path, dtype: str, grid: str, tied: bool) -> None:
    """The default route of transformers 5.23 expects unpacked zero points and refuses them."""
    source, output = written(CompressedTensors(), tmp_path, dtype, grid, tied)
    route = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    found = logits(loaded(output.path, dtype="auto", **route))
    assert torch.equal(found, logits(expected(source, output, DTYPES[dtype])))


def test_that_route_decodes_in_the_scales_own_precision(tmp_path: Path) -> None:
    """Half-precision scales in a single-precision model: the client rounds each value to half precision."""
    _, output = written(CompressedTensors(), tmp_path, "f32", "int4-g64-asym", True)
    model = loaded(output.path, dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True))
    name = "model.layers.0.mlp.up_proj.weight"
    found = dict(model.named_parameters())[name]
    assert torch.equal(found, output.quantized[name].dense().half().float())


@pytest.mark.parametrize("grid", ["fp8-e4m3-channel", "fp8-e4m3-tensor", "fp8-e4m3-b128"])
def test_fp8_scales_become_the_models_type(tmp_path: Path, grid: str) -> None:
    """In a bfloat16 model transformers rounds the scales to bfloat16; the codes are exact."""
    _, output = written(CompressedTensors(), tmp_path, "bf16", grid, True)
    model = loaded(output.path, dtype="auto")
    logits(model)
    parameters = dict(model.named_parameters())
    for row in output.rows:
        if row.solved:
            quantized = output.quantized[row.name]
            rounded = {"scale": quantized.params["scale"].bfloat16().float()}
            wanted = quantized.grid.decode(quantized.codes, rounded).bfloat16()
            assert torch.equal(parameters[row.name], wanted), row.name


@pytest.mark.parametrize("grid", ["mxfp4", "mxfp6-e2m3", "mxfp8", "nvfp4"])
def test_why_small_floats_want_bfloat16(tmp_path: Path, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal rests on this: the client decodes to bfloat16 whatever the model is."""
    with pytest.raises(Refused, match="bfloat16"):
        written(CompressedTensors(), tmp_path / "refused", "f32", grid, True)
    monkeypatch.setattr("bitmill.containers.compressed_tensors._refuse_precision", lambda *_: None)
    _, output = written(CompressedTensors(), tmp_path, "f32", grid, True)
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(loaded(output.path, dtype="auto"))


@tied_or_not
@pytest.mark.parametrize(
    "grid",
    [
        *("int4-g64-sym", "int4-g64-asym", "int4-channel-sym", "int8-g32-sym", "int8-channel-asym"),
        *("int3-g32-sym", "int3-g64-asym", "int2-g32-asym"),
    ],
)
def test_gptq_decodes_to_our_values(tmp_path: Path, grid: str, tied: bool) -> None:
    """GPTQModel's own decoding of every layer is ours rounded to half precision, and so are the logits."""
    source, output = written(Gptq(), tmp_path, "f32", grid, tied)
    # `bits` is overridden by the file; the plain torch kernel is the one that runs everywhere
    model = loaded(output.path, dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend="torch"))
    reference = expected(source, output, torch.float32)
    for row in output.rows:
        if row.solved:
            layer = model.get_submodule(row.name.removesuffix(".weight"))
            wanted = output.quantized[row.name].dense().half()
            assert torch.equal(layer.dequantize_weight().T, wanted), row.name
            reference.get_parameter(row.name).data.copy_(wanted)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-3)


def test_gptq_with_a_kept_layer(tmp_path: Path) -> None:
    source, output = written(Gptq(), tmp_path, "bf16", "int4-g64-sym", False, {"o": "bf16"})
    model = loaded(output.path, dtype=torch.float32, quantization_config=GPTQConfig(bits=4, backend="torch"))
    assert type(model.get_submodule("model.layers.0.self_attn.o_proj")) is torch.nn.Linear
    torch.testing.assert_close(
        logits(model), logits(expected(source, output, torch.float32)), rtol=1e-2, atol=5e-2
    )


@pytest.mark.parametrize("grid", ["int4-g32-sym", "int3-g32-sym", "fp8-e4m3-channel", "fp8-e4m3-tensor"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_experts_of_compressed_tensors(tmp_path: Path, family: str, grid: str) -> None:
    """Decoded as they are loaded: the others of a block's layers too, so that all values are ours."""
    _, output = written(CompressedTensors(), tmp_path, "bf16", grid, False, family=family)
    how = CompressedTensorsConfig(dequantize=True)
    model = loaded(output.path, dtype=torch.bfloat16, quantization_config=how)
    with torch.no_grad():
        wanted = load_model(open_path(output.path), torch.bfloat16)(tokens(2, 12)).logits
        assert torch.equal(model(tokens(2, 12)).logits, wanted)


@pytest.mark.parametrize("grid", ["int4-g32-asym", "nvfp4"])
def test_experts_that_transformers_does_not_load(tmp_path: Path, grid: str) -> None:
    """With zero points it fails; NVFP4 it misreads without a word. vLLM is who they are for."""
    _, output = written(CompressedTensors(), tmp_path, "bf16", grid, False, family="mixtral")
    try:
        model = loaded(output.path, dtype=torch.bfloat16)
    except RuntimeError:
        assert grid == "int4-g32-asym"
        return
    with torch.no_grad():
        wanted = load_model(open_path(output.path), torch.bfloat16)(tokens(2, 12)).logits
        assert float((model(tokens(2, 12)).logits - wanted).abs().max()) > 1
