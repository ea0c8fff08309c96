"""Several outputs of one call: each is what it would be alone, and nothing is done twice that need not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bitmill
from bitmill import mill, several, walk
from bitmill.core.errors import Interrupted, Refused
from tests.test_kill import content
from tests.tiny import make_model, tokens

RECIPES = {
    "a.gguf": "gptq : q4_0, embed=q8_0 > gguf",
    "b": "gptq : int4-g32-sym > gptq",
    "c": "gptq : int4-g32-sym, dtype=f16 > compressed-tensors",
    "d": "gptq : int4-g32-sym-sf16, dtype=bf16 > bitmill",
    "e": "nearest : int8-channel-sym > compressed-tensors",
}
HOW: dict[str, Any] = {"nsamples": 4, "seqlen": 32, "calib": tokens(4, 32)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), dtype="float16")


def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The containers of every walk that solves weights, as they begin."""
    begun: list[str] = []
    run = walk.Walk.run

    def counted(self: walk.Walk, *words: Any) -> Any:
        begun.append(self.plan.recipe.container)
        return run(self, *words)

    monkeypatch.setattr(walk.Walk, "run", counted)
    return begun


def test_every_output_is_what_it_would_be_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = solved(monkeypatch)
    outs = [tmp_path / name for name in RECIPES]
    reports = bitmill.quantize_many(str(model), list(RECIPES.values()), outs, **HOW)
    assert begun == ["gguf", "gptq", "compressed_tensors"], "c and d took b's weights"
    for out, recipe, report in zip(outs, RECIPES.values(), reports, strict=True):
        alone = tmp_path / f"alone-{out.name}"
        single = mill.quantize(str(model), recipe, alone, **HOW)
        assert content(out) == content(alone), out.name
        assert report.tensors == single.tensors and report.blocks == single.blocks
        assert report.calibration == single.calibration
        shared = [note.text for note in report.notes if note.kind == "shared"]
        assert bool(shared) == (out.name in "cd") and (not shared or "b:" in shared[0])
        again = mill.quantize(str(model), recipe, out, **HOW)
        assert any(note.kind == "present" for note in again.notes), "a run alone knows it as its own"


def test_transforms_are_shared_with_what_they_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = solved(monkeypatch)
    recipes = [f"awq + gptq : int4-g32-sym-sf16, dtype=f16 > {c}" for c in ("compressed-tensors", "bitmill")]
    bitmill.quantize_many(str(model), recipes, [tmp_path / "a", tmp_path / "b"], **HOW)
    assert begun == ["compressed_tensors"]
    mill.quantize(str(model), recipes[1], tmp_path / "alone", **HOW)
    assert content(tmp_path / "b") == content(tmp_path / "alone")


def test_windows_are_drawn_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    take = mill.calibration_tokens

    def counted(*words: Any, **more: Any) -> Any:
        drawn.append(1)
        return take(*words, **more)

    monkeypatch.setattr(mill, "calibration_tokens", counted)
    recipes = ["gptq : q4_0 > gguf", "gptq : int4-g32-asym > compressed-tensors"]
    bitmill.quantize_many(str(model), recipes, [tmp_path / "a.gguf", tmp_path / "b"], **HOW)
    assert len(drawn) == 1


def test_all_are_refused_before_any_is_made(model: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b"
    with pytest.raises(Refused, match="cannot hold"):
        bitmill.quantize_many(str(model), ["q8_0", "nearest : nf4-b64 > gptq"], [a, b])
    with pytest.raises(Refused, match="one place"):
        bitmill.quantize_many(str(model), ["q8_0", "nearest : q4_0 > gguf"], [a, a])
    with pytest.raises(Refused, match="one place"):
        bitmill.quantize_many(str(model), ["nearest : int4-g32 > gptq", "q8_0"], [b, b / "a.gguf"])
    with pytest.raises(Refused, match="2 recipes and 1 outputs"):
        bitmill.quantize_many(str(model), ["q8_0", "q4_0"], [a])
    b.mkdir()
    with pytest.raises(Refused, match="exists"):
        bitmill.quantize_many(str(model), ["q8_0", "nearest : int4-g32 > gptq"], [a, b])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_the_disk_must_hold_all_of_them(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = bitmill.plan(bitmill.parse("q8_0"), bitmill.open_source(str(model))).bytes_
    free = type("Usage", (), {"free": one + (64 << 20) + one // 2})
    monkeypatch.setattr("bitmill.forecast.shutil.disk_usage", lambda _: free)
    with pytest.raises(Refused, match="free"):
        bitmill.quantize_many(str(model), ["q8_0", "q8_0"], [tmp_path / "a.gguf", tmp_path / "b.gguf"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unit", ["block 0: journaled", "block 1: synced", "sealed: renamed"])
@pytest.mark.parametrize("output", [0, 1])
def test_a_stop_anywhere_is_gone_on_from(output: int, unit: str, model: Path, tmp_path: Path) -> None:
    recipes, outs = [RECIPES["b"], RECIPES["c"]], [tmp_path / "b", tmp_path / "c"]
    seen = 0

    def stop(where: str) -> None:
        nonlocal seen
        seen += where == unit
        if where == unit and seen == output + 1:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        several.quantize_many(str(model), recipes, outs, **HOW, boundary=stop)
    several.quantize_many(str(model), recipes, outs, **HOW)
    for out, recipe in zip(outs, recipes, strict=True):
        mill.quantize(str(model), recipe, tmp_path / "alone", **HOW, force=True)
        assert content(out) == content(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c", "alone"}


def test_moments_from_a_file_serve_all(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "moments.safetensors"
    mill.quantize(str(model), RECIPES["b"], tmp_path / "b", **HOW, save=saved)
    monkeypatch.setattr(mill, "calibration_tokens", lambda *_, **__: pytest.fail("nothing is to be drawn"))
    recipes = [RECIPES["a.gguf"], "gptq : int3-g32-asym > bitmill"]
    outs = [tmp_path / "a.gguf", tmp_path / "c"]
    reports = bitmill.quantize_many(str(model), recipes, outs, moments=saved)
    assert all("weighted" in error for report in reports for error in report.tensors.values())
