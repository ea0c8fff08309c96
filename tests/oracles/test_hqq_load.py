"""The hqq package as the judge of the folders that carry its name, and as a writer of them.

Its layers load our tensors with nothing missing or left over. In single precision they decode to our values
and compute our logits; in 16 bits each of the two operations of decoding is rounded, which is their way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.hqq import Hqq
from bitmill.core.registry import parse_grid
from bitmill.mill import quantize
from bitmill.source import open_path
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
GRIDS = [
    *("int8-g64-fz", "int6-g64-fz", "int5-g32-fz", "int4-g64-fz", "int3-g64-fz", "int2-g16-fz"),
    *("int4-channel-fz", "int8-r64-fz", "int4-r64-fz", "int3-r64-fz", "int2-r16-fz"),
]


def written(
    folder: Path,
    dtype: str,
    grid: str,
    tied: bool = True,
    other: Mapping[str, str] | None = None,
    family: str = "llama",
) -> tuple[SafetensorsFolder, Written]:
    source = SafetensorsFolder(make_model(folder / "model", family, tied=tied, dtype=NAMES[dtype], **SIZES))
    container = Hqq()
    chosen = {key: container.adapt(parse_grid(text), dtype) for key, text in (other or {}).items()}
    rows = rows_of(container, source, dtype, container.adapt(parse_grid(grid), dtype), chosen)
    return source, write(container, source, rows, folder)


def loaded(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """hqq's layers in transformers' model, filled by ``load_state_dict``."""
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = load_file(path / "model.safetensors")
    for name in [n.removesuffix(".W_q") for n in tensors if n.endswith(".W_q")]:
        model.set_submodule(name, HQQLinear(None, None, compute_dtype=dtype, device="cpu"))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    model.tie_weights()
    return model.eval()


def expected(source: SafetensorsFolder, output: Written, dtype: torch.dtype) -> torch.nn.Module:
    """The dense model of our own decoding."""
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(output.quantized[name].dense())
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(tokens(2, 24)).logits.float()


def check_weights(model: torch.nn.Module, output: Written) -> int:
    checked = 0
    for row in output.rows:
        if row.solved:
            layer = model.get_submodule(row.name.removesuffix(".weight"))
            assert isinstance(layer, HQQLinear)
            assert torch.equal(layer.dequantize(), output.quantized[row.name].dense()), row.name
            checked += 1
    return checked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_layers_decode_to_our_values(tmp_path: Path, grid: str, dtype: str) -> None:
    source, output = written(tmp_path, dtype, grid, tied=dtype == "bf16")
    model = loaded(output.path, torch.float32)
    assert check_weights(model, output) == 7 * SIZES["num_hidden_layers"]
    assert torch.equal(logits(model), logits(expected(source, output, torch.float32)))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("grid", ["int4-g64-fz", "int8-g64-fz", "int3-r64-fz"])
def test_in_16_bits_both_operations_are_rounded(tmp_path: Path, grid: str, dtype: str) -> None:
    source, output = written(tmp_path, dtype, grid)
    model = loaded(output.path, DTYPES[dtype])
    for row in output.rows:
        if row.solved:
            quantized = output.quantized[row.name]
            found = model.get_submodule(row.name.removesuffix(".weight")).dequantize()
            size = found.abs().max()
            assert float((found.float() - quantized.dense()).abs().max() / size) < 2.0 ** (
                -9 if dtype == "f16" else -6
            )
    wanted = logits(expected(source, output, DTYPES[dtype]))
    assert float((logits(model) - wanted).abs().max() / wanted.std()) < (0.1 if dtype == "f16" else 0.6)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3", "mistral", "phi3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    source, output = written(tmp_path, "bf16", "int4-g64-fz", family=family)
    model = loaded(output.path, torch.float32)
    assert check_weights(model, output)
    found, wanted = logits(model), logits(expected(source, output, torch.float32))
    # hqq adds a bias after its product, torch often within it: one rounding more.
    close = 1e-5 * float(wanted.abs().max()) if family == "qwen2" else 0.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=close)


def test_several_grids_and_layers_left_out(tmp_path: Path) -> None:
    other = {"down": "int8-g64-fz", "v": "int4-r64-fz", "gate": "bf16", "head": "int4-g32-fz"}
    source, output = written(tmp_path, "bf16", "int3-g64-fz", False, other)
    model = loaded(output.path, torch.float32)
    kinds = {row.name: type(model.get_submodule(row.name.removesuffix(".weight"))) for row in output.rows}
    for row in output.rows:
        assert (kinds[row.name] is HQQLinear) == str(row.grid).startswith("int"), row.name
    assert torch.equal(logits(model), logits(expected(source, output, torch.float32)))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_folders_that_hqq_wrote(tmp_path: Path, bits: float, axis: int, dtype: str) -> None:
    """Bit for bit what it decodes in single precision, on the grid where there is one."""
    folder = make_model(tmp_path / "model", "qwen2", tied=False, dtype=NAMES[dtype], **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    AutoHQQHFModel.quantize_model(
        model,
        BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis),
        compute_dtype=DTYPES[dtype],
        device="cpu",
    )
    AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "theirs"))
    again, source = open_path(tmp_path / "theirs"), SafetensorsFolder(folder)
    assert set(again.tensors) == set(source.tensors)
    found = 0
    for name, fact in source.tensors.items():
        assert again.tensors[name].shape == fact.shape
        layer = model.get_submodule(name.rpartition(".")[0])
        if not (isinstance(layer, HQQLinear) and name.endswith(".weight")):
            assert torch.equal(again.read(name), source.read(name))
            continue
        layer.compute_dtype = torch.float32
        layer.cuda("cpu")  # what hqq calls the change of type
        theirs = layer.dequantize()
        assert torch.equal(again.read(name), theirs), name
        stored = again.stored(name)
        if bits < 2:
            assert stored is None
        else:
            assert stored is not None and torch.equal(stored.dense(), theirs)
            assert str(stored.grid) == f"int{bits}-{'rg'[axis]}64-fz-s{dtype}"
        found += 1
    assert found == 7 * SIZES["num_hidden_layers"]


def test_why_transformers_5_does_not_load_it(tmp_path: Path) -> None:
    """It fills the layers with random numbers and says so: it has no code for weights that are HQQ's already.
    That of transformers 4 is test_hqq_transformers4.py."""
    _, output = written(tmp_path, "bf16", "int4-g64-fz")
    _, info = AutoModelForCausalLM.from_pretrained(output.path, output_loading_info=True)
    assert len(info["missing_keys"]) == 7 * SIZES["num_hidden_layers"]
    assert any(name.endswith(".W_q") for name in info["unexpected_keys"])


def test_the_embedded_model_writes_text(tmp_path: Path) -> None:
    quantize("smollm2", "hqq", tmp_path / "out")
    model = loaded(tmp_path / "out", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in text
