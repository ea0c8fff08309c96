"""``bitmill verify``, and ``--for`` of the verbs that make files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("verify") / "m", "llama", num_hidden_layers=1)


def test_a_sound_folder(command: Command, model: Path) -> None:
    said = command("verify", model, "--for", "transformers", "--for", "vllm@0.11")
    assert said.code == 0, said.out
    for phrase in ("dense, ", "checked: structure, files", "transformers 5.23: facts as of", "no errors"):
        assert phrase in said.out
    found = command("verify", model, "--json").json
    assert found["good"] and found["errors"] == 0 and found["manifest"] is None


def test_checksums(command: Command, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "llama", num_hidden_layers=1)
    assert command("verify", model, "--write-manifest").code == 0
    lines = (model / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == len(list(model.iterdir())) - 1
    digest, name = lines[0].split("  ")
    assert hashlib.sha256((model / name).read_bytes()).hexdigest() == digest
    assert "manifest" in command("verify", model, "--json").json["checked"]
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    said = command("verify", model)
    assert said.code == 3 and "not the one listed" in said.out and "1 error" in said.out
    assert command("verify", model, "--write-manifest").code == 0
    assert command("verify", model).code == 0


def test_levels_and_exit_codes(command: Command, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "llama", num_hidden_layers=1)
    (model / "extra.bin").write_bytes(b"x")
    said = command("verify", model)
    assert said.code == 0 and "\nwarning  1 pickled file" in said.out and "extra.bin" in said.out
    assert command("verify", model, "--strict").code == 3
    (model / "model.safetensors").write_bytes(b"")
    said = command("verify", model, "--write-manifest")
    assert said.code == 3 and "\nerror    " in said.out and "no checksums" in said.err
    assert command("verify", tmp_path / "nothing").code == 2
    assert command("verify", model, "--for", "abacus").code == 2


def test_a_plan_that_the_runtime_cannot_load(command: Command, model: Path, tmp_path: Path) -> None:
    mixed = "nearest : int4-g64-sym, q=int8-channel-sym > compressed-tensors"
    said = command("plan", model, mixed, "--for", "vllm@0.11")
    assert said.code == 2 and "vLLM 0.11 could not load this" in said.err and "stored alike" in said.err
    said = command("quantize", model, mixed, "-o", tmp_path / "out", "--for", "vllm")
    assert said.code == 2 and not list(tmp_path.iterdir())
    said = command("quantize", model, "W4A16", "--for", "vllm", "--dry-run")
    assert said.code == 0
    said = command("plan", model, "nf4", "--for", "vllm@0.30", "--json")
    assert said.code == 0 and "vllm-bnb-plugin" in said.err and said.json["memory"]
    assert command("plan", model, "hf-bf16", "--for", "sglang").code == 0
