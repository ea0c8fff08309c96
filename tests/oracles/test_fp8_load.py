"""transformers as the judge of FP8 folders. Without a GPU it decodes them as it loads; the layers that would
multiply in FP8 are built and filled here too, and not run: their kernels need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.fp8 import Fp8
from bitmill.core.registry import parse_grid
from bitmill.source import open_path
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
FULL = {"f32": "float32", "bf16": "bfloat16"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
NATIVE = ["fp8-e4m3-b128", "fp8-e4m3-tensor", "mxfp8"]
DECODED = ["fp8-e5m2-b128", "fp8-e5m2-tensor", "fp8-e5m2-channel", "mxfp8-e5m2"]


def written(folder: Path, family: str, dtype: str, grid: str, tied: bool = False) -> tuple[Path, Written]:
    sizes = {**SIZES, **({"moe_intermediate_size": 128} if family == "qwen3moe" else {})}
    model = make_model(folder / "model", family, tied=tied, dtype=FULL[dtype], **sizes)
    source = SafetensorsFolder(model)
    rows = rows_of(Fp8(), source, dtype, parse_grid(grid), {"o": parse_grid(dtype)})
    return model, write(Fp8(), source, rows, folder)


def loaded(path: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def of_our_decoding(model: Path, output: Written, dtype: str) -> torch.nn.Module:
    """The dense folder of our own values, loaded."""
    dense = {name: quantized.dense().to(DTYPES[dtype]) for name, quantized in output.quantized.items()}
    save_file(dense, model / "model.safetensors", {"format": "pt"})
    return loaded(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens(2, 24)).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", NATIVE + DECODED)
def test_decoding_is_exact(tmp_path: Path, grid: str, dtype: str) -> None:
    model, output = written(tmp_path, "llama", dtype, grid)
    found = logits(loaded(output.path))
    assert found.dtype is DTYPES[dtype]
    assert torch.equal(found, logits(of_our_decoding(model, output, dtype)))


@pytest.mark.parametrize("family", ["gemma3", "phi3", "qwen3", "mixtral", "qwen3moe"])
def test_other_families(tmp_path: Path, family: str) -> None:
    model, output = written(
        tmp_path, family, "bf16", "fp8-e4m3-b128", tied=family not in ("mixtral", "qwen3moe")
    )
    assert torch.equal(logits(loaded(output.path)), logits(of_our_decoding(model, output, "bf16")))


@pytest.mark.parametrize("grid", NATIVE)
def test_layers_that_multiply_in_fp8(tmp_path: Path, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: its FP8 layers take every tensor, the layers that stay dense are not among them, and what
    transformers then saves is read by us."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    _, output = written(tmp_path, "llama", "bf16", grid)
    model = loaded(output.path)
    for row in output.rows:
        if len(row.shape) != 2 or row.role == "embed":
            continue
        layer = model.get_submodule(row.name.removesuffix(".weight"))
        placed = row.solved and row.role != "o"
        assert isinstance(layer, finegrained_fp8.FP8Linear) is placed, row.name
        if placed:
            quantized = output.quantized[row.name]
            assert torch.equal(layer.weight.view(torch.uint8), quantized.codes)
            whole = finegrained_fp8._dequantize_fp8_weight(
                layer.weight.data, layer.weight_scale_inv.data, layer.block_size, torch.float32
            )
            assert torch.equal(whole, quantized.dense()), row.name
    model.save_pretrained(tmp_path / "again")
    again = open_path(tmp_path / "again")
    for name, quantized in output.quantized.items():
        assert torch.equal(again.read(name).float(), quantized.dense()), name
        stored = again.stored(name)
        assert stored is None or (
            stored.grid == quantized.grid and torch.equal(stored.codes, quantized.codes)
        )


@pytest.mark.parametrize("grid", NATIVE)
@pytest.mark.parametrize("kept", [False, True])
def test_experts_that_multiply_in_fp8(
    tmp_path: Path, grid: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    model = make_model(tmp_path / "m", "qwen3moe", dtype="bfloat16", moe_intermediate_size=128, **SIZES)
    source = SafetensorsFolder(model)
    other = {role: parse_grid("bf16") for role in ("gate", "up", "down") if kept}
    output = write(Fp8(), source, rows_of(Fp8(), source, "bf16", parse_grid(grid), other), tmp_path)
    experts = loaded(output.path).get_submodule("model.layers.0.mlp.experts")
    wanted = torch.bfloat16 if kept or grid == "fp8-e4m3-tensor" else torch.float8_e4m3fn
    assert experts.get_parameter("down_proj").dtype is wanted


def test_why_tiles_are_whole(tmp_path: Path) -> None:
    """The refusal rests on this: 192 rows in two tiles are decoded as 96 and 96, not as 128 and 64."""
    sizes = {**SIZES, "intermediate_size": 192, "num_hidden_layers": 1}
    source = SafetensorsFolder(make_model(tmp_path / "model", "llama", **sizes))
    grid = parse_grid("fp8-e4m3-b128")
    assert "equal tiles" in str(Fp8().refuses(grid, "up", (192, 256)))
    output = write(Fp8(), source, rows_of(Fp8(), source, "f32", grid), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    found, wanted = loaded(output.path).get_parameter(name), output.quantized[name].dense()
    assert torch.equal(found[:96], wanted[:96]) and not torch.equal(found[96:128], wanted[96:128])
    assert torch.equal(open_path(output.path).read(name), wanted)
