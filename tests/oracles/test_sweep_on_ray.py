"""A sweep on a local Ray cluster of two workers makes the very files that it makes in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_model

pytestmark = pytest.mark.client

ray = pytest.importorskip("ray")
RECIPES = ("Q8_0", "Q4_0", "nearest : int4-g32 > gptq")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "model", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall, {i * i} of them green.\n" for i in range(200)))
    return path


def sweep(model: Path, text: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """As its user calls it, from another folder than the outputs'."""
    words = ["sweep", str(model), *RECIPES, "-o", out.name, "--calib", str(text), "--text", str(text)]
    sizes = ["--nsamples", "4", "--seqlen", "32", "--window", "32", "--windows", "2", "--json"]
    return subprocess.run(
        [sys.executable, "-m", "bitmill", *words, *sizes, *more],
        cwd=out.parent,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every weights file of a sweep."""
    kinds = (".gguf", ".safetensors")
    found = [p for p in folder.rglob("*") if p.suffix in kinds and ".sweep" not in p.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_two_workers_make_the_same_files(model: Path, text: Path, tmp_path: Path) -> None:
    here = sweep(model, text, tmp_path / "here")
    there = sweep(model, text, tmp_path / "there", "--ray", "local:2")
    assert here.returncode == 0, here.stderr
    assert there.returncode == 0, there.stderr
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert len(files(tmp_path / "here")) == len(RECIPES) + 1  # and an importance matrix
    one, two = (json.loads(done.stdout) for done in (here, there))
    assert one.keys() == two.keys()


def test_a_cluster_that_is_not_there_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    done = sweep(model, text, tmp_path / "out", "--ray", "127.0.0.1:1")
    assert done.returncode == 2
    assert "there is no Ray cluster at '127.0.0.1:1'" in done.stderr
    assert not (tmp_path / "out").exists()
