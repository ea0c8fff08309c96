"""compressed-tensors and transformers as the judges of a rounded cache: the file's keys, the scales as their
own modules hold them, the logits of a model that runs with it, and what they write themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.modeling import QuantizedKVCache
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from transformers import AutoModelForCausalLM

from bitmill.core.axes import cache_of
from bitmill.mill import quantize
from bitmill.run.load import load_model
from bitmill.source import open_source
from tests.tiny import make_model, tokens

pytestmark = pytest.mark.client

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
CASES = [
    ("llama", "float32", "int4-g64-sym, cache=fp8"),
    ("llama", "bfloat16", "int4-g64-sym, cache=fp8"),
    ("llama", "float32", "int4-g64-sym, cache=fp8-head"),
    ("llama", "float32", "int4-g64-sym, cache=int8-tensor-static"),
    ("llama", "float32", "int8-channel-sym, input=int8-token, cache=int8-head"),
    ("llama", "bfloat16", "fp8-e4m3-tensor, input=fp8-e4m3-tensor-static, cache=fp8"),
    ("llama", "bfloat16", "nvfp4, input=nvfp4, cache=fp8"),
    ("llama", "float32", "f32, cache=fp8"),
    ("qwen3", "float32", "int4-g64-sym, cache=fp8"),
    ("gemma3", "float32", "int4-g64-sym, cache=fp8-head"),
    ("phi3", "float32", "int4-g64-sym, cache=fp8"),
    ("llama", "float32", "int4-g64-sym, cache=int4-token-asym"),
    ("qwen3", "float32", "int8-channel-sym, input=int8-token, cache=int3-g16-token-asym"),
    ("gemma3", "float32", "int4-g64-sym, cache=int4-token"),
]


@pytest.mark.parametrize(("family", "dtype", "grids"), CASES)
def test_the_client_runs_what_we_simulate(tmp_path: Path, family: str, dtype: str, grids: str) -> None:
    source = make_model(tmp_path / "model", family, dtype=dtype, **SIZES)
    out, ids = tmp_path / "out", tokens(1, 24)
    line = f"nearest : {grids} > compressed-tensors"
    quantize(str(source), line, out, calib=tokens(4, 32), nsamples=4, seqlen=32)
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    checkpoint, attentions = open_source(str(out)), []
    for name, how in cache_of(checkpoint).items():
        scales = how.fixed if how.grid.static else {}
        assert all(torch.equal(model.get_parameter(name).float(), scale) for scale in scales.values())
        attentions.append(model.get_submodule(name.rpartition(".")[0]))
        assert any(isinstance(inside, QuantizedKVCache) for inside in attentions[-1].children())
    with torch.no_grad():
        model(ids)  # decodes the weights
        torch.nn.Module.to(model, torch.float32)
        ours = load_model(checkpoint)
        for name, parameter in ours.named_parameters():
            parameter.copy_(model.get_parameter(name))  # the client decodes in the model's own precision
        found, wanted = model(ids).logits, ours(ids).logits
        for attention in attentions:
            attention.quantization_enabled = False
        without = model(ids).logits
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 2e-5 * scale
    assert float((without - wanted).abs().max()) > 2e-4 * scale  # it is the cache that was compared
    made = model.generate(ids[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert made.shape == (1, 12)


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize(("kind", "bits"), [("float", 8), ("int", 8)])
def test_what_they_write(tmp_path: Path, strategy: str, kind: str, bits: int) -> None:
    """A model that the package itself prepares and saves, with scales of our choice."""
    source = make_model(tmp_path / "model", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scheme = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=True, dynamic=False)
    config = QuantizationConfig(
        config_groups={}, kv_cache_scheme=scheme, quantization_status=QuantizationStatus.COMPRESSED, ignore=[]
    )
    apply_quantization_config(model, config)
    wanted = {}
    for at, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith(("k_scale", "v_scale")):
            parameter.data.copy_(torch.full_like(parameter, 0.01) * (1 + at % 3))
            wanted[name] = parameter.detach().clone()
    with torch.no_grad():
        logits = model(tokens(1, 24)).logits
    model.save_pretrained(tmp_path / "out")
    ModelCompressor(quantization_config=config).update_config(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["strategy"] == strategy
    checkpoint = open_source(str(tmp_path / "out"))
    found = cache_of(checkpoint)
    assert len(wanted) == 4 and set(found) == set(wanted)
    assert all(torch.equal(how.fixed["scale"], wanted[name]) for name, how in found.items())
    with torch.no_grad():
        torch.testing.assert_close(load_model(checkpoint)(tokens(1, 24)).logits, logits, rtol=1e-4, atol=1e-4)
