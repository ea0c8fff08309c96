"""``bitmill names``."""

from __future__ import annotations

from tests.cli.command import Command


def test_the_names_everybody_meets(command: Command) -> None:
    words = ("Q4_K_M", "IQ3_XXS", "UD-Q5_K_XL", "W4A16", "NVFP4", "4.65bpw")
    said = command("names", *words)
    assert said.code == 0 and all(f"\n{word}\n" in f"\n{said.out}" for word in words)
    for phrase in ("llama.cpp's mixtures", "computed" not in said.out and "over Llama 3 8B", "--bpw 4.65"):
        assert str(phrase) in said.out
    found = command("names", *words, "--json").json
    assert [one["name"] for one in found] == list(words)
    assert found[0]["bits"]["evidence"] == "computed" and found[5]["bits"]["evidence"] == "named"
    assert found[2]["recipe"] is None and found[1]["calibrates"] is True


def test_an_unknown_name(command: Command) -> None:
    said = command("names", "Q4_K_N")
    assert said.code == 2 and "did you mean" in said.err and not said.out


def test_an_unknown_name_among_known_ones(command: Command) -> None:
    said = command("names", "Q4_K_M", "Q4_K_N", "W4A16", "zzzzz")
    assert said.code == 2
    assert "\nW4A16\n" in said.out and said.out.startswith("Q4_K_M\n")
    assert "'Q4_K_N'" in said.err and "Q4_K_M" in said.err and "'zzzzz'" in said.err
    found = command("names", "Q4_K_N", "Q4_K_M", "--json")
    assert found.code == 2
    assert [(one["name"], one.get("unknown", False)) for one in found.json] == [
        ("Q4_K_M", False),
        ("Q4_K_N", True),
    ]
    assert "Q4_K_M" in found.json[1]["nearest"] and found.json[1]["nearest"][0].startswith("Q4_K_")
