"""compressed-tensors and transformers as the judges of rounded inputs: the rounding itself bit for bit, the
files' keys, the logits of a model that runs with it, and what their own compressor writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from transformers import AutoModelForCausalLM

from bitmill.calibrate.stream import Stream
from bitmill.containers.compressed_tensors import CompressedTensors
from bitmill.core.axes import inputs_of
from bitmill.core.inputs import EXAMPLES, InputGrid, parse_inputs
from bitmill.mill import quantize
from bitmill.numerics.inputs import fixed_params, rounded
from bitmill.run.load import load_model
from bitmill.source import open_source
from tests.tiny import make_model, tokens

pytestmark = pytest.mark.client

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
SINGLE = [
    "int8-channel-sym, input=int8-token",
    "int8-channel-sym, input=int8-token-asym",
    "int8-channel-sym, input=int8-tensor",
    "int8-channel-sym, input=int8-tensor-static",
    "int8-channel-sym, input=int8-tensor-static-asym",
    "int8-channel-asym-sf32, input=int8-token",
    "int4-g128-sym, input=int8-token",
    "int4-channel-sym, input=int4-token",
    "int4-g64-sym, input=int4-g64-token",
    "int4-g64-sym, input=int4-g128-token-asym",
    "int3-g32-sym, input=fp8-e4m3-token",
    "int8-g64-sym, input=int8-token",
    "int8-channel-sym, input=fp8-e4m3-token",
    "fp8-e4m3-channel, input=fp8-e4m3-token",
    "fp8-e4m3-tensor, input=fp8-e4m3-tensor-static",
    "fp8-e4m3-tensor, input=fp8-e4m3-tensor",
    "fp8-e4m3-b128, input=fp8-e4m3-g128-token",
]
HALF = [
    "int8-channel-sym, input=int8-tensor-static",
    "fp8-e4m3-tensor, input=fp8-e4m3-tensor-static",
    "nvfp4, input=nvfp4",
    "mxfp4, input=mxfp4",
    "mxfp4, input=mxfp8",
    "mxfp4, input=fp8-e4m3-g128-token",
    "mxfp6-e2m3, input=mxfp8",
    "mxfp6-e2m3, input=mxfp6-e2m3",
    "mxfp8, input=mxfp8",
]
CASES = [("float32", grids) for grids in SINGLE] + [("bfloat16", grids) for grids in HALF]


def described(grid: InputGrid) -> QuantizationArgs:
    """The package's own arguments for an input grid."""
    about: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int" if grid.element == "int" else "float",
        "symmetric": grid.symmetric,
        "dynamic": not grid.static,
        "strategy": grid.extent,
        "group_size": grid.group or None,
    }
    if grid.scaling == "mx":
        about["scale_dtype"] = torch.uint8
    if grid.scaling == "nv":
        about |= {"strategy": "tensor_group", "dynamic": "local", "scale_dtype": torch.float8_e4m3fn}
    return QuantizationArgs(**about)


OTHERS = (
    "llm-int8",
    "mxfp8-ceil",
    "bitnet-int8",
)  # bitsandbytes' rule, and those of transformers' own layers
PACKAGE = [text for text in EXAMPLES if text not in OTHERS]


@pytest.mark.parametrize("text", [*PACKAGE, "int4-g32-token-asym", "int2-token", "int6-tensor-asym"])
def test_rounding_is_the_packages_bit_for_bit(text: str) -> None:
    grid = parse_inputs(text)
    about = described(grid)
    rng = torch.Generator().manual_seed(0)
    for trial in range(20):
        x = torch.randn(1, 17, 256, generator=rng) * 10 ** float(torch.rand(1, generator=rng) * 6 - 4)
        if trial % 3 == 0:
            x *= torch.rand(256, generator=rng) ** 4
            x[..., 7] *= 50
            x[:, 3] = 0
            x[:, :, 64:96] = 0
        x = x.abs() if trial % 3 == 1 else x
        fixed = fixed_params(grid, x.min(), x.max(), torch.float32)
        gain = zero = None
        if grid.static:
            scale, zero = calculate_qparams(x.min(), x.max(), about)
            assert torch.equal(scale, fixed["scale"])
            assert grid.symmetric or torch.equal(zero.float(), fixed["zero"])
        else:
            if grid.scaling == "nv":
                gain = generate_gparam(x.min(), x.max())
                assert torch.equal(gain, fixed["gain"])
            scale, zero = compute_dynamic_scales_and_zp(x, about, torch.nn.Identity(), gain)
        assert torch.equal(fake_quantize(x, scale, zero, about, gain), rounded(grid, x, fixed))


