"""The verbs that make and measure, end to end on a random model of three blocks."""

from __future__ import annotations

from html import unescape
from pathlib import Path
from typing import Any

import pytest

from bitmill.checkpoint.gguf import GgufFile
from bitmill.containers.gguf import MIXTURES
from bitmill.measurement.measure import NothingMeasured
from tests.cli.command import Command
from tests.tiny import make_model

TEXT = "The miller weighs each grain and writes the number down. " * 200
SMALL = ("--windows", "2", "--window", "32", "--no-floor")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bitmill import mill

    out = tmp_path_factory.mktemp("out") / "q4.gguf"
    mill.quantize(str(tiny_llama), "nearest : q4_0 > gguf", out)
    return out


def test_quantize_makes_what_plan_promised(
    command: Command, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.gguf"
    plan = command(
        "plan", tiny_llama, "gptq : q4_0 > gguf", "--nsamples", "4", "--seqlen", "32", "--json"
    ).json
    words = ("--calib", text, "--nsamples", "4", "--seqlen", "32", "--no-measure")
    said = command("quantize", tiny_llama, "gptq : q4_0 > gguf", "-o", out, *words)
    assert said.code == 0, said.err
    assert out.stat().st_size == plan["bytes"] and f"{plan['bytes']:,} bytes" in said.out
    assert "gptq : Q4_0 > gguf" in said.err and "quantizing 3/3" in said.err


def test_quantize_measures_at_its_end_and_says_so_as_json(
    command: Command, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q.gguf"
    said = command("quantize", tiny_llama, "q8_0", "-o", out, "--text", text, "--json")
    assert said.code == 0, said.err
    assert (
        0 < said.json["measurement"]["kld"]["mean"] < 0.1 and said.json["plan"]["bytes"] == out.stat().st_size
    )


def test_quantize_writes_the_page_of_its_run(
    command: Command, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    out, page = tmp_path / "q.gguf", tmp_path / "page.html"
    words = ("--calib", text, "--nsamples", "4", "--seqlen", "32", "--seed", "7", "--text", text)
    said = command("quantize", tiny_llama, "gptq : q4_0 > gguf", "-o", out, *words, "--html", page)
    assert said.code == 0 and f"page: {page}" in said.err, said.err
    shown = unescape(page.read_text(encoding="utf-8"))
    drawn = f"--calib {text} --nsamples 4 --seqlen 32 --seed 7"
    assert f"bitmill quantize {tiny_llama} 'gptq : Q4_0 > gguf' -o {out} {drawn}</code>" in shown
    assert f"bitmill measure {out} --against {tiny_llama} --text {text}</code>" in shown
    again = tmp_path / "again.html"
    assert command("measure", out, "-a", tiny_llama, "-t", text, *SMALL, "--html", again).code == 0
    known = f"-o {out.name} --nsamples 4 --seqlen 32 --seed 7</code>"
    assert known in unescape(again.read_text(encoding="utf-8"))


def test_a_page_without_a_place_or_a_measurement_is_refused_first(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    words = ("quantize", tiny_llama, "q8_0", "-o", tmp_path / "q.gguf", "--html")
    for more, said in (
        ((tmp_path / "p.html", "--no-measure"), "--no-measure finds nothing out"),
        ((tmp_path / "p.html", "--dry-run"), "--dry-run makes no file"),
        ((tmp_path / "absent" / "p.html",), "there is no such folder"),
        ((tmp_path,), "is a folder"),
    ):
        found = command(*words, *more)
        assert found.code == 2 and said in found.err
    assert list(tmp_path.iterdir()) == []


def test_quantize_does_not_overwrite(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious.gguf"
    out.write_text("mine")
    said = command("quantize", tiny_llama, "q8_0", "-o", out, "--no-measure")
    assert said.code == 2 and "--force" in said.err and out.read_text() == "mine"
    assert command("quantize", tiny_llama, "q8_0", "-o", out, "--no-measure", "--force").code == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_bits_and_group_stand_for_a_recipe(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    words = ("--bits", "4", "--q-group-size", "32", "-o", tmp_path / "x", "--dry-run", "--json")
    assert command("quantize", tiny_llama, *words).json["recipe"].startswith("gptq : int4-g32")


def _grids(plan: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["grid"] for row in plan["rows"] if len(row["shape"]) == 2}


def test_types_of_single_tensors(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    words = (
        "--tensor-type",
        r"blk\.[12]\.ffn_=q8_0",
        "--tensor-type",
        "ffn=q5_1",
        "--tensor-type",
        "absent=f16",
    )
    said = command("plan", tiny_llama, "Q4_0", *words, "--token-embedding-type", "q5_0", "--json").json
    grids = _grids(said)
    assert grids["model.layers.2.mlp.down_proj.weight"] == "q8_0"
    assert grids["model.layers.0.mlp.down_proj.weight"] == "q5_1"
    assert grids["model.layers.0.self_attn.q_proj.weight"] == "q4_0"
    assert grids["model.embed_tokens.weight"] == "q5_0"
    assert any("/absent/" in remark for remark in said["remarks"])
    made = command("quantize", tiny_llama, said["recipe"], "-o", out, "--no-measure")
    assert made.code == 0, made.err
    assert out.stat().st_size == said["bytes"]
    file = GgufFile(out)
    assert file.metadata["general.file_type"] == MIXTURES["Q4_0"]
    assert file.tensors["blk.1.ffn_up.weight"].type.name == "Q8_0"


def test_parts_of_an_output(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    words = (tiny_llama, "q8_0", "--split-max-size", "200K", "--split-max-tensors", "9")
    said = command("plan", *words, "--json").json
    assert len(said["files"]) > 2 and "split-max-size=200000, split-max-tensors=9" in said["recipe"]
    made = command("quantize", *words, "-o", tmp_path / "out", "--json").json
    assert made["measurement"]["bytes"] == sum(f["bytes"] for f in said["files"])
    found = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.gguf")}
    assert found == {f["path"]: f["bytes"] for f in said["files"]}
    refused = command("plan", *words, "-o", tmp_path / "out.gguf")
    assert refused.code == 2 and "folder" in refused.err
    assert command("plan", tiny_llama, "q8_0", "--split-max-size", "2X").code == 2


def test_pure_and_the_type_of_the_head(command: Command, tiny_llama: Path) -> None:
    """The embedding is also the head: it takes the head's type, unless the mixture is pure."""
    head = ("--output-tensor-type", "q5_1")
    assert (
        _grids(command("plan", tiny_llama, "Q4_0", *head, "--json").json)["model.embed_tokens.weight"]
        == "q5_1"
    )
    pure = command("plan", tiny_llama, "Q4_0", "--pure", *head, "--json").json
    assert set(_grids(pure).values()) == {"q4_0"} and any("head=q5_1" in r for r in pure["remarks"])


@pytest.mark.parametrize(
    ("recipe", "words", "part"),
    [
        ("W4A16", ("--pure",), "GGUF"),
        ("W4A16", ("--tensor-type", "v_proj=q8_0"), "q8_0"),
        ("W4A16", ("--output-tensor-type", "q8_0"), "GGUF"),
        ("Q4_0", ("--tensor-type", "(ffn=q8_0"), "does not compile"),
        ("Q4_0", ("--tensor-type", "ffn"), "names no type"),
        ("Q4_0", ("--token-embedding-type", "q9_0"), "no grid"),
        ("Q4_0", ("--token-embedding-type", "iq2_xs"), "embed"),
    ],
)
def test_types_that_cannot_be(
    command: Command, tiny_llama: Path, recipe: str, words: tuple[str, ...], part: str
) -> None:
    said = command("plan", tiny_llama, recipe, *words)
    assert said.code == 2 and part in said.err


def test_shapes_that_force_another_type_are_counted_listed_and_refused(
    command: Command, tiny_llama: Path
) -> None:
    said = command("plan", tiny_llama, "Q4_K_M", "--rows").out.splitlines()
    assert said[0].startswith("shapes force another type on") and "q4_k -> q5_0" in said[0]
    assert sum("instead of q4_k" in line for line in said[1:]) > 1
    refused = command("plan", tiny_llama, "Q4_K_M", "--strict")
    assert refused.code == 2 and "q6_k -> q8_0" in refused.err


def test_a_mixture_that_must_know_its_inputs_calibrates_by_itself(
    command: Command, tmp_path: Path, text: Path
) -> None:
    model, out = make_model(tmp_path / "wide", hidden_size=256), tmp_path / "q.gguf"
    few = ("--nsamples", "4", "--seqlen", "32")
    said = command("plan", model, "Q2_K_S", *few, "--json").json
    assert said["calibration"]["needs"] == "diagonal" and any("inputs" in r for r in said["remarks"])
    assert command("plan", model, "Q2_K", "--json").json["calibration"]["needs"] == "nothing"
    made = command("quantize", model, "Q2_K_S", "-o", out, *few, "--calib", text, "--no-measure")
    assert made.code == 0 and "calibration" in made.err, made.err
    assert out.stat().st_size == said["bytes"]


def test_moments_are_kept_for_another_recipe(
    command: Command, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    kept, words = tmp_path / "kept.safetensors", ("--nsamples", "4", "--seqlen", "32", "--no-measure")
    first = command(
        "quantize", tiny_llama, "gptq : q4_0", "-o", tmp_path / "a.gguf", "--calib", text, *words,
        "--save-moments", kept,
    )  # fmt: skip
    assert first.code == 0 and kept.is_file(), first.err
    second = command(
        "quantize", tiny_llama, "gptq : q8_0", "-o", tmp_path / "b.gguf", *words, "--moments", kept
    )
    assert second.code == 0, second.err


def test_measure_one_file(
    command: Command, tiny_llama: Path, quantized: Path, text: Path, tmp_path: Path
) -> None:
    page = tmp_path / "account.html"
    said = command("measure", quantized, "--against", tiny_llama, "--text", text, *SMALL, "--html", page)
    assert said.code == 0, said.err
    assert "KL divergence" in said.out and "same first choice" in said.out
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")


def test_measure_two_files_in_a_pair(command: Command, tiny_llama: Path, quantized: Path, text: Path) -> None:
    words = ("-a", tiny_llama, "--text", text, *SMALL)
    said = command("measure", quantized, tiny_llama, *words)
    assert said.code == 0 and "KL divergence, difference" in said.out
    found = command("measure", quantized, tiny_llama, *words, "--json").json
    assert len(found["records"]) == 2 and found["records"][1]["kld"]["mean"] == 0.0
    assert found["comparisons"][0]["kld_difference"] > 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--max-kld", "1e-9"), 3),
        (("--max-kld", "1e9"), 0),
        (("--min-same-top", "1"), 3),
        (("--limit", "kld.p90=1e-9"), 3),
        (("--max-worst-kld", "1e9", "--max-kld-p99", "1e9"), 0),
        (("--limit", "kld.men=1"), 2),
        (("--limit", "kld.mean"), 2),
    ],
)
def test_thresholds_are_exit_codes(
    command: Command, tiny_llama: Path, quantized: Path, text: Path, words: tuple[str, ...], code: int
) -> None:
    said = command("measure", quantized, "-a", tiny_llama, "--text", text, *SMALL, *words)
    assert said.code == code, said.err
    assert ("missed: q4.gguf" in said.err) == (code == 3)


def test_nothing_measured_is_not_a_pass(
    command: Command, tiny_llama: Path, quantized: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise NothingMeasured("none of 32 positions has finite logits")

    monkeypatch.setattr("bitmill.measurement.measure.measure_all", nothing)
    said = command("measure", quantized, "-a", tiny_llama, "--text", text, "--json")
    assert said.code == 4 and "finite" in said.err and not said.out
