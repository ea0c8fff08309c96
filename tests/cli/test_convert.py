"""The verb ``convert``: what it says, in which words it is asked, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmill import mill
from tests.cli.command import Command
from tests.tiny import make_model


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("gptq")
    mill.quantize(
        str(make_model(here / "model", dtype="float16")), "nearest : int4-g32-sym > gptq", here / "gptq"
    )
    return here / "gptq"


def test_both_spellings_make_the_same(command: Command, gptq: Path, tmp_path: Path) -> None:
    one = command("convert", gptq, tmp_path / "one", "--to", "compressed-tensors")
    other = command("convert", gptq, "compressed_tensors", "-o", tmp_path / "other")
    assert one.code == other.code == 0, one.err + other.err
    assert "none: the same values" in one.out and "converting 4/4" in one.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] == weights[1]


def test_a_file_for_llama_cpp_needs_no_more_words(command: Command, gptq: Path, tmp_path: Path) -> None:
    said = command("convert", gptq, tmp_path / "out.gguf", "--json")
    assert said.code == 0, said.err
    assert {row["grid"] for row in said.json["plan"]["rows"] if row["role"] == "up"} == {"q4_0"}
    assert (tmp_path / "out.gguf").stat().st_size == said.json["plan"]["bytes"]


def test_a_dry_run_writes_nothing(command: Command, gptq: Path, tmp_path: Path) -> None:
    said = command("convert", gptq, tmp_path / "out.gguf", "--dry-run")
    assert said.code == 0 and "the values of int4-g32-sym-sf16" in said.out
    assert not list(tmp_path.iterdir())


def test_a_loss_is_printed_by_tensor_and_overall(command: Command, gptq: Path, tmp_path: Path) -> None:
    said = command("convert", gptq, "nearest : int2-g32-asym > bitmill", "-o", tmp_path / "out")
    assert said.code == 0, said.err
    assert "the largest 5 of 21" in said.out and "21 of 29 tensors are not the same values" in said.out
    assert "on top of what the source had lost" in said.out and "bitmill measure" in said.err
    every = command("convert", gptq, "nearest : int2-g32-asym > bitmill", "-o", tmp_path / "2", "--rows")
    assert every.out.count("_proj.weight ") >= 21


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{gptq}", "{out}"), "in which container"),
        (("{gptq}", "awqq", "-o", "{out}"), "no container or recipe"),
        (("{gptq}", "gguf"), "no output is named"),
        (("{gptq}", "gguf", "-o", "{out}", "--to", "gptq"), "two answers"),
        (("{gptq}", "{out}.gguf", "--to", "bitmill"), "is a folder"),
        (("{gptq}", "{out}", "--to", "bitmill", "--dtype", "f8"), "--dtype"),
        (("{gptq}", "{gptq}", "--to", "bitmill"), "exists"),
    ],
)
def test_refusals(command: Command, gptq: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    heard = command("convert", *(word.format(gptq=gptq, out=tmp_path / "out") for word in words))
    assert heard.code == 2 and said in heard.err, heard.err
    assert not list(tmp_path.iterdir())


def test_what_the_runtime_cannot_load_is_refused_before_it_is_written(
    command: Command, gptq: Path, tmp_path: Path
) -> None:
    said = command("convert", gptq, "bitmill", "-o", tmp_path / "out", "--for", "vllm")
    assert said.code == 2 and "vLLM" in said.err and "does not load" in said.err
    words = ("-o", tmp_path / "ct", "--for", "vllm@0.11", "--tp", "2")
    assert command("convert", gptq, "compressed-tensors", *words).code == 0
    parted = command("convert", gptq, "gguf", "-o", tmp_path / "x.gguf", "--for", "llama.cpp", "--tp", "2")
    assert parted.code == 2 and "does not part layers" in parted.err
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("ct")] == []
