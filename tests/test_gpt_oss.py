"""gpt-oss folders: stacks of MXFP4 experts as a source, the family's names and seams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from bitmill import mill
from bitmill.calibrate.stream import Stream
from bitmill.containers.gpt_oss import GptOss
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.families.base import describe
from bitmill.source import open_path, open_source
from tests.tiny import tokenizer, tokens

STACK = "model.layers.0.mlp.experts.gate_up_proj"


def dense_model(folder: Path) -> Path:
    """A small random gpt-oss in bfloat16, as transformers saves it."""
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=len(tokenizer()),
        hidden_size=64,
        intermediate_size=96,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        max_position_embeddings=512,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def published(dense: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The same model with its experts in blocks and scales; returns the values, by the dense names."""
    folder.mkdir()
    grid, tensors = parse_grid("mxfp4"), load_file(dense / "model.safetensors")
    values = dict(tensors)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, out = tensors[name].shape
        rows = tensors.pop(name).float().transpose(1, 2).reshape(experts * out, columns)
        quantized = grid.round(rows.contiguous())
        pairs = quantized.codes.reshape(experts, out, columns // 32, 16, 2)
        tensors[f"{name}_blocks"] = pairs[..., 0] + 16 * pairs[..., 1]
        tensors[f"{name}_scales"] = quantized.params["exponent"].reshape(experts, out, columns // 32)
        whole = quantized.dense().reshape(experts, out, columns).transpose(1, 2)
        values[name] = whole.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    skip = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": skip}
    (folder / "config.json").write_text(json.dumps(config))
    for small in dense.glob("token*"):
        (folder / small.name).write_bytes(small.read_bytes())
    return values


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("dense"))


def test_stacks_are_transposed_and_exact(dense: Path, tmp_path: Path) -> None:
    values = published(dense, tmp_path / "mx")
    source = open_path(tmp_path / "mx")
    assert set(source.tensors) == set(values)
    for name, facts in source.tensors.items():
        assert (facts.shape, facts.dtype) == (tuple(values[name].shape), "bf16")
        assert torch.equal(source.read(name), values[name]), name
    assert source.stored(STACK) is None and "quantization_config" not in source.config


def test_one_block_by_hand(dense: Path, tmp_path: Path) -> None:
    published(dense, tmp_path / "mx")
    path = tmp_path / "mx" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{STACK}_blocks"][1, 5, 1] = torch.tensor([0x21, 0xF7] + [0] * 14, dtype=torch.uint8)
    tensors[f"{STACK}_scales"][1, 5, 1] = 128
    save_file(tensors, path, {"format": "pt"})
    assert open_path(tmp_path / "mx").read(STACK)[1, 32:36, 5].tolist() == [1.0, 2.0, 12.0, -12.0]


def test_a_plain_folder_loses_nothing(dense: Path, tmp_path: Path) -> None:
    values = published(dense, tmp_path / "mx")
    mill.quantize(open_path(tmp_path / "mx"), "bf16 > safetensors", tmp_path / "out")
    found, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    assert all(torch.equal(found.get_parameter(name), value) for name, value in values.items())


def test_roles_and_a_stream(dense: Path) -> None:
    source = open_source(str(dense))
    family = describe(source.config)
    roles = {name.split(".", 3)[-1]: family.role(name)[0] for name in source.tensors if ".0." in name}
    assert roles["self_attn.q_proj.weight"] == "q" and roles["mlp.router.weight"] == "router"
    assert {roles[n] for n in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias")} == {"other"}
    stream, ids = Stream(source), tokens(2, 24)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stream.logits(stream.hidden(ids)), model(ids).logits, atol=1e-4)


def test_a_fold_leaves_the_function(dense: Path, tmp_path: Path) -> None:
    mill.quantize(open_path(dense), "hadamard + nearest : f32 > safetensors", tmp_path / "out")
    ids = tokens(2, 24)
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (dense, tmp_path / "out")
    )
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
    with torch.no_grad():
        assert torch.allclose(before(ids).logits, after(ids).logits, atol=1e-4)


def test_it_is_not_written(dense: Path, tmp_path: Path) -> None:
    for recipe in ("nearest : mxfp4 > gpt-oss", "bf16 > gpt-oss"):
        with pytest.raises(Refused, match="read, not written"):
            mill.quantize(open_path(dense), recipe, tmp_path / "out")
    assert "> bitmill" in str(GptOss().refuses(parse_grid("mxfp4"), "q", (64, 64)))


@pytest.mark.parametrize(
    "wrong",
    [
        {f"{STACK}_scales": torch.zeros(4, 192, 3, dtype=torch.uint8)},
        {f"{STACK}_scales": torch.zeros(4, 192, 2)},
        {f"{STACK}_blocks": torch.zeros(4, 192, 2, 8, dtype=torch.uint8)},
        {f"{STACK}_blocks": torch.zeros(192, 2, 16, dtype=torch.uint8)},
        {f"{STACK}_blocks": torch.zeros(0, 192, 2, 16, dtype=torch.uint8)},
        {f"{STACK}_scales": None},
        {f"{STACK}_blocks": None},
    ],
    ids=str,
)
def test_parts_that_do_not_fit(dense: Path, tmp_path: Path, wrong: dict[str, torch.Tensor | None]) -> None:
    published(dense, tmp_path / "mx")
    path = tmp_path / "mx" / "model.safetensors"
    tensors = {k: v for k, v in {**load_file(path), **wrong}.items() if v is not None}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BadFile, match="gate_up_proj"):
        open_path(tmp_path / "mx")
