"""``bitmill plan`` about memory: tables, verdicts, JSON, and what is refused."""

from __future__ import annotations

from pathlib import Path

from bitmill.checkpoint.gguf_write import encoded, head
from tests.cli.command import Command


def test_the_model_as_it_is(command: Command) -> None:
    said = command("plan", "smollm2", "--context", "4096", "--machine", "8GB")
    assert said.code == 0 and "keys and values" in said.out and "94.4 MB" in said.out
    assert "fits into RAM" in said.out and "all of the 8,192 tokens" in said.out


def test_without_any_option(command: Command) -> None:
    said = command("plan", "smollm2")
    assert said.code == 0 and "context 8,192" in said.out and "there is" in said.out


def test_nothing_fits_and_what_would(command: Command) -> None:
    found = command("plan", "smollm2", "--context", "8192", "--machine", "400MB", "--json").json["memory"]
    (place,) = found["places"]
    assert found["fits"] is None and place["spare_bytes"] < 0
    assert (
        0 < place["largest_context"] < 8192 and place["with_other_types"]["q8_0"] > place["largest_context"]
    )
    said = command("plan", "smollm2", "--context", "8192", "--machine", "400MB")
    assert said.code == 0 and f"a context of {place['largest_context']:,} fits" in said.out
    assert "does not fit into RAM" in said.out and "--kv q8_0: " in said.out


def test_card_and_main_memory_side_by_side(command: Command) -> None:
    words = ("--kv", "q8_0,q4_0", "--parallel", "2", "--machine", "ram=8GB,vram=600MB")
    said = command("plan", "smollm2", "q4_0", *words)
    assert "VRAM" in said.out and "q8_0 and q4_0" in said.out and "2 sequences" in said.out
    found = command("plan", "smollm2", "q4_0", *words, "--json").json
    assert found["memory"]["fits"] == "ram" and found["bytes"] > 0
    parts = {p["name"]: p for p in found["memory"]["places"][1]["parts"]}
    assert parts["keys and values"]["bytes"] == 2 * 8192 * 30 * 192 * (34 + 18) // 32
    assert parts["keys and values"]["evidence"] == "exact" and parts["one step"]["evidence"] == "modelled"


def test_a_plan_says_nothing_of_it_unasked(command: Command) -> None:
    assert "memory" not in command("plan", "smollm2", "q4_0", "--json").json


def test_a_folder_for_a_server(command: Command, tiny_llama: Path) -> None:
    words = ("plan", tiny_llama, "int4-g32", "--machine", "vram=24GB", "--kv", "fp8")
    assert command(*words, "--json").json["memory"]["runtime"] == "vllm"
    assert command(*words, "--runtime", "transformers").code == 2


def test_an_architecture_that_is_not_quantized_here(command: Command, tmp_path: Path) -> None:
    numbers = {
        "block_count": 4, "embedding_length": 64, "vocab_size": 100, "context_length": 1 << 20,
        "ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16,
    }  # fmt: skip
    keys = {"general.architecture": "mamba", **{f"mamba.{k}": v for k, v in numbers.items()}}
    header, _, size = head({k: encoded(v) for k, v in keys.items()}, [])
    (tmp_path / "x.gguf").write_bytes(header.ljust(size, b"\0"))
    found = command("plan", tmp_path / "x.gguf", "--context", "100000", "--machine", "1GB", "--json").json
    parts = {p["name"]: p["bytes"] for p in found["memory"]["places"][0]["parts"]}
    assert parts["recurrent states"] == 4 * 4 * (3 * 128 + 16 * 128) and parts["keys and values"] == 0


def test_options_about_a_recipe_need_one(command: Command) -> None:
    for words in (("--keep", "v"), ("--group-size", "64"), ("--pure",), ("--rows",), ("-o", "x.gguf")):
        said = command("plan", "smollm2", "--context", "512", *words)
        assert said.code == 2 and "no recipe is given" in said.err


def test_refusals(command: Command, tiny_llama: Path) -> None:
    for words in (("--kv", "q9"), ("--machine", "big"), ("--kv", "fp8"), ("--runtime", "vllm")):
        said = command("plan", "smollm2", *words)
        assert said.code == 2 and "try:" in said.err and not said.out
    assert command("plan", "smollm2", "--context", "0").code == 2
    assert command("plan", tiny_llama / "config.json", "--context", "8").code == 2


def test_how_fast_and_where_the_cliff_is(command: Command, tmp_path: Path) -> None:
    words = ("plan", "smollm2", "--context", "8192", "--machine")
    said = command(*words, "rtx4090 + 64GB ddr5")
    assert "all 30 layers on the card" in said.out and "tokens/s" in said.out and "modelled" in said.out
    assert "the cliff:" in said.out and "one beside it" in said.out
    drawn = tmp_path / "cliff.svg"
    found = command(*words, "vram=700MB + 8GB ddr4", "--plot", drawn, "--json").json["memory"]
    assert 0 < found["speed"]["layers_that_fit"] < 30 and found["machine"]["vram_bytes"] == 700 * 10**6
    assert f"room for {found['speed']['layers_that_fit']}" in drawn.read_text("utf-8")
    assert all(split["evidence"] == "modelled" for split in found["speed"]["splits"])
    partly = command(*words, "vram=700MB + 8GB ddr4").out
    assert f"{found['speed']['layers_that_fit']} of 30 layers on the card" in partly


def test_one_memory_and_no_cliff(command: Command, tmp_path: Path) -> None:
    said = command("plan", "smollm2", "--machine", "m2max 64GB")
    assert "fits into unified memory" in said.out and "cliff" not in said.out
    refused = command("plan", "smollm2", "--machine", "8GB", "--plot", tmp_path / "x.svg")
    assert refused.code == 2 and "no cliff to draw" in refused.err and not list(tmp_path.iterdir())
    away = command("plan", "smollm2", "--machine", "rtx4090,8GB", "--plot", tmp_path / "no" / "x.svg")
    assert away.code == 2 and "cannot write" in away.err


def test_a_machine_nobody_knows(command: Command) -> None:
    said = command("plan", "smollm2", "--machine", "rtx4091 + 64GB")
    assert said.code == 2 and "rtx4090" in said.err and not said.out


def test_a_runtime_whose_memory_is_not_modelled_may_still_be_planned_for(command: Command) -> None:
    said = command("plan", "smollm2", "q8_0", "--for", "vllm@0.20")
    assert said.code == 0 and "q8_0" in said.out, said.err
    assert "what running it takes is left out" in said.err and "GGUF is experimental" in said.err
    asked = command("plan", "smollm2", "q8_0", "--for", "vllm@0.20", "--context", "4096")
    assert asked.code == 2 and "not modelled" in asked.err
