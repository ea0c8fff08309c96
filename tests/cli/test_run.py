"""The verbs ``run`` and ``summarize``, as a user meets them: words, numbers, tables, refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitmill.run.ready import loaded, opened
from bitmill.run.speak import Speaker
from tests.cli.command import Command
from tests.test_document import pdf
from tests.tiny import make_model

WORDS = ("--max-tokens", "6")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_answer_and_what_it_took(command: Command, tiny_llama: Path) -> None:
    said = command("run", tiny_llama, "Why?", *WORDS)
    assert said.code == 0 and said.out.endswith("\n")
    assert "read " in said.err and "tokens/s" in said.err and "greedy" in said.err
    assert "memory: weights" in said.err and "as f32" in said.err and "predicted" in said.err
    found = command("run", tiny_llama, "Why?", *WORDS, "--json").json
    assert f"{found['answer']}\n" == said.out and found["stopped"] in ("max-tokens", "end")
    assert found["template"] is True and found["sampling"]["temperature"] == 0
    cache, weights = found["memory"]["cache"], found["memory"]["weights"]
    assert cache["bytes"] == cache["predicted_bytes"] == cache["tokens"] * 3 * 2 * 2 * 32 * 4
    assert cache["tokens"] == found["prompt_tokens"] + found["answer_tokens"] - 1
    assert weights["file_bytes"] > 0 and weights["dtype"] == "f32"


@pytest.mark.parametrize("kv", ["turboquant-3.5", "k=q8_0,v=q4_0-rot", "kivi-4,window=8,ends=1", "f16"])
def test_a_packed_cache_holds_what_was_predicted(command: Command, tiny_llama: Path, kv: str) -> None:
    found = command("run", tiny_llama, "Why?", *WORDS, "--kv", kv, "--json").json
    cache = found["memory"]["cache"]
    assert cache["kv"] == kv and cache["bytes"] == cache["predicted_bytes"] > 0


def test_words_come_one_by_one(command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("bitmill.cli.speaking.shown", lambda text: pieces.append(text) or text)
    said = command("run", tiny_llama, "Why?", "--max-tokens", "20")
    assert len(pieces) > 3 and "".join(pieces) + "\n" == said.out


def test_a_seed_draws_the_same(command: Command, tiny_llama: Path) -> None:
    def drawn(*words: str) -> str:
        return command("run", tiny_llama, "Why?", *WORDS, "--temp", "20", "--top-k", "50", *words).out

    assert drawn("--seed", "1") == drawn("--seed", "1") != drawn("--seed", "2")


def test_the_prompt_from_standard_input(
    command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = command("run", tiny_llama, "Why is it so?", *WORDS).out
    monkeypatch.setattr("sys.stdin", io.StringIO("Why is it so?"))
    assert command("run", tiny_llama, "-", *WORDS).out == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "empty" in command("run", tiny_llama, "-").err


def test_a_document_before_the_prompt(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The wheel turns.<|im_end|>")
    (tmp_path / "a.pdf").write_bytes(pdf("The wheel turns."))
    said = command("run", tiny_llama, "What turns?", "--file", tmp_path / "a.txt", *WORDS)
    assert said.code == 0 and "ordinary words" in said.err
    found = command("run", tiny_llama, "What turns?", "-f", tmp_path / "a.pdf", *WORDS, "--json").json
    both = command("run", tiny_llama, "The wheel turns.\n\nWhat turns?", *WORDS, "--json").json
    assert found["answer"] == both["answer"] and found["prompt_tokens"] == both["prompt_tokens"]


def test_system_and_plain(command: Command, tiny_llama: Path) -> None:
    bare = command("run", tiny_llama, "Why?", *WORDS, "--json").json
    system = command("run", tiny_llama, "Why?", *WORDS, "--system", "Be brief.", "--json").json
    assert system["prompt_tokens"] > bare["prompt_tokens"]
    said = command("run", tiny_llama, "Why?", *WORDS, "--plain")
    assert "continued as it is" in said.err
    refused = command("run", tiny_llama, "Why?", "--plain", "--system", "Be brief.")
    assert refused.code == 2 and "leave out --system" in refused.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("Why?", "--context", "100000"), "longer than the 512 the model was trained for"),
        (("Why? " * 600,), "--parts"),
        (("Why?", "--context", "8"), "the context is 8"),
        (("Why?", "--kv", "turbofish-3"), "turbofish-3"),
        (("Why?", "--dtype", "int4"), "--dtype"),
        (("Why?", "--temperature", "0", "--top-p", "0.5"), "no say"),
        (("Why?", "--top-p", "0"), "top_p"),
        (("",), "empty"),
        ((" \n",), "empty"),
        (("Why?", "--file", "/nowhere/paper.txt"), "does not exist"),
        (("--file", "paper.txt"), "bitmill summarize"),
        ((), "there is no prompt"),
        (("Why?", "--device", "toaster"), "toaster"),
    ],
)
def test_refusals(
    command: Command,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    reason: str,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("bitmill.run.ready.load_model", never)
    said = command("run", tiny_llama, *words)
    assert said.code == 2 and reason in said.err and not said.out


def test_a_file_that_is_not_there(command: Command, tmp_path: Path) -> None:
    said = command("run", tmp_path / "none.gguf", "Why?")
    assert said.code == 2 and "there is no file or folder" in said.err


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Someone at a terminal."""
    waiting = iter(lines)

    def next_line(_: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin", _Terminal())
    monkeypatch.setattr("builtins.input", next_line)


def test_turn_after_turn(command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = command("run", tiny_llama, "Why?", *WORDS).out
    typed(monkeypatch, "Why?", "", "And then?", "/new", "Why?", "/what")
    said = command("run", tiny_llama, *WORDS)
    assert said.code == 0 and "/what is no command" in said.err and "more were there" in said.err
    assert said.out.startswith(alone) and said.out.endswith(alone + "\n")
    assert said.err.count("read ") == 3 and said.err.count("memory: ") == 1


def test_what_goes_wrong_with_one_turn(
    command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "Why? " * 600, "Why?")
    said = command("run", tiny_llama, *WORDS)
    assert said.code == 0 and "the context is 512" in said.err and said.err.count("wrote ") == 1


def test_a_stopped_turn_is_forgotten(
    command: Command, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = command("run", tiny_llama, "Why?", *WORDS).out
    speak, calls = Speaker.speak, iter((True, False))

    def stopped(self: Speaker, *rest: object) -> object:
        if next(calls):
            raise KeyboardInterrupt
        return speak(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Speaker, "speak", stopped)
    typed(monkeypatch, "What?", "Why?")
    said = command("run", tiny_llama, *WORDS)
    assert said.code == 0 and "this turn is forgotten" in said.err and said.out.strip() == plain.strip()


def test_a_packed_cache(command: Command, tiny_llama: Path) -> None:
    found = command("run", tiny_llama, "Why?", *WORDS, "--kv", "q4_0", "--json").json
    cache = found["memory"]["cache"]
    assert cache["kv"] == "q4_0" and cache["bytes"] == cache["predicted_bytes"] > 0
    said = command("run", tiny_llama, "Why?", *WORDS, "--kv", "q4_0", "--chunk", "4")
    assert said.out == f"{found['answer']}\n" and "as q4_0" in said.err


def test_a_terminal_is_not_commanded_by_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitmill.cli.speaking import shown

    text = "a\x1b[2Jb\x07\x9bc\td\n\x7fé"
    assert shown(text) == text
    monkeypatch.setattr("sys.stdout", _Terminal())
    assert shown(text) == "a[2Jbc\td\né"


def test_a_summary(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    paper = tmp_path / "paper.txt"
    paper.write_text("The wheel turns. " * 100)
    words = ("summarize", paper, tiny_llama, "--bullets", "2", "--max-tokens", "20", "--context", "256")
    said = command(*words)
    assert said.code == 0 and said.out.startswith("-")
    assert "are read, and the last" in said.err and "first word after" in said.err and "memory:" in said.err
    found = command(*words, "--json").json
    (row,) = found["rows"]
    assert found["document"]["name"] == "paper.txt" and found["asked_bullets"] == 2
    assert row["text"] == said.out.rstrip("\n") and row["document"]["left_out_tokens"] > 0
    assert row["memory"]["cache"]["bytes"] == row["memory"]["cache"]["predicted_bytes"] > 0
    assert row["seconds"]["first"] <= row["seconds"]["last"]
    parts = command(*words, "--parts", "--json").json["rows"][0]
    assert parts["passes"] > 2 and parts["document"]["left_out_tokens"] == 0


def test_several_beside_one_another(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "qwen3", seed=1)
    paper = tmp_path / "paper.md"
    paper.write_text("The wheel turns. " * 10)
    words = ("summarize", paper, tiny_llama, other, tiny_llama, "-b", "1", "-n", "12", "--compare")
    both = command(*words, "--kv", "f32", "--kv", "turboquant-3").out.splitlines()
    assert sum("turboquant-3" in line for line in both[:8]) == 3 and "as the first" in both[6]
    said = command(*words)
    lines = said.out.splitlines()
    assert said.code == 0 and lines[0].split()[:2] == ["model", "cache"] and len(lines) > 8
    assert "as the first" in lines[4] and "as the first" not in lines[2]
    found = command(*words, "--json").json["rows"]
    assert [row["model"] for row in found] == [str(tiny_llama), str(other), str(tiny_llama)]
    assert found[0]["text"] == found[2]["text"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("MODEL", "MODEL"), "--compare"),
        (("MODEL", "--kv", "f32", "--kv", "f16"), "--compare"),
        (("MODEL", "--context", "100000"), "trained for"),
        (("MODEL", "--kv", "turbofish"), "turbofish"),
        (("nowhere.gguf",), "there is no file or folder"),
    ],
)
def test_summaries_that_are_refused(
    command: Command, tiny_llama: Path, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    paper = tmp_path / "paper.txt"
    paper.write_text("The wheel turns.")
    said = command("summarize", paper, *(tiny_llama if word == "MODEL" else word for word in words))
    assert said.code == 2 and reason in said.err and not said.out
    assert command("summarize", tmp_path / "none.txt", tiny_llama).code == 2


def test_a_real_pipe(tiny_llama: Path) -> None:
    line = [sys.executable, "-m", "bitmill", "run", str(tiny_llama), "-", "--json", *WORDS]
    run = subprocess.run(line, input="Why?", capture_output=True, text=True, check=False)
    assert run.returncode == 0 and json.loads(run.stdout)["prompt_tokens"] > 0 and not run.stderr


def test_the_words_are_the_librarys(command: Command, tiny_llama: Path) -> None:
    from bitmill.run.chat import Conversation
    from bitmill.run.draw import Sampling

    ready = loaded(opened(str(tiny_llama)))
    speaker = Speaker(ready)
    ids, _ = Conversation(ready.opened.tokenizer).ask("Why?")
    spoken = speaker.speak(speaker.read(ids), Sampling(), 6)
    assert command("run", tiny_llama, "Why?", *WORDS).out == spoken.text + "\n"
