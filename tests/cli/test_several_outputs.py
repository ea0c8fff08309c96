"""Several outputs in one command: a recipe for each ``-o``."""

from __future__ import annotations

from pathlib import Path

from tests.cli.command import Command


def test_on_the_command_line(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("--nsamples", "4", "--seqlen", "32", "--no-measure", "--json")
    outs = ("-o", tmp_path / "a.gguf", "-o", tmp_path / "b")
    recipes = ("q8_0", "nearest : int4-g32 > gptq")
    planned = command("quantize", tiny_llama, *recipes, *outs, "--dry-run", *words).json
    assert [p["container"] for p in planned] == ["gguf", "gptq"] and not list(tmp_path.iterdir())
    made = command("quantize", tiny_llama, *recipes, *outs, *words)
    assert made.code == 0, made.err
    assert [report["path"] for report in made.json] == [str(tmp_path / "a.gguf"), str(tmp_path / "b")]
    assert (tmp_path / "a.gguf").stat().st_size == planned[0]["bytes"]
    for wrong, said in {
        (*recipes, "-o", tmp_path / "x"): "2 recipes",
        ("q8_0", *outs): "1 recipes",
        ("--bpw", "4.5", *outs): "budgets",
        (*recipes, *outs, "--save-moments", tmp_path / "m"): "--save-moments",
    }.items():
        heard = command("quantize", tiny_llama, *wrong)
        assert heard.code == 2 and said in heard.err, heard.err
