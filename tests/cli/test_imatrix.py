"""The verb ``imatrix``, and the option of that name."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmill.checkpoint.imatrix import read_imatrix
from tests.cli.command import Command
from tests.tiny import make_model

TEXT = "The miller weighs each grain and writes the number down. " * 200


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "mill.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def taken(command: Command, tiny_llama: Path, text: Path, tmp_path: Path) -> Path:
    out = tmp_path / "m.imatrix.gguf"
    said = command("imatrix", tiny_llama, "-o", out, "--calib", text, "--nsamples", "4", "--seqlen", "32")
    assert said.code == 0, said.err
    assert "summing activations 3/3" in said.err and "blk.2.ffn_down.weight" in said.out
    assert "text: mill.txt" in said.out and "0 weights without data" in said.out
    return out


def test_take_show_merge_convert(command: Command, taken: Path, tmp_path: Path) -> None:
    table = command("imatrix", taken).out
    assert "4 chunks of 32 tokens" in table and command("inspect", taken).out == table
    found = command("imatrix", taken, "--json").json
    assert found == command("inspect", taken, "--json").json and len(found["entries"]) == 21
    down = next(e for e in found["entries"] if e["name"] == "blk.0.ffn_down.weight")
    assert down["tokens"] == [128, 128] and down["active"] == 1 and down["unseen"] == 0
    assert down["columns"] == 256 and 1 < down["peak"] < 256 and down["total"] > 0
    twice = tmp_path / "twice.gguf"
    assert command("imatrix", taken, taken, "-o", twice).code == 0
    assert read_imatrix(twice).chunk_count == 8
    assert read_imatrix(twice).entries["blk.0.attn_q.weight"].counts.tolist() == [256]
    old = tmp_path / "old.dat"
    assert command("imatrix", taken, "-o", old).code == 0 and old.read_bytes()[:4] == b"\x15\0\0\0"
    assert "21 weights" in command("imatrix", old).out


def test_a_model_and_files_together(
    command: Command, tiny_llama: Path, taken: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all.gguf"
    words = ("--calib", text, "--nsamples", "2", "--seqlen", "32", "--json")
    found = command("imatrix", taken, tiny_llama, "-o", out, *words).json
    assert found["chunk_count"] == 6 and found["entries"][0]["tokens"] == [192, 192]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("smollm2",), "add -o"),
        (("smollm2", "smollm2", "-o", "x.gguf"), "2 models"),
        (("smollm2", "-o", "x.gguf", "--format", "csv"), "'csv' is no form"),
        (("absent.gguf", "-o", "x.gguf"), "no file or folder"),
    ],
)
def test_refusals(
    command: Command, words: tuple[str, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = command("imatrix", *words)
    assert said.code == 2 and reason in said.err and not said.out and not list(tmp_path.iterdir())


def test_nothing_is_overwritten(command: Command, taken: Path) -> None:
    before = taken.read_bytes()
    said = command("imatrix", taken, taken, "-o", taken)
    assert said.code == 2 and "--force" in said.err and taken.read_bytes() == before
    assert command("imatrix", taken, taken, "-o", taken, "--force").code == 0


def test_experts_see_the_tokens_that_are_asked_for(
    command: Command, taken: Path, text: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """With the words of a recipe, and what came of it: of 64 tokens, each expert is shown all, or enough."""
    model, out = make_model(tmp_path / "model", "qwen3moe", num_hidden_layers=1), tmp_path / "m.gguf"
    words = ("--calib", text, "--nsamples", "2", "--seqlen", "32", "--force", "-o", out)
    shown: dict[str, list[int]] = {}
    for policy in ("route", "topk=5", "until=40", "all"):
        said = command("imatrix", model, *words, "--experts", policy, "--json")
        assert said.code == 0 and "experts: 8, sent" in said.err
        told = said.json["experts"]
        shown[policy] = read_imatrix(out).entries["blk.0.ffn_up_exps.weight"].counts.tolist()
        assert told["shown_least"] == min(shown[policy])
        assert told["sent"]["least"] == min(shown["route"]) and told["sent"]["most"] == max(shown["route"])
    assert shown["all"] == [64] * 8 and sum(shown["route"]) == 3 * 64 and sum(shown["topk=5"]) == 5 * 64
    assert shown["until=40"] == [max(40, count) for count in shown["route"]] != shown["route"]
    plain = command("imatrix", model, *words)
    assert "experts: 8, sent" in plain.err and "experts: 8" not in plain.out
    assert read_imatrix(out).entries["blk.0.ffn_up_exps.weight"].counts.tolist() == shown["route"]
    said = command("imatrix", tiny_llama, *words, "--experts", "all")
    assert said.code == 0 and "experts=all is for nothing: there are no experts" in said.err
    for wrong, name, reason in (("some", model, "until=N"), ("all", taken, "chosen before")):
        said = command("imatrix", name, *words, "--experts", wrong)
        assert said.code == 2 and reason in said.err and not said.out


def test_plan_and_quantize_with_it(command: Command, tiny_llama: Path, taken: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "q.gguf", "nearest : q4_0 > gguf"
    plan = command("plan", tiny_llama, recipe, "--imatrix", taken, "--json").json
    assert plan["calibration"] == {"needs": "diagonal", "nsamples": 0, "seqlen": 0}
    words = ("--imatrix", taken, "--imatrix", taken, "--imatrix-missing", "refuse", "--no-measure")
    said = command("quantize", tiny_llama, recipe, "-o", out, *words, "--json")
    assert said.code == 0, said.err
    assert out.stat().st_size == plan["bytes"] and said.json["calibration"]["chunks"] == 8
    for verb in ("plan", "quantize"):
        more = ("--dry-run",) if verb == "quantize" else ()
        refused = command(verb, tiny_llama, "gptq : q4_0 > gguf", "--imatrix", taken, *more)
        assert refused.code == 2 and "Gram" in refused.err and not refused.out
