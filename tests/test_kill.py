"""kill -9 at every durable boundary and at random moments, then the same command: the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from bitmill import mill
from tests.tiny import make_model, tokens

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm", "tests.tiny"])
RECIPES = {
    "file.gguf": "gptq : q4_0, embed=q8_0 > gguf",
    "folder": "gptq : int4-g32-asym > compressed-tensors",
    "parts": "gptq : q4_0, embed=q8_0, split-max-tensors=5 > gguf",
}


def run(model: str, recipe: str, out: str, kill_at: int) -> None:
    """Quantize; SIGKILL ourselves at the ``kill_at``-th boundary (never, when negative)."""
    torch.set_num_threads(1)
    passed = 0

    def boundary(_: str) -> None:
        nonlocal passed
        if passed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    mill.quantize(model, recipe, out, calib=tokens(4, 32), seqlen=32, nsamples=4, boundary=boundary)


def start(model: Path, recipe: str, out: Path, kill_at: int = -1) -> ForkServerProcess:
    process = CONTEXT.Process(target=run, args=(str(model), recipe, str(out), kill_at))
    process.start()
    return process


def content(path: Path) -> dict[str, bytes]:
    """Every byte of an output but its report, which holds wall times."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != "bitmill-report.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], float]]:
    """The uninterrupted outputs, and how long they took."""
    folder = tmp_path_factory.mktemp("whole")
    outputs = {}
    for name, recipe in RECIPES.items():
        began = time.monotonic()
        process = start(model, recipe, folder / name)
        process.join()
        assert process.exitcode == 0
        outputs[name] = (content(folder / name), time.monotonic() - began)
    return outputs


@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_every_boundary(
    name: str, model: Path, whole: dict[str, tuple[dict[str, bytes], float]], tmp_path: Path
) -> None:
    kills, every = 0, 1 if name.endswith("gguf") else 5  # a folder differs only where it starts and is sealed
    while True:
        out = tmp_path / f"{kills}-{name}"
        process = start(model, RECIPES[name], out, kills)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        again = start(model, RECIPES[name], out)
        again.join()
        assert again.exitcode == 0, f"resume after boundary {kills}"
        assert content(out) == whole[name][0], f"other bytes after a kill at boundary {kills}"
        assert not out.with_name(out.name + ".partial").exists()
        kills += every
    assert kills >= 20


def test_killed_at_random_moments_again_and_again(
    model: Path, whole: dict[str, tuple[dict[str, bytes], float]], tmp_path: Path
) -> None:
    chance = random.Random(0)
    expected, seconds = whole["file.gguf"]
    out = tmp_path / "out.gguf"
    for _ in range(6):
        process = start(model, RECIPES["file.gguf"], out)
        process.join(chance.uniform(0.0, seconds))
        process.kill()
        process.join()
        if out.exists():
            assert content(out) == expected
    process = start(model, RECIPES["file.gguf"], out)
    process.join()
    assert process.exitcode == 0
    assert content(out) == expected
