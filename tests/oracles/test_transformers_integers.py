"""transformers with GPTQModel as the judge of AWQ and GPTQ version 2 folders; its packers as writers.

GPTQModel's torch kernels decode to half precision: every weight is ours, rounded to it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.awq import Awq
from bitmill.containers.gptq import Gptq
from bitmill.core.axes import Container
from bitmill.core.registry import parse_grid
from bitmill.grids.integer import Integer
from bitmill.source import open_path
from tests.tiny import make_model, tokens
from tests.written import Written, rows_of, write

pytestmark = pytest.mark.client

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
AWQ_GRIDS = ("int4-g64-asym", "int4-g16-asym", "int4-g32-sym", "int4-g128-sym", "int4-channel-asym")
V2_GRIDS = ("int4-g64-asym", "int4-g64-sym", "int3-g64-asym", "int2-g32-asym", "int8-channel-asym")
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def written(container: Container, folder: Path, grid: str, tied: bool, **other: str) -> Written:
    path = make_model(folder / "model", "llama", tied=tied, **SIZES) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][:8].abs_()  # zero points of 0
    save_file(tensors, path, {"format": "pt"})
    source = SafetensorsFolder(path.parent)
    chosen = {role: parse_grid(text) for role, text in other.items()}
    rows = rows_of(container, source, "f32", container.adapt(parse_grid(grid), "f32"), chosen)
    return write(container, source, rows, folder)


def loaded(path: Path, **options: object) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def agree(model: torch.nn.Module, output: Written, most: float = 4e-3) -> None:
    """The logits of the dense model of our own decoding, in half precision."""
    dense = AutoModelForCausalLM.from_pretrained(output.path.parent / "model", dtype=torch.float32).eval()
    for row in output.rows:
        values = output.quantized[row.name].dense()
        dense.get_parameter(row.name).data.copy_(values.half() if row.solved else values)
    ids = tokens(2, 24)
    wanted = dense(ids).logits
    distance = float((model(ids).logits.float() - wanted).norm() / wanted.norm())
    assert distance < most, distance  # the kernels round activations to half precision as well
    made = model.generate(ids[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert made.shape == (1, 12)


@tied_or_not
@pytest.mark.parametrize("grid", AWQ_GRIDS)
def test_awq_folders(tmp_path: Path, grid: str, tied: bool) -> None:
    output = written(Awq(), tmp_path, grid, tied)
    route = {"quantization_config": AwqConfig(backend="torch_awq")}
    model = loaded(output.path, dtype=torch.float32, **route)
    for row in output.rows:
        if row.solved:
            layer = model.get_submodule(row.name.removesuffix(".weight"))
            assert isinstance(layer, AwqTorchLinear)
            found = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size)
            assert torch.equal(found.T, output.quantized[row.name].dense().half()), row.name
    agree(model, output)


def test_awq_as_the_file_itself_asks(tmp_path: Path) -> None:
    output = written(Awq(), tmp_path, "int4-g64-asym", True)
    agree(loaded(output.path, dtype=torch.float16), output, 2e-2)


def test_awq_with_kept_layers(tmp_path: Path) -> None:
    output = written(Awq(), tmp_path, "int4-g64-asym", False, o="f16", gate="f16")
    model = loaded(output.path, dtype=torch.float32, quantization_config=AwqConfig(backend="torch_awq"))
    assert type(model.get_submodule("model.layers.1.mlp.gate_proj")) is torch.nn.Linear
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is AwqTorchLinear
    agree(model, output)


@tied_or_not
@pytest.mark.parametrize("grid", V2_GRIDS)
def test_gptq_version_two(tmp_path: Path, grid: str, tied: bool) -> None:
    output = written(Gptq(version=2), tmp_path, grid, tied)
    route = {"quantization_config": GPTQConfig(bits=4, backend="torch")}
    model = loaded(output.path, dtype=torch.float32, **route)
    zeros = []
    for row in output.rows:
        if row.solved:
            layer = model.get_submodule(row.name.removesuffix(".weight"))
            assert torch.equal(layer.dequantize_weight().T, output.quantized[row.name].dense().half()), (
                row.name
            )
            zeros.append(output.quantized[row.name].params.get("zero", torch.ones(1)).min())
    assert "asym" not in grid or min(zeros) == 0  # what version 1 cannot say
    agree(model, output)


MIXED = {"q": "int8-channel-sym", "v": "int4-g64-asym", "down": "int8-g32-sym", "gate": "int2-g64-sym"}


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_with_rules_in_gptqmodel(tmp_path: Path, version: int) -> None:
    """GPTQModel itself: the kernel of each layer has the bits, groups and values that its rule says."""
    name = "model.layers.1.mlp.up_proj.weight"
    chosen = {**MIXED, "o": "f16", name: "int3-g64-sym"}
    if version == 1:  # whose zero points it takes in rules, and in the settings from its own folders only
        chosen["v"] = "int4-g32-asym"
    output = written(Gptq(version=version), tmp_path, "int4-g64-sym", True, **chosen)
    model = GPTQModel.load(
        str(output.path), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    ).model
    for row in output.rows:
        layer = model.get_submodule(row.name.removesuffix(".weight"))
        if row.solved and isinstance(row.grid, Integer):
            assert (layer.bits, layer.group_size) == (row.grid.bits, row.grid.group or row.shape[1])
            found = layer.dequantize_weight().T
            assert torch.equal(found.half(), output.quantized[row.name].dense().half()), row.name
        elif row.role == "o":
            assert type(layer) is torch.nn.Linear
    agree(model, output, 2e-2)


def test_transformers_hears_no_rules(tmp_path: Path) -> None:
    output = written(Gptq(), tmp_path, "int4-g64-sym", True, down="int8-g32-sym")
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        loaded(output.path, quantization_config=GPTQConfig(bits=4, backend="torch"))


def packed_by_them(grid: Integer, kind: type, linear: torch.nn.Linear) -> dict[str, torch.Tensor]:
    """A layer as GPTQModel packs it, from the scales and zero points of our rounding."""
    rounded = grid.round(linear.weight.detach())
    linear.weight.data.copy_(rounded.dense())
    options = {"bits": grid.bits, "group_size": grid.group, "sym": grid.zero == "sym", "desc_act": False}
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": False}
    layer = kind(**options, **sizes, pack_dtype=torch.int32, register_buffers=True)
    zero = rounded.params.get("zero", torch.full_like(rounded.params["scale"], 2.0 ** (grid.bits - 1)))
    index = torch.arange(linear.in_features) // grid.group
    layer.pack(linear, rounded.params["scale"], zero, index.to(torch.int32))
    return {k: v for k, v in layer.state_dict().items() if k in ("qweight", "qzeros", "scales", "g_idx")}


@pytest.mark.parametrize(
    ("kind", "method", "grid"),
    [
        (AwqTorchLinear, {"quant_method": "awq", "version": "gemm", "zero_point": True}, "int4-g64-asym"),
        (TorchLinear, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "int4-g64-asym"),
        (TorchLinear, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "int3-g64-asym"),
        (TorchLinear, {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "int8-g32-sym"),
    ],
)
def test_what_gptqmodel_packs(tmp_path: Path, kind: type, method: dict[str, object], grid: str) -> None:
    asked = parse_grid(f"{grid}-sf16")
    assert isinstance(asked, Integer)
    source = make_model(tmp_path / "model", "llama", tied=True, **SIZES)
    tensors, wanted = load_file(source / "model.safetensors"), {}
    for name in [n for n in tensors if "_proj" in n]:
        weight = tensors.pop(name)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        parts = packed_by_them(asked, kind, linear)
        tensors |= {f"{name.removesuffix('.weight')}.{k}": v.contiguous() for k, v in parts.items()}
        wanted[name] = asked.round(weight)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"bits": asked.bits, "group_size": asked.group, **method}
    (source / "config.json").write_text(json.dumps(config))
    again = open_path(source)
    for name, ours in wanted.items():
        found = again.stored(name)
        assert found is not None and found.same_values(ours) and torch.equal(found.codes, ours.codes)
        assert torch.equal(again.read(name), ours.dense())
