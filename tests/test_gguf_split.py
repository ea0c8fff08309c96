"""A GGUF model in parts: the same tensors and keys, parts within their limit, read from any of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bitmill import mill
from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.gguf_write import Planned, divided, encoded, head
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.core.errors import BadFile, BadRecipe, Refused
from bitmill.core.types import Split
from bitmill.planning import plan
from bitmill.recipe import parse
from bitmill.source import open_path
from tests.test_gguf import LLAMA3
from tests.tiny import make_model

RECIPE = "nearest : q8_0 > gguf"
SPLITS = {
    "tensors": "nearest : q8_0, split-max-tensors=4 > gguf",
    "size": "nearest : q8_0, split-max-size=60K > gguf",
    "both": "nearest : q8_0, split-max-size=80K, split-max-tensors=7 > gguf",
    "one part": "nearest : q8_0, split-max-size=1G > gguf",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SafetensorsFolder:
    """Three blocks, and a tensor that comes from the configuration."""
    folder = tmp_path_factory.mktemp("split") / "some model"
    return SafetensorsFolder(make_model(folder, rope_parameters=LLAMA3, num_hidden_layers=3))


@pytest.fixture(scope="module")
def whole(source: SafetensorsFolder, tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    path = tmp_path_factory.mktemp("whole") / "out.gguf"
    mill.quantize(source, RECIPE, path)
    return GgufFile(path)


@pytest.mark.parametrize("how", SPLITS)
def test_parts_are_one_model(source: SafetensorsFolder, whole: GgufFile, how: str, tmp_path: Path) -> None:
    recipe = parse(SPLITS[how])
    assert parse(str(recipe)) == recipe
    made = plan(recipe, source)
    report = mill.quantize(source, recipe, tmp_path / "out")
    parts = sorted(p for p in (tmp_path / "out").iterdir() if p.suffix == ".gguf")
    assert [(p.name, p.stat().st_size) for p in parts] == [(f.path, f.bytes_) for f in made.files]
    assert (len(parts) == 1) is (how == "one part") and report.bytes_ == sum(p.stat().st_size for p in parts)
    assert parts[0].name == f"some-model-00001-of-{len(parts):05d}.gguf"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    if recipe.split_max_size:
        assert max(p.stat().st_size for p in parts) <= recipe.split_max_size
    for part in (*parts[:: max(len(parts) // 2, 1)], tmp_path / "out"):
        file = GgufFile(part)
        assert list(file.tensors) == list(whole.tensors)
        assert all(file.raw(name).tobytes() == whole.raw(name).tobytes() for name in file.tensors)
        kept = {k: v for k, v in file.raw_keys.items() if not k.startswith(("split.", "bitmill."))}
        assert kept == {k: v for k, v in whole.raw_keys.items() if not k.startswith("bitmill.")}
    assert isinstance(open_path(tmp_path / "out"), GgufCheckpoint)
    named = plan(recipe, GgufCheckpoint(parts[-1])).files
    assert [f.path for f in named] == [f.path for f in made.files]
    again = mill.quantize(GgufCheckpoint(parts[-1]), "q8_0", tmp_path / "again.gguf")
    assert not any(key.startswith("split.") for key in GgufFile(Path(again.path)).metadata)


def test_parts_are_filled_to_the_byte() -> None:
    """As many tensors as fit, whatever the limit; the next one would be too much."""
    keys = {"general.architecture": encoded("llama")}
    tensors = [Planned(f"t{k}", (k + 1, 8), 0, 32 * (k + 1)) for k in range(20)]
    whole = head(keys, tensors)[2]
    for limit in range(1024, whole + 300, 37):
        parts = divided(keys, tensors, Split(bytes_=limit))
        assert [t for _, group in parts for t in group] == tensors
        for at, (mine, group) in enumerate(parts):
            assert head(mine, group)[2] <= limit
            if at + 1 < len(parts):
                assert head(mine, [*group, parts[at + 1][1][0]])[2] > limit
    assert [len(group) for _, group in divided(keys, tensors, Split(tensors=7))] == [7, 7, 6]


def test_keys_of_parts_are_of_the_types_llama_cpp_wants() -> None:
    tensors = [Planned(f"t{k}", (8,), 0, 32) for k in range(3)]
    parts = divided({"a": encoded(1)}, tensors, Split(tensors=2))
    assert parts[0][0] == {
        "a": encoded(1),
        "split.no": b"\2\0\0\0" + b"\0\0",
        "split.count": b"\2\0\0\0" + b"\2\0",
        "split.tensors.count": b"\5\0\0\0" + b"\3\0\0\0",
    }
    assert list(parts[1][0]) == ["split.no", "split.count", "split.tensors.count"]


def test_what_cannot_be_split_is_refused(source: SafetensorsFolder, tmp_path: Path) -> None:
    for recipe, reason in (
        ("q8_0, split-max-size=2K > gguf", "the header alone"),
        ("q8_0, embed=f32, split-max-size=60K > gguf", "'token_embd.weight' alone"),
    ):
        with pytest.raises(Refused, match=reason) as caught:
            plan(parse(recipe), source)
        assert "split-max-size=" in str(caught.value.fix)
    with pytest.raises(Refused, match="folder"):
        plan(parse(SPLITS["size"]), source, tmp_path / "out.gguf")
    with pytest.raises(BadRecipe, match="only GGUF"):
        parse("int4-g64-sym, split-max-size=2G > compressed-tensors")
    with pytest.raises(BadRecipe, match="no size"):
        parse("q8_0, split-max-size=0 > gguf")
    with pytest.raises(BadRecipe, match="no number"):
        parse("q8_0, split-max-tensors=none > gguf")


def test_parts_that_do_not_belong_together_are_bad(source: SafetensorsFolder, tmp_path: Path) -> None:
    mill.quantize(source, SPLITS["tensors"], tmp_path / "out")
    parts = sorted((tmp_path / "out").glob("*.gguf"))
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(BadFile, match="not named so"):
        GgufFile(alone)
    kept = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(BadFile, match="says it is number 2"):
        GgufFile(parts[0])
    parts[1].write_bytes(kept)
    GgufFile(parts[2])
    lying = parts[0].read_bytes()
    name = b"split.tensors.count"
    at = lying.index(name) + len(name) + 4
    parts[0].write_bytes(lying[:at] + b"\7\0\0\0" + lying[at + 4 :])
    with pytest.raises(BadFile, match="7 are announced"):
        GgufFile(parts[0])
    parts[0].write_bytes(lying)
    parts[1].unlink()
    with pytest.raises(BadFile, match="missing"):
        GgufFile(tmp_path / "out")
    shutil.copy(parts[0], parts[0].with_name("other-00001-of-00001.gguf"))
    with pytest.raises(BadFile, match="2 models"):
        GgufFile(tmp_path / "out")
