"""Back from a quantized file to a plain Hugging Face folder, and what a plan says of a quantized source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.tokenizer import load_tokenizer, parity
from bitmill.mill import quantize
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.run.load import load_model
from bitmill.source import open_source
from tests.test_gguf import EXTRA
from tests.tiny import CONFIGS, make_model, tokens


@pytest.mark.parametrize("family", CONFIGS)
def test_a_file_becomes_a_folder_that_transformers_loads(family: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family, tied=family != "llama", **EXTRA.get(family, {}))
    quantize(str(folder), "q8_0", tmp_path / "file.gguf")
    file = GgufCheckpoint(tmp_path / "file.gguf")
    for name, dtype in (("hf-f32", torch.float32), ("bf16 > safetensors", torch.bfloat16)):
        out = tmp_path / f"back-{dtype}"
        quantize(file, name, out)
        model = AutoModelForCausalLM.from_pretrained(out).eval()
        assert model.dtype is dtype and {p.dtype for p in model.parameters()} == {dtype}
        want, ids = load_model(file, dtype), tokens(2, 24)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, want(ids).logits)
        # For some model types transformers puts its own class over the tokenizer's file, the original's too.
        assert parity(AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folder)) == []
        assert parity(load_tokenizer(open_source(str(out))), load_tokenizer(file)) == []
        assert model.generation_config.eos_token_id == file.config["eos_token_id"]
        assert open_source(str(out)).config["model_type"] == file.config["model_type"]


def test_a_quantized_source_is_named_in_the_plan(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    said = plan(parse("q4_0"), open_source(str(folder))).headline
    assert not any("already" in line for line in said)
    quantize(str(folder), "nearest : q8_0, embed=q4_1 > gguf", tmp_path / "a.gguf")
    quantize(str(folder), "int8-g64-sym > compressed-tensors", tmp_path / "b")
    for name, kinds in (("a.gguf", ("q8_0 ", "q4_1 ")), ("b", ("compressed-tensors ",))):
        source = open_source(str(tmp_path / name))
        (line,) = [x for x in plan(parse("q4_0"), source).headline if "already" in x]
        assert all(kind in line for kind in kinds) and "losses add up" in line
        assert not any("already" in line for line in plan(parse("hf-bf16"), source).headline)
