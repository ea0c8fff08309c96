"""``bitmill advise``: for a reader, as JSON, what it makes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.published import LLAMA_8B, LLAMA_70B, QWEN3_30B_A3B


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """An 8B, as its configuration alone."""
    return written(tmp_path / "eight.json", LLAMA_8B)


def written(path: Path, config: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config), "utf-8")
    return path


def test_an_answer_with_its_evidence(command: Command, eight: Path) -> None:
    words = ("advise", eight, "--machine", "rtx4060ti 16GB + 32GB ddr5", "--context", "131072")
    said = command(*words)
    assert said.code == 0
    for phrase in (
        "eight: Q6_K, keys and values as q8_0", "(modelled)", "measured elsewhere on this family", "second: ",
        "make:  bitmill quantize MODEL Q6_K -o eight-Q6_K.gguf", "-ctk q8_0 -ctv q8_0 -ngl 999", "why ",
        "half of what the weights take", "Q4_K_M",
    ):  # fmt: skip
        assert phrase in said.out, phrase
    found = command(*words, "--json").json
    assert found["answer"]["recipe"] == "Q6_K" and found["runtime"] == "llama.cpp"
    assert found["run"].startswith("llama-server -m eight-Q6_K.gguf -c 131072 -np 1")
    assert found["answer"]["loss"]["evidence"] == "measured elsewhere on this family"


def test_nothing_fits_and_what_would(command: Command, eight: Path, tmp_path: Path) -> None:
    said = command("advise", eight, "--machine", "vram=8GB", "--context", "131072")
    assert said.code == 0 and "nothing fits with a context of 131,072. This would:" in said.out
    assert "eight: IQ4_XS, cache q8_0, context " in said.out
    large = written(tmp_path / "large.json", LLAMA_70B)
    assert "nothing fits, at any context" in command("advise", large, "--machine", "vram=8GB").out
    refused = command("advise", large, "--machine", "vram=8GB", "--make", "-o", tmp_path / "x")
    assert refused.code == 2 and "nothing is made" in refused.err


def test_experts_beside_the_card(command: Command, tmp_path: Path) -> None:
    mixture = written(tmp_path / "model" / "config.json", QWEN3_30B_A3B)
    said = command("advise", mixture, "--machine", "rtx3060 + 64GB ddr4")
    assert "layers beside the card" in said.out and "--n-cpu-moe" in said.out and "model: Q6_K" in said.out


def test_a_server_and_a_trainer(command: Command, eight: Path) -> None:
    served = command("advise", eight, "--machine", "h100", "--job", "serve", "--parallel", "8")
    assert "vllm serve eight-fp8-dynamic --max-model-len 8192 --max-num-seqs 8" in served.out
    assert "for each of 8" in served.out
    trained = command("advise", eight, "--machine", "vram=12GB", "--job", "finetune")
    assert "eight: nf4\n" in trained.out and "run:" not in trained.out
    mac = command("advise", eight, "--machine", "m2 16GB", "--context", "4096")
    assert "mlx_lm.server --model eight-mlx-" in mac.out and "unified memory" in mac.out


def test_a_runtime_and_a_cache_of_ones_own(command: Command, eight: Path) -> None:
    words = ("advise", eight, "--machine", "m2max 64GB", "--json")
    assert command(*words).json["runtime"] == "mlx"
    found = command(*words, "--runtime", "llama.cpp", "--kv", "q4_0").json
    assert found["runtime"] == "llama.cpp" and found["answer"]["kv"] == "q4_0"


def test_a_measurement_is_believed(command: Command, eight: Path, tmp_path: Path) -> None:
    record = written(tmp_path / "m.json", {"kld": {"mean": 0.3}, "tokens": 1000})
    words = ("advise", eight, "--machine", "rtx4090", "--measured", f"Q6_K={record}")
    found = command(*words, "--json").json
    assert found["answer"]["recipe"] == "Q5_K_M"
    assert "measured here, it loses 0.3" in str(found["tried"])


def test_it_makes_what_it_advises(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.gguf"
    words = ("advise", tiny_llama, "--machine", "8GB", "--context", "512", "--no-measure", "--make")
    said = command(*words, "-o", out)
    assert said.code == 0 and f"make:  bitmill quantize {tiny_llama} Q6_K -o {out}" in said.out
    assert command("inspect", out, "--json").json["parameters"] > 0
    for refused in (command(*words), command(*words, "-o", tmp_path / "x.gguf", "--json")):
        assert refused.code == 2 and "try:" in refused.err and not refused.out


def test_refusals(command: Command, eight: Path, tmp_path: Path) -> None:
    for words in (
        ("--job", "dance"), ("--runtime", "abacus"), ("--machine", "rtx4091"), ("--kv", "q9"),
        ("--measured", "Q4_K_M"), ("--job", "finetune", "--runtime", "mlx"),
        ("--make", "-o", str(tmp_path / "x.gguf"), "--machine", "rtx4090"),
    ):  # fmt: skip
        said = command("advise", eight, *words)
        assert said.code == 2 and "try:" in said.err, words
    assert command("advise", tmp_path / "none").code == 2
