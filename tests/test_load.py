"""Any container as a transformers model: the same logits as the weights written into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.bitmill import Bitmill
from bitmill.containers.compressed_tensors import CompressedTensors
from bitmill.containers.gguf import Gguf
from bitmill.containers.gptq import Gptq
from bitmill.core.axes import Container
from bitmill.core.errors import BadFile, Refused
from bitmill.core.registry import parse_grid
from bitmill.run.load import load, load_model
from tests.tiny import CONFIGS, make_model, tokens
from tests.written import rows_of, write


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_folder_is_what_transformers_loads(tmp_path: Path, family: str, tied: bool) -> None:
    folder = make_model(tmp_path, family, tied=tied)
    model, tokenizer = load(folder)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, wanted(tokens()).logits)
    text = "def rows_of(container: Container) -> list[Row]: 123"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize(
    ("container", "grid"),
    [
        (Bitmill(), "int4-g64-fz"),
        (CompressedTensors(), "int4-g64-asym"),
        (Gptq(), "int3-g32-asym"),
        (Gguf(), "q4_0"),
    ],
)
def test_a_quantized_model_computes_with_its_stored_values(
    tmp_path: Path, container: Container, grid: str
) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", "llama"))
    placed = container.adapt(parse_grid(grid), "f32")
    written = write(container, source, rows_of(container, source, "f32", placed), tmp_path)
    model, _ = load(written.path)
    wanted = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    with torch.no_grad():
        before = wanted(tokens()).logits
        for name, parameter in wanted.named_parameters():
            parameter.copy_(written.quantized[name].dense())
        assert torch.equal(model(tokens()).logits, wanted(tokens()).logits)
        assert not torch.equal(before, wanted(tokens()).logits)


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(BadFile, match="missing keys"):
        load_model(SafetensorsFolder(folder))
    config.write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    with pytest.raises(BadFile, match="unexpected keys"):
        load_model(SafetensorsFolder(folder))
    config.write_text(text.replace('"model_type": "llama"', '"model_type": "clip"'))
    with pytest.raises(Refused, match="no causal language model"):
        load_model(SafetensorsFolder(folder))
