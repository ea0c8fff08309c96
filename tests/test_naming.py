"""Names of quantized models: what each means, its bits from the layouts themselves, and what is made here."""

from __future__ import annotations

import re

import pytest

from bitmill.advise.naming import _table, bits_of, explain
from bitmill.allocation.mixture import Mixture
from bitmill.core.errors import BadRecipe
from bitmill.known import KNOWN
from bitmill.recipe import parse


@pytest.mark.parametrize("name", sorted({*KNOWN, *Mixture.names()}))
def test_everything_that_is_made_is_explained(name: str) -> None:
    found = explain(name)
    assert found.read == name and len(found.what) > 10 and found.source and found.runs
    assert found.recipe is not None and str(parse(found.recipe)) == found.recipe
    assert found.bits is not None and found.bits.evidence == "computed" and 1.5 < found.bits.type_ <= 32


@pytest.mark.parametrize(
    ("name", "recipe", "runs"),
    [
        ("Q4_K_M", "nearest : Q4_K_M > gguf", "llama.cpp"),
        ("q4_k", "nearest : Q4_K_M > gguf", "llama.cpp"),
        ("i1-IQ3_XXS", "nearest : IQ3_XXS > gguf", "llama.cpp"),
        ("Q4_K_L", "nearest : Q4_K_M, embed=q8_0, head=q8_0 > gguf", "llama.cpp"),
        ("Q6_K_L", "nearest : Q6_K, embed=q8_0, head=q8_0 > gguf", "llama.cpp"),
        ("Q3_K_L", "nearest : Q3_K_L > gguf", "llama.cpp"),
        ("Q4_0_4_8", "nearest : Q4_0 > gguf", "llama.cpp"),
        ("W4A16", KNOWN["w4a16"], "vLLM"),
        ("NVFP4", KNOWN["nvfp4"], "vLLM"),
        ("fp8_dynamic", KNOWN["fp8-dynamic"], "vLLM"),
        ("GPTQ-Int4", KNOWN["gptq-int4"], "vLLM"),
        ("gptq-8bit", KNOWN["gptq-int8"], "vLLM"),
        ("AWQ", KNOWN["awq"], "vLLM"),
        ("int4-AutoRound", KNOWN["autoround"], "auto-round"),
        ("unsloth-bnb-4bit", KNOWN["nf4"], "transformers"),
        ("LLM.int8()", KNOWN["llm-int8"], "transformers"),
        ("smoothquant", KNOWN["smoothquant"], "vLLM"),
        ("QuaRot", KNOWN["quarot"], "Bitmill"),
        ("SpinQuant", KNOWN["spinquant"], "Bitmill"),
        ("mlx-4bit", KNOWN["mlx-4bit"], "mlx-lm"),
        ("4bit-HQQ", KNOWN["hqq"], "hqq"),
        ("QuIP#", KNOWN["e8p"], "Bitmill"),
        ("FP16", "nearest : f16 > gguf", "llama.cpp"),
    ],
)
def test_what_bitmill_calls_it(name: str, recipe: str, runs: str) -> None:
    found = explain(name)
    assert found.recipe == str(parse(recipe)) and runs in found.runs and found.instead is None


@pytest.mark.parametrize(
    ("name", "what", "instead"),
    [
        ("UD-Q5_K_XL", "Unsloth", "--bpw"), ("UD-IQ2_XXS", "Unsloth", "--bpw"),
        ("4.65bpw", "4.65 bits", "--bpw 4.65"), ("EXL3", "Trellis", "e8p"),
        ("IQ4_KS", "ik_llama.cpp", "IQ4_XS"),
        ("i2_s", "bitnet.cpp", "TQ1_0"),
        ("AQLM-2bit-1x16", "codebooks", "e8p"),
        ("W4A8KV4", "QServe", "w4a8"), ("turboquant", "keys and values", "--kv"),
        ("LLM-QAT", "training", "efficientqat"),
        ("gptq-marlin", "kernel", "gptq"),
    ],
)  # fmt: skip
def test_what_bitmill_does_not_make_has_its_nearest(name: str, what: str, instead: str) -> None:
    found = explain(name)
    assert found.recipe is None and what in found.what and instead in (found.instead or "")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Q4_K_M"), ("Qwen3-8B-AWQ", "AWQ"),
        ("gemma-3-27b-it-UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("Mistral-7B-Instruct-v0.3-IQ3_XXS.gguf", "IQ3_XXS"), ("org/model:Q8_0", "Q8_0"),
        ("Llama-3.3-70B-NVFP4", "NVFP4"),
    ],
)  # fmt: skip
def test_names_of_files(name: str, read: str) -> None:
    assert explain(name).read == read


@pytest.mark.parametrize(
    ("name", "type_", "model", "published"),
    [
        ("Q4_K_M", 4.83, 4.90, 4.89), ("Q8_0", 8.5, 8.5, 8.50), ("Q6_K", 6.5625, 6.5625, 6.56),
        ("Q5_K_M", 5.67, 5.70, 5.70), ("IQ4_XS", 4.27, 4.46, 4.46), ("Q2_K", 2.96, 3.16, 3.16),
    ],
)  # fmt: skip
def test_bits_are_those_of_published_files(name: str, type_: float, model: float, published: float) -> None:
    """llama.cpp's own table for Llama 3.1 8B, tools/quantize/README.md."""
    bits = bits_of(parse(name))
    assert bits.type_ == pytest.approx(type_, abs=0.06) and bits.model == pytest.approx(model, abs=0.06)
    assert bits.model == pytest.approx(published, abs=0.06)
    assert sum(share for _, share in bits.shares) == pytest.approx(1)


def test_how_a_name_reads() -> None:
    assert [piece for piece, _ in explain("IQ3_XXS").pieces] == ["IQ3", "XXS"]
    assert dict(explain("Q4_K_M").pieces)["K"].startswith("super-blocks")
    assert [piece for piece, _ in explain("UD-Q5_K_XL").pieces] == ["UD", "Q5", "K", "XL"]
    assert explain("W4A16").pieces == ()


def test_what_needs_text_says_so() -> None:
    assert explain("IQ2_XXS").text and explain("W4A16").text and not explain("Q4_K_M").text


@pytest.mark.parametrize("name", ["Q4_K_N", "w4a16x", "hello", "", "a" * 300, "../../etc", "x.toml"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(BadRecipe, match="no name of a quantization") as refused:
        explain(name)
    assert "try:" in str(refused.value)


def test_the_table_is_whole() -> None:
    table = _table()
    for entry in table["name"]:
        re.compile(entry["match"])
        assert entry["what"] and entry["source"], entry["match"]
        assert entry.get("where", "gguf") in table["runs"], entry["match"]
        assert ("recipe" in entry) + ("instead" in entry) < 2, entry["match"]
