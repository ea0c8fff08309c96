"""``bitmill sweep`` and ``bitmill bench`` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import Command


@pytest.fixture
def words(tmp_path: Path) -> tuple[object, ...]:
    text = tmp_path / "words.txt"
    text.write_text("".join(f"{i} green bottles on the wall, then {i * 7} more.\n" for i in range(200)))
    windows = ("--window", 32, "--windows", 2, "--nsamples", 4, "--seqlen", 32)
    return ("--text", text, "--calib", text, *windows, "--no-bench")


def test_a_sweep(command: Command, tiny_llama: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    out = tmp_path / "out"
    recipes = ("Q8_0", "Q4_0", "Q5_1")
    planned = command("sweep", tiny_llama, *recipes, "-o", out, *words, "--dry-run", "--json").json
    assert [t["name"] for t in planned["tiers"]] == list(recipes) and not out.exists()
    assert planned["forecast"]["seconds"] > 0
    said = command("sweep", tiny_llama, *recipes, "-o", out, *words, "--budget", "1GB")
    assert said.code == 0, said.err
    assert "KL divergence" in said.out and "least loss in 1.0 GB: Q8_0" in said.out and "front" in said.out
    assert "modelled" in said.out and "3 tiers into" in said.err
    made = command("sweep", tiny_llama, *recipes, "-o", out, *words, "--json")
    assert "3 of 3 tiers are there already" in made.err
    sizes = {t["name"]: (out / t["file"]).stat().st_size for t in made.json["tiers"]}
    assert sizes == {t["name"]: t["bytes"] for t in planned["tiers"]}
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page and "Q5_1" in page and (out / "sweep.json").is_file()


def test_what_is_refused(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    for wrong, said in {
        ("--ladder", "rope"): "no ladder",
        ("Q4_0", "--jobs", "2", "--ray", "local"): "--jobs",
        (): "no recipe",
        ("Q4_0", "--budget", "much"): "no size",
        ("Q4_0", "-o", tiny_llama / "config.json"): "is a file",
    }.items():
        heard = command("sweep", tiny_llama, *(wrong or ("-o", tmp_path / "x")))
        assert heard.code == 2 and said in heard.err, heard.err


def test_bench(command: Command, tiny_llama: Path) -> None:
    timed = command("bench", tiny_llama, "-p", 8, "-n", 4, "-r", 2, "--machine", "8 cores, 16GB", "--json")
    assert timed.code == 0, timed.err
    found = timed.json
    assert found["measured"]["decode"]["tokens"] == 4 and len(found["measured"]["prefill"]["repeats"]) == 2
    assert found["measured"]["evidence"] == "measured here" and found["modelled"]["evidence"] == "modelled"
    assert set(found["predicted_over_measured"]) == {"prefill", "decode"}
    table = command("bench", tiny_llama, "-p", 0, "-n", 2, "-r", 1)
    assert "tg2" in table.out and "pp" not in table.out.split("test", 1)[1]
    assert command("bench", tiny_llama, "-p", 0, "-n", 0).code == 2
