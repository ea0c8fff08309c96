"""transformers and torchao as the judges of torchao folders, both ways, on a CPU.

torchao's int8 class multiplies codes first and scales afterwards, so that its logits differ from ours in the
last bits; all the other layouts are decoded and then multiplied.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    MappingType,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig

from bitmill.checkpoint import safetensors_write
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.torchao import Torchao
from bitmill.core.registry import parse_grid
from bitmill.source import open_path
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
FULL = {"f32": "float32", "bf16": "bfloat16"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
GRIDS = [
    *("int8-channel-sym", "int8-channel-asym", "int8-g32-sym", "int4-g32-asym", "int3-g64-asym"),
    *("int4-channel-sym", "int2-g32-sym", "fp8-e4m3-channel", "fp8-e4m3-tensor", "fp8-e5m2-channel", "nvfp4"),
]


def written(
    folder: Path, dtype: str, grid: str, other: dict[str, str] | None = None, family: str = "llama"
) -> tuple[Path, Written]:
    model = make_model(folder / "model", family, tied=family == "gemma3", dtype=FULL[dtype], **SIZES)
    source, container = SafetensorsFolder(model), Torchao()
    chosen = {key: container.adapt(parse_grid(text), dtype) for key, text in (other or {}).items()}
    rows = rows_of(container, source, dtype, container.adapt(parse_grid(grid), dtype), chosen)
    return model, write(container, source, rows, folder)


def loaded(path: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens(2, 24)).logits


def compare(model: Path, output: Written, dtype: str) -> None:
    """Every weight as torchao decodes it, and the logits."""
    found = loaded(output.path)
    dense = {name: quantized.dense().to(DTYPES[dtype]) for name, quantized in output.quantized.items()}
    kinds = set()
    for row in output.rows:
        parameter = found.get_parameter(row.name)
        if str(row.grid) == dtype:
            assert type(parameter) is torch.nn.Parameter
            continue
        kinds.add(type(parameter).__name__)
        # a product of two factors against a quotient of two: the last bit of single precision
        close = {"rtol": 2.0**-22, "atol": 0.0} if str(row.grid) == "nvfp4" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(parameter.dequantize(), dense[row.name], **close)
    save_file(dense, model / "model.safetensors", {"format": "pt"})
    exact = "Int8Tensor" not in kinds and not (dtype == "f32" and "NVFP4Tensor" in kinds)
    wanted = logits(loaded(model))
    tolerance = 0.0 if exact else {"f32": 1e-4, "bf16": 0.2}[dtype]
    torch.testing.assert_close(logits(found), wanted, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_reloads_exactly(tmp_path: Path, grid: str, dtype: str) -> None:
    model, output = written(tmp_path, dtype, grid, {"o": dtype})
    compare(model, output, dtype)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    model, output = written(tmp_path, "bf16", "int4-g32-asym", family=family)
    compare(model, output, "bf16")


def test_several_grids_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(safetensors_write.safetensors_images, max_shard_bytes=400_000)
    monkeypatch.setattr(safetensors_write, "safetensors_images", small)
    other = {"down": "fp8-e4m3-channel", "v": "int4-g32-asym", "up": "nvfp4", "o": "bf16"}
    other["model.layers.0.mlp.gate_proj.weight"] = "int2-g32-sym"
    model, output = written(tmp_path, "bf16", "int8-g32-sym", other)
    assert len(list(output.path.glob("*.safetensors"))) > 1
    compare(model, output, "bf16")
    again = open_path(output.path)
    assert all(torch.equal(again.read(n).float(), q.dense()) for n, q in output.quantized.items())


CONFIGS: dict[str, Any] = {
    "int8-channel-sym": Int8WeightOnlyConfig(version=2),
    "int8-channel-sym ": Int8DynamicActivationInt8WeightConfig(version=2),
    "fp8-e4m3-channel": Float8WeightOnlyConfig(),
    "fp8-e5m2-channel": Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "int4-g32-sym": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int4-g32-asym": IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
    ),
    "int2-channel-sym": IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=PerAxis(0)),
    "nvfp4": NVFP4WeightOnlyConfig(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", CONFIGS)
def test_what_torchao_writes(tmp_path: Path, grid: str, dtype: str) -> None:
    """Quantized by torchao, saved by transformers, read by us: its own decoding, codes on the grid we say."""
    source = make_model(tmp_path / "model", "llama", tied=False, dtype=FULL[dtype], **SIZES)
    how = TorchAoConfig(CONFIGS[grid])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=how)
    model.save_pretrained(tmp_path / "out")
    again = open_path(tmp_path / "out")
    assert set(again.tensors) == set(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        stored = again.stored(name)
        if "proj" not in name:
            assert stored is None and torch.equal(again.read(name), parameter)
            continue
        assert stored is not None
        grid_ = parse_grid(grid.strip())
        assert Torchao().adapt(stored.grid, dtype) == Torchao().adapt(grid_, dtype)
        assert torch.equal(stored.dense(), again.read(name))
        close = {"rtol": 2.0**-22, "atol": 0.0} if grid == "nvfp4" else {"rtol": 0.0, "atol": 0.0}
        whole = parameter.dequantize()
        torch.testing.assert_close(again.read(name).to(whole.dtype), whole, **close)
