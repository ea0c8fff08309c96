"""Help, spellings and the shape of refusals: what a newcomer meets first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bitmill.cli.main import main
from bitmill.core.errors import Interrupted
from tests.cli.command import Command

VERBS = (
    "quantize",
    "measure",
    "convert",
    "run",
    "summarize",
    "plan",
    "verify",
    "budget",
    "advise",
    "inspect",
    "imatrix",
    "finetune",
    "merge",
    "train-ternary",
    "studio",
    "names",
    "recipes",
    "doctor",
)


def test_help_names_every_verb_and_the_exit_codes(command: Command) -> None:
    said = command("--help")
    assert said.code == 0
    for word in (*VERBS, "RECIPE", "smollm2", "Exit codes", "threshold"):
        assert word in said.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(command: Command, verb: str) -> None:
    said = command(verb, "--help")
    assert said.code == 0 and "Exit codes" in said.out
    if verb not in ("doctor",):
        assert f"      bitmill {verb}" in said.out, "the example keeps its own line"
    assert "``" not in said.out and ":class:" not in said.out


def test_help_needs_no_torch() -> None:
    heavy = "('torch', 'transformers', 'numba')"
    probe = f"import sys, bitmill.cli.main; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_version(command: Command) -> None:
    assert command("--version").out.startswith("bitmill 0.")


def test_underscores_and_dashes_are_alike(command: Command) -> None:
    one = command(
        "plan", "smollm2", "q4_0", "--max_seq_length", "256", "--num_calibration_samples=4", "--json"
    )
    other = command("plan", "smollm2", "Q4-0", "--seqlen", "256", "--nsamples", "4", "--json")
    assert one.code == other.code == 0 and one.json == other.json


def test_an_unknown_option_is_an_error_with_a_suggestion(command: Command) -> None:
    said = command("plan", "smollm2", "q4_0", "--stricty")
    assert said.code == 2 and "--strict" in said.err and not said.out


def test_an_unknown_recipe_is_an_error_with_a_suggestion(command: Command) -> None:
    said = command("plan", "smollm2", "q4_k_n")
    assert said.code == 2 and "did you mean" in said.err and "Traceback" not in said.err


def test_a_missing_model_says_what_would_work(command: Command) -> None:
    said = command("plan", "no-such-folder", "q4_0")
    assert said.code == 2 and "no-such-folder" in said.err and "try:" in said.err


def test_a_recipe_and_bits_are_two_answers(command: Command) -> None:
    said = command("plan", "smollm2", "q4_0", "--bits", "4")
    assert said.code == 2 and "two answers" in said.err


def test_no_recipe_at_all(command: Command) -> None:
    said = command("quantize", "smollm2", "-o", "out.gguf")
    assert said.code == 2 and "no recipe is given" in said.err


def test_no_output_is_refused_before_anything(command: Command) -> None:
    said = command("quantize", "smollm2", "q4_0")
    assert said.code == 2 and "-o" in said.err


def stopped() -> Interrupted:
    """What the mill raises on Ctrl-C."""
    error = Interrupted("stopped", fix="the same command again")
    error.__cause__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (KeyError("q_proj"), 2, "defect"),
        (Interrupted("the disk is full", fix="the same command again"), 2, "the same command again"),
        (stopped(), 130, "the same command again"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_no_traceback_whatever_happens(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, word: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("bitmill.source.open_source", fails)
    said = command("plan", "smollm2", "q4_0")
    assert said.code == code and word in said.err and "Traceback" not in said.err


def test_debug_shows_the_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    said = command("plan", "smollm2", "nonsense", "--debug")
    assert said.code == 2 and "Traceback" in said.err


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -c 'from bitmill.cli.main import main; main()' recipes --json | head -1"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "{" and "Traceback" not in run.stderr and "defect" not in run.stderr


def test_main_takes_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
