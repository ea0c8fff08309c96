"""The verbs that only read: plan, inspect, recipes, doctor; for people and as JSON."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from bitmill.cli import say
from bitmill.cli.doctor import _within
from bitmill.cli.progress import Teller
from bitmill.core import registry
from bitmill.known import KNOWN
from bitmill.recipe import parse
from tests.cli.command import Command


def test_plan_is_exact_and_says_what_shapes_forced(command: Command) -> None:
    said = command("plan", "smollm2", "Q4_K_M")
    plan = command("plan", "smollm2", "Q4_K_M", "--json").json
    assert f"{plan['bytes']:,} bytes" in said.out
    assert said.out.splitlines()[0].startswith("shapes force another type")
    assert plan["calibration"]["needs"] == "nothing" and len(plan["rows"]) == 272


def test_plan_line_by_line(command: Command) -> None:
    said = command("plan", "smollm2", "q8_0", "--rows")
    assert said.code == 0 and "model.layers.29.mlp.down_proj.weight" in said.out


def test_strict_refuses_what_a_shape_forces(command: Command) -> None:
    said = command("plan", "smollm2", "Q4_K_M", "--strict")
    assert said.code == 2 and "--strict" in said.err and not said.out


@pytest.mark.parametrize("words", [("--keep", "v_proj,lm_head"), ("--ignore", "v", "--exclude", "head")])
def test_keep_by_any_name(command: Command, words: tuple[str, ...]) -> None:
    plan = command("plan", "smollm2", "nearest : q4_0 > gguf", *words, "--json").json
    kept = {row["role"] for row in plan["rows"] if row["grid"] in ("f32", "f16") and row["role"] == "v"}
    assert kept == {"v"} and "keep=v+head" in plan["recipe"]


def test_keep_of_nothing_known(command: Command) -> None:
    said = command("plan", "smollm2", "q4_0", "--keep", "mlp.experts")
    assert said.code == 2 and "v_proj" in said.err


def test_dry_run_writes_nothing(command: Command, tmp_path: Path) -> None:
    said = command("quantize", "smollm2", "q4_0", "-o", tmp_path / "x.gguf", "--dry-run")
    assert said.code == 0 and "bits a weight" in said.out and not list(tmp_path.iterdir())


def test_inspect_of_the_embedded_model(command: Command) -> None:
    said = command("inspect", "smollm2")
    assert said.code == 0 and "134,515,008 weights in 272 tensors" in said.out and "q4_1" in said.out
    assert "general.architecture = llama" in said.out and "tokenizer.ggml.tokens" not in said.out


def test_inspect_as_json(command: Command, tiny_llama: Path) -> None:
    found = command("inspect", tiny_llama, "--outliers", "--json").json
    assert found["architecture"] == "llama" and found["bpw"] == 32
    assert {e["name"] for e in found["entries"]} >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(e["outlier"] >= 1 for e in found["entries"])


def test_inspect_of_rubbish(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    said = command("inspect", tmp_path / "x.gguf")
    assert said.code == 2 and "x.gguf" in said.err and "Traceback" not in said.err


def test_recipes_list_everything_there_is(command: Command) -> None:
    said = command("recipes")
    for name in KNOWN:
        assert name in said.out
    for axis in registry.AXES:
        for name in registry.names(axis):
            assert name.replace("_", "-") in said.out
    assert "``" not in said.out


def test_recipes_as_json(command: Command) -> None:
    found = command("recipes", "--json").json
    assert found["recipes"] == dict(KNOWN) and set(found["axes"]) == set(registry.AXES)


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_recipe_parses_to_itself(name: str) -> None:
    recipe = parse(name)
    assert parse(str(recipe)) == recipe


def test_recipes_of_one_name(command: Command) -> None:
    assert command("recipes", "W4A16", "--json").json["recipe"] == str(parse("w4a16"))
    assert "container" in command("recipes", "Q4_K_M").out
    about = command("recipes", "nearest")
    assert about.code == 0 and "solvers" in about.out


def test_doctor_is_well_here(command: Command) -> None:
    said = command("doctor")
    assert said.code == 0 and metadata.version("torch") in said.out and "MISSING" not in said.out
    states = {line["state"] for line in command("doctor", "--json").json}
    assert states <= {"ok", "absent"}


def test_doctor_names_the_line_that_fixes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmill.cli.doctor._version", lambda name: {"numba": None}.get(name, "0.0.1"))
    said = command("doctor")
    assert said.code == 2 and 'pip install "numba>=' in said.out and 'pip install "torch>=' in said.out


def test_version_ranges() -> None:
    assert _within("5.23.0", "<6,>=5.0") and _within("2.13.0+cpu", ">=2.6")
    assert (
        not _within("6.0", "<6,>=5.0") and not _within("4.9.9", "<6,>=5.0") and not _within("2.5.1", ">=2.6")
    )


def test_plain_progress_is_lines_and_says_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Teller(live=False) as tell:
        for done in range(101):
            tell("block", done, 100, f"block {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "quantizing 0/100  block 0" and lines[-1] == "quantizing 100/100  block 100"
    assert len(lines) <= 3, "a hundred quick steps are not a hundred lines"


def test_a_live_bar_ends_without_a_word_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with Teller(live=True) as tell:
        tell("block", 1, 2, "block 1")
        tell("block", 2, 2, "block 2")
    assert not capsys.readouterr().out


def test_words_for_numbers() -> None:
    assert [say.size(n) for n in (12, 91_700_000, 8e9)] == ["12 B", "91.7 MB", "8.0 GB"]
    assert [say.duration(s) for s in (42.4, 187, 8100)] == ["42 s", "3:07", "2:15:00"]
    assert say.shortened("abcdefghij", 5) == "ab…ij"
