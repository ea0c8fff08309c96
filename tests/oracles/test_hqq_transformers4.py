"""transformers 4 loads HQQ folders as ``from_pretrained`` should; transformers 5 has no code for weights that
are HQQ's already (test_hqq_load.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hqq.core.quantize import HQQLinear
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.containers.hqq import Hqq
from bitmill.core.registry import parse_grid
from bitmill.mill import quantize
from tests.tiny import make_model, tokens
from tests.written import rows_of, write

pytestmark = pytest.mark.client

NAMES = {"f32": "float32", "bf16": "bfloat16"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
SEVERAL = {"down": "int8-g64-fz", "v": "int4-r64-fz", "gate": "bf16", "head": "int4-g32-fz"}


def loaded(path: Path, **options: Any) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    assert {key: value for key, value in info.items() if value} == {}
    return model.eval()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("grid", "other", "tied"),
    [
        *((g, {}, True) for g in ("int8-g64-fz", "int4-g64-fz", "int3-g64-fz", "int2-r16-fz", "int4-r64-fz")),
        ("int4-channel-fz", {}, False),
        ("int3-g64-fz", SEVERAL, False),
    ],
)  # fmt: skip
@torch.no_grad()
def test_from_pretrained(
    tmp_path: Path, grid: str, other: dict[str, str], tied: bool, family: str, dtype: str
) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", family, tied=tied, dtype=NAMES[dtype], **SIZES))
    container = Hqq()
    chosen = {key: container.adapt(parse_grid(text), dtype) for key, text in other.items()}
    rows = rows_of(container, source, dtype, container.adapt(parse_grid(grid), dtype), chosen)
    output = write(container, source, rows, tmp_path)
    model = loaded(output.path, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    for row in output.rows:
        module, _, part = row.name.rpartition(".")
        layer, wanted = model.get_submodule(module), output.quantized[row.name].dense()
        if part == "weight" and str(row.grid).startswith("int"):
            assert isinstance(layer, HQQLinear)
            assert torch.equal(layer.dequantize(), wanted), row.name
        else:
            assert torch.equal(getattr(layer, part).float(), wanted), row.name
        reference.get_parameter(row.name).copy_(wanted)
    found, wanted = (m(tokens(2, 24)).logits for m in (model, reference))
    # hqq adds a bias after its product, torch often within it: one rounding more.
    close = 1e-5 * float(wanted.abs().max()) if family == "qwen2" else 0.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=close)


def test_text_is_generated(tmp_path: Path) -> None:
    quantize("smollm2", "hqq", tmp_path / "out")
    model = loaded(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0])
    assert "Paris" in text