@pytest.mark.parametrize(("dtype", "grids"), CASES)
def test_the_client_runs_what_we_simulate(tmp_path: Path, dtype: str, grids: str) -> None:
    """Decoded by the client, then in single precision on both sides: the same numbers to the last places."""
    source = make_model(tmp_path / "model", dtype=dtype, **SIZES)
    out, ids = tmp_path / "out", tokens(1, 24)
    quantize(
        str(source),
        f"nearest : {grids} > compressed-tensors",
        out,
        calib=tokens(4, 32),
        nsamples=4,
        seqlen=32,
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    with torch.no_grad():
        model(ids)  # decodes the weights
        torch.nn.Module.to(model, torch.float32)
        found = model(ids).logits
    checkpoint = open_source(str(out))
    ours = load_model(checkpoint)
    names = dict(ours.named_parameters())
    assert len(inputs_of(checkpoint)) == 14
    for name, parameter in model.named_parameters():
        if name in names and dtype == "float32":
            torch.testing.assert_close(parameter, names[name], rtol=1e-6, atol=1e-8)
        if name in names:
            names[name].data.copy_(parameter)  # the client decodes in the model's own precision
    with torch.no_grad():
        simulated = ours(ids).logits
        for module in ours.modules():
            module._forward_pre_hooks.clear()
        plain = ours(ids).logits
    step = (simulated - plain).abs().mean()
    assert (found - simulated).abs().mean() < 1e-3 * step
    if dtype == "float32":
        stream = Stream(checkpoint)
        torch.testing.assert_close(stream.logits(stream.hidden(ids)), simulated, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "inputs", "grid", "rounding", "layout"),
    [
        ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "token", "dynamic": True},
         "int8-channel-sym", "int8-token", "int-quantized"),
        ({"num_bits": 8, "strategy": "tensor"}, {"num_bits": 8, "strategy": "tensor", "symmetric": False},
         "int8-tensor-sym", "int8-tensor-static-asym", "int-quantized"),
        ({"num_bits": 8, "type": "float", "strategy": "tensor"},
         {"num_bits": 8, "type": "float", "strategy": "tensor"},
         "fp8-e4m3-tensor", "fp8-e4m3-tensor-static", "float-quantized"),
        ({"num_bits": 4, "strategy": "group", "group_size": 64},
         {"num_bits": 8, "strategy": "token", "dynamic": True},
         "int4-g64-sym", "int8-token", "pack-quantized"),
    ],
)  # fmt: skip
def test_what_the_package_writes_is_read(
    tmp_path: Path, weights: dict[str, Any], inputs: dict[str, Any], grid: str, rounding: str, layout: str
) -> None:
    source = make_model(tmp_path / "model", **SIZES)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    about = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), input_activations=QuantizationArgs(**inputs)
    )
    about.format = layout
    settings = QuantizationConfig(config_groups={"group_0": about}, ignore=["lm_head"])
    apply_quantization_config(model, settings)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        value = module.weight.data
        wide = value.unflatten(1, (-1, weights["group_size"])) if "group_size" in weights else value
        dims = (-1,) if weights["strategy"] != "tensor" else (0, 1)
        low, high = (
            wide.amin(dims, keepdim="group_size" not in weights),
            wide.amax(dims, keepdim="group_size" not in weights),
        )
        scale, _ = calculate_qparams(low, high, about.weights)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if not inputs.get("dynamic"):
            scale, zero = calculate_qparams(torch.tensor(-3.0), torch.tensor(5.0), about.input_activations)
            module.input_scale.data.copy_(scale)
            if not inputs.get("symmetric", True):
                module.input_zero_point.data.copy_(zero)
        module.quantization_status = QuantizationStatus.FROZEN
    ids = tokens(1, 24)
    with torch.no_grad():
        wanted = model(ids).logits
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    compressor.remove_decompression_hook(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["format"] == layout
    assert CompressedTensors.recognises(tmp_path / "out")
    checkpoint = open_source(str(tmp_path / "out"))
    stored = {str(checkpoint.stored(name).grid) for name in inputs_of(checkpoint)}  # type: ignore[union-attr]
    assert {text.removesuffix("-sf32") for text in stored} == {grid}
    assert {str(how.grid) for how in inputs_of(checkpoint).values()} == {rounding}
    assert len(inputs_of(checkpoint)) == 14
    with torch.no_grad():
        torch.testing.assert_close(load_model(checkpoint)(ids).logits, wanted, rtol=1e-4, atol=1e-4)
