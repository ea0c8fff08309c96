"""auto-round as the judge of AutoRound folders, and as a writer of what is read.

Its torch kernels compute in half precision: what they make of an identity matrix is the weight, rounded to
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from auto_round import AutoRound as Rounding
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.auto_round import AutoRound
from bitmill.core.errors import Refused
from bitmill.core.registry import parse_grid
from bitmill.source import open_path
from tests.tiny import make_model, tokens
from tests.written import rows_of, write

pytestmark = pytest.mark.client

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
OTHER = {"down": "int8-g32-sym", "v": "int3-g64-sym", "model.layers.1.mlp.up_proj.weight": "int2-g32-sym"}
CASES = [
    *(("int4-g64-sym", {}), ("int2-g32-sym", {}), ("int3-g32-sym", {}), ("int8-channel-sym", {})),
    ("int4-g64-sym", {**OTHER, "o": "f16", "model.layers.0.mlp.gate_proj.weight": "f16"}),
]


WHOLE = {"disable_model_free": True}


def loaded(path: Path) -> torch.nn.Module:
    route = {"quantization_config": AutoRoundConfig(backend="torch"), "device_map": "cpu"}
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, **route
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@torch.no_grad()
def weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    layer = model.get_submodule(name.removesuffix(".weight"))
    columns = getattr(layer, "infeatures", None) or layer.in_features
    return layer(torch.eye(columns, dtype=torch.float16)).T.half()


@pytest.mark.parametrize(("grid", "other"), CASES, ids=["4", "2", "3", "8", "mixed"])
def test_folders_are_loaded(tmp_path: Path, grid: str, other: dict[str, str]) -> None:
    container = AutoRound()
    source = SafetensorsFolder(make_model(tmp_path / "model", "llama", tied=False, **SIZES))
    chosen = {key: container.adapt(parse_grid(text), "f32") for key, text in other.items()}
    rows = rows_of(container, source, "f32", container.adapt(parse_grid(grid), "f32"), chosen)
    output = write(container, source, rows, tmp_path)
    model = loaded(output.path)
    dense = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    for row in rows:
        values = output.quantized[row.name].dense()
        if row.solved and str(row.grid) != "f16":
            assert torch.equal(weight(model, row.name), values.half()), row.name
        dense.get_parameter(row.name).data.copy_(values)
    ids = tokens(2, 24)
    with torch.no_grad():
        wanted, found = dense(ids).logits, model(ids).logits.float()
    assert float((found - wanted).norm() / wanted.norm()) < 4e-3
    made = model.generate(ids[:1, :8], max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert made.shape == (1, 12)


def theirs(model: Path, out: Path, packing: str, **options: Any) -> Path:
    """Plain rounding, so that nothing is calibrated."""
    more = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "nsamples": 1, "seqlen": 16}
    Rounding(str(model), **more, **options).quantize_and_save(str(out), format=packing)
    return next(path.parent for path in out.rglob("config.json"))


MIXED = {"bits": 4, "group_size": 32, "sym": True, "layer_config": {"down_proj": {"bits": 8}}}


@pytest.mark.parametrize(
    ("packing", "scheme"),
    [
        ("auto_round", {"bits": 4, "group_size": 32, "sym": True}),
        ("auto_round", {"bits": 2, "group_size": 32, "sym": False, **WHOLE}),
        ("auto_round", {"bits": 3, "group_size": 64, "sym": True}),
        ("auto_round", MIXED),
        ("auto_gptq", {"bits": 4, "group_size": 32, "sym": True}),
        ("auto_round:auto_awq", {"bits": 4, "group_size": 32, "sym": False}),
        ("auto_awq", {"bits": 4, "group_size": 32, "sym": False}),
    ],
    ids=["4-sym", "2-asym", "3-sym", "mixed", "gptq", "awq", "autoawq"],
)
def test_what_it_writes_is_read(tmp_path: Path, packing: str, scheme: dict[str, Any]) -> None:
    """As its kernel has it; where it has none on a CPU, as near to the weights as rounding is."""
    path = make_model(tmp_path / "model", "llama", tied=False, **SIZES)
    folder = theirs(path, tmp_path / "out", packing, **scheme)
    again, dense = open_path(folder), SafetensorsFolder(path)
    model = loaded(folder) if packing == "auto_round" else None
    assert set(again.tensors) == set(dense.tensors)
    names = [name for name in again.tensors if again.stored(name) is not None]
    assert len(names) == 14
    for name in names:
        stored = again.stored(name)
        assert stored is not None
        scale = stored.params["scale"].abs()
        step = scale.repeat_interleave(stored.shape[1] // scale.shape[1], 1)
        off = (again.read(name) - dense.read(name)) / step
        assert abs(float(off.mean())) < 0.1 and float(off.square().mean()) < 0.25, name
        if model is not None:
            assert torch.equal(weight(model, name), again.read(name).half()), name


def test_what_says_otherwise_is_refused(tmp_path: Path) -> None:
    """Its model-free mode writes one layout under the name of another: its own kernel is one step off in
    every weight."""
    path = make_model(tmp_path / "model", "llama", tied=False, **SIZES)
    folder = theirs(path, tmp_path / "out", "auto_round", bits=4, group_size=32, sym=False)
    with pytest.raises(Refused, match="model-free"):
        open_path(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = weight(loaded(folder), name).float() - SafetensorsFolder(path).read(name)
    step = load_file(folder / "model.safetensors")[name.replace("weight", "scales")].float().T
    off = wrong / step.repeat_interleave(32, 1)
    assert 0.9 < float(off.mean()) < 1.1
