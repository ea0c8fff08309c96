"""transformers as the judge of how gpt-oss folders are read: the same values, the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmill import mill
from bitmill.source import open_path
from tests.test_gpt_oss import dense_model, published
from tests.tiny import tokens

pytestmark = pytest.mark.client


def loaded(path: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


def test_both_read_the_same(tmp_path: Path) -> None:
    published(dense_model(tmp_path / "dense"), tmp_path / "mx")
    theirs, ours = loaded(tmp_path / "mx"), open_path(tmp_path / "mx")
    assert set(ours.tensors) == set(dict(theirs.named_parameters()))
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.read(name), parameter), name
    mill.quantize(ours, "bf16 > safetensors", tmp_path / "out")
    with torch.no_grad():
        ids = tokens(2, 24)
        assert torch.equal(theirs(ids).logits, loaded(tmp_path / "out")(ids).logits)


def test_attention_on_another_grid(tmp_path: Path) -> None:
    """The experts stay bfloat16 and are named as such, so that a reader with a GPU leaves them alone."""
    published(dense_model(tmp_path / "dense"), tmp_path / "mx")
    mill.quantize(open_path(tmp_path / "mx"), "fp8-e4m3-tensor > fp8", tmp_path / "out")
    model, ours = loaded(tmp_path / "out"), open_path(tmp_path / "out")
    skipped = ours.metadata["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts" in skipped and "model.layers.1.mlp.router" in skipped
    for name, parameter in model.named_parameters():
        assert torch.equal(ours.read(name).bfloat16(), parameter), name
