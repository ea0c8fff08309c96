"""The compressed-tensors package as the judge of rotations: models that it rotates, runs and saves are read
by us as dense weights that need no rotation, and what we write is rotated and run by it. transformers 5 loads
such folders without their rotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.transform import (
    TransformArgs,
    TransformConfig,
    TransformScheme,
    apply_transform_config,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitmill import mill
from bitmill.calibrate.stream import Stream
from bitmill.core.axes import inputs_of
from bitmill.core.errors import Refused
from bitmill.run.load import load_model
from bitmill.source import open_path
from tests.tiny import make_model, tokens

pytestmark = pytest.mark.client


def place(location: str, targets: list[str], inverse: bool = False) -> TransformArgs:
    return TransformArgs(targets=targets, location=location, inverse=inverse)


PART = {"a": {"type": "hadamard", "head_dim": 32, "apply": [place("q_attn", ["LlamaAttention"])]}}
DOWN, QKV = ["re:.*down_proj$"], ["re:.*(q|k|v)_proj$"]
SCHEMES: dict[str, dict[str, Any]] = {
    "R4": {
        "u": {"type": "hadamard", "apply": [place("input", DOWN), place("weight_input", DOWN, True)]},
    },
    "QuIP": {
        "v": {
            "type": "random-hadamard",
            "apply": [place("input", QKV + DOWN), place("weight_input", QKV + DOWN, True)],
        },
        "u": {
            "type": "random-hadamard",
            "apply": [place("weight_output", QKV + DOWN), place("output", QKV + DOWN, True)],
        },
    },
    "blocks": {
        "b": {
            "type": "hadamard",
            "head_dim": 32,
            "apply": [place("input", ["Linear"]), place("weight_input", ["Linear"], True)],
        },
    },
    "permuted": {
        "p": {
            "type": "hadamard",
            "randomize": True,
            "apply": [place("input", DOWN), place("weight_input", DOWN, True)],
        },
    },
    "R3": {
        "a": {
            "type": "hadamard",
            "head_dim": 32,
            "apply": [place("q_attn", ["LlamaAttention"]), place("k_cache", ["LlamaAttention"])],
        },
    },
    "R1 in the file only": {
        "r": {"type": "hadamard", "apply": [place("weight_output", ["re:.*up_proj$"])]},
    },
}


def saved(folder: Path, scheme: str, quantized: bool, inputs: dict[str, Any] | None = None) -> torch.Tensor:
    """A folder that the package wrote; returns the logits of the model that it ran."""
    source = make_model(folder / "model", "llama", tied=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    groups = {name: TransformScheme(**group) for name, group in SCHEMES.get(scheme, PART).items()}
    apply_transform_config(model, TransformConfig(config_groups=groups))
    if quantized:
        weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        settings = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
        apply_quantization_config(model, settings)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and "weight_scale" in dict(module.named_parameters()):
                low = module.weight.unflatten(-1, (-1, 32)).abs().amax(-1) / 7.5
                module.weight_scale.data.copy_(low)
    with torch.no_grad():
        logits = model(tokens(2, 12)).logits
    compressor = ModelCompressor.from_pretrained_model(model)
    if quantized:
        compressor.compress_model(model)
    model.save_pretrained(folder / "out")
    compressor.update_config(folder / "out")
    return logits


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "int4"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_runs_rotated_is_read_unrotated(tmp_path: Path, scheme: str, quantized: bool) -> None:
    wanted = saved(tmp_path, scheme, quantized)
    found = open_path(tmp_path / "out")
    with torch.no_grad():
        logits = load_model(found)(tokens(2, 12)).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=2e-3)
    rotated = found.stored("model.layers.0.mlp.down_proj.weight")
    plain = found.stored("model.layers.0.mlp.gate_proj.weight")
    if quantized:
        assert (rotated is None) == (scheme not in ("R1 in the file only", "R3"))
        assert (plain is None) == (scheme == "blocks")
    mill.quantize(found, "hf-f32", tmp_path / "dense")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()(tokens(2, 12)).logits
    assert torch.equal(again, logits)


@pytest.mark.parametrize("scheme", ["R4", "QuIP", "blocks", "permuted"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_inputs_are_rounded_where_it_runs_rotated(
    tmp_path: Path, scheme: str, bits: int, symmetric: bool
) -> None:
    """In four symmetric bits the largest value of a token lies halfway between two levels, and its last place
    decides: no two orders of summation agree there."""
    about = {"num_bits": bits, "type": "int", "strategy": "token", "dynamic": True, "symmetric": symmetric}
    wanted = saved(tmp_path, scheme, True, about)
    found = open_path(tmp_path / "out")
    assert any(how.basis is not None for how in inputs_of(found).values())
    ids, spread = tokens(2, 12), float(wanted.std())
    with torch.no_grad():
        model = load_model(found)
        error = float((model(ids).logits - wanted).abs().mean()) / spread
        plain = Stream(found, inputs={})
        off = float((plain.logits(plain.hidden(ids)) - wanted).abs().mean()) / spread
    assert error < 0.02 and off > 3 * error


WRITTEN = [
    ("llama", 256, "hadamard(r4=true)", "int8-channel-sym, input=int8-token-asym"),
    ("llama", 192, "hadamard(r4=true)", "int8-channel-sym, input=int8-token-asym"),
    ("llama", 192, "hadamard(r4=true, block=64)", "int4-g32-sym"),
    ("qwen3", 256, "hadamard(r4=true)", "int4-g32-sym, input=int8-token-asym, cache=int8-token"),
    ("gemma3", 192, "hadamard(r4=true)", "int4-g32-sym, cache=int8-token"),
    ("phi3", 256, "hadamard(r4=true)", "f32, cache=int4-g16-token-asym"),
]


def test_rotated_queries_are_rounded_with_the_cache_there(tmp_path: Path) -> None:
    """Why R3 is not written here: the package then wants a scale for queries, which no cache has."""
    source, out = make_model(tmp_path / "model", num_hidden_layers=1), tmp_path / "out"
    line = "nearest : int4-g32-sym, cache=fp8 > compressed-tensors"
    mill.quantize(str(source), line, out, calib=tokens(4, 32), nsamples=4, seqlen=32)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    apply_transform_config(model, TransformConfig(config_groups={"a": TransformScheme(**SCHEMES["R3"]["a"])}))
    with torch.no_grad(), pytest.raises(AttributeError, match="q_scale"):
        model(tokens(2, 12))


@pytest.mark.parametrize(("family", "middle", "rotations", "grids"), WRITTEN)
def test_what_we_write_runs_there(
    tmp_path: Path, family: str, middle: int, rotations: str, grids: str
) -> None:
    """Loaded by transformers, rotated by the package as the folder's own ``transform_config`` says."""
    source = make_model(tmp_path / "model", family, num_hidden_layers=2, intermediate_size=middle)
    line, out, ids = f"{rotations} + nearest : {grids} > compressed-tensors", tmp_path / "out", tokens(2, 12)
    mill.quantize(str(source), line, out, calib=tokens(4, 32), nsamples=4, seqlen=32)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        without = model(ids).logits
    about = json.loads((out / "config.json").read_text())["quantization_config"]["transform_config"]
    asked = TransformConfig(**about)  # what is there, is what the package knows
    for group in asked.config_groups.values():
        group.apply = [one for one in group.apply if one.is_online()]  # the others are in the weights
    apply_transform_config(model, asked)
    stored = {name: value for name, value in load_file(out / "model.safetensors").items() if "R4_" in name}
    matrices = [n for n, group in asked.config_groups.items() if group.type == "random-hadamard"]
    assert len(stored) == len(matrices) == (middle == 192 and "block" not in rotations and "r4" in rotations)
    for name, value in stored.items():
        model.get_parameter(name).data.copy_(value)  # one parameter for all layers
    with torch.no_grad():
        wanted, found = model(ids).logits, load_model(open_path(out))(ids).logits
    spread = float(wanted.std())
    assert float((found - wanted).abs().mean()) < 0.005 * spread
    assert float((without - wanted).abs().mean()) > 0.01 * spread


def test_transformers_leaves_the_rotations_out(tmp_path: Path) -> None:
    """Why a plan warns of such a folder: this reader computes something else."""
    wanted = saved(tmp_path, "R4", True)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert float((loaded(tokens(2, 12)).logits - wanted).abs().max()) > 0.1


def test_one_side_of_attention_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "R3 in part", True)
    with pytest.raises(Refused, match="queries and keys"):
        open_path(tmp_path / "out")
