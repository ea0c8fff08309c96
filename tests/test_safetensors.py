"""Reading and planning safetensors folders: real folders, shards, and every way a header can lie."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.checkpoint.safetensors import SafetensorsFolder, TensorFolder, read_header
from bitmill.checkpoint.safetensors_write import folder_images, safetensors_images
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import FileImage
from tests.tiny import make_model


def realised(images: tuple[FileImage, ...], folder: Path, data: dict[str, bytes]) -> Path:
    """Write file images and their slots."""
    for image in images:
        content = bytearray(image.bytes_)
        content[: len(image.head)] = image.head
        for slot in image.slots:
            assert len(data[slot.name]) == slot.bytes_
            content[slot.offset : slot.offset + slot.bytes_] = data[slot.name]
        (folder / image.path).write_bytes(content)
    return folder


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def with_header(path: Path, entries: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reads_what_transformers_wrote(tmp_path: Path, dtype: str) -> None:
    folder = make_model(tmp_path, "llama", tied=False, dtype=dtype)
    checkpoint = SafetensorsFolder(folder)
    wanted = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(checkpoint.read(name), value)
        assert checkpoint.tensors[name].shape == tuple(value.shape)
    assert {f.dtype for f in checkpoint.tensors.values()} == {
        {"float32": "f32", "bfloat16": "bf16"}.get(dtype, "f16")
    }
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.carried["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert "model.safetensors" not in checkpoint.carried


def test_tied_head_is_absent_even_when_the_file_repeats_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", tied=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in SafetensorsFolder(folder).tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    repeated = SafetensorsFolder(folder)
    assert "lm_head.weight" not in repeated.tensors and repeated.config["tie_word_embeddings"] is True
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    own = SafetensorsFolder(folder)
    assert "lm_head.weight" in own.tensors and own.config["tie_word_embeddings"] is False


def test_images_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "single": torch.randn(4, 4),
        "long": torch.tensor([3, 4]),
        "brain": torch.randn(2).bfloat16(),
        "byte": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
    }
    dtypes = ("U8", "F16", "F32", "I64", "BF16", "F8_E4M3", "F32")
    planned = {n: (d, tuple(t.shape)) for (n, t), d in zip(tensors.items(), dtypes, strict=True)}
    (image,) = safetensors_images(planned, {"who": "ü"})
    realised((image,), tmp_path, {n: raw(t) for n, t in tensors.items()})
    read = load_file(tmp_path / image.path)
    assert all(
        torch.equal(read[n].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8))
        for n, t in tensors.items()
    )
    header = read_header(tmp_path / image.path)
    assert header.metadata == {"format": "pt", "who": "ü"}
    assert (tmp_path / image.path).stat().st_size == image.bytes_
    widths = {"U8": 1, "F16": 2, "F32": 4, "I64": 8, "BF16": 2, "F8_E4M3": 1}
    assert all(r.offset % widths[r.dtype] == 0 for r in header.records)


def test_shards_and_index(tmp_path: Path) -> None:
    source = SafetensorsFolder(make_model(tmp_path / "model", "llama"))
    planned = {n: ("F32", f.shape) for n, f in source.tensors.items()}
    largest = max(source.read(n).numel() * 4 for n in planned)
    images = safetensors_images(planned, {}, max_shard_bytes=largest)
    weights = [i for i in images if i.path.endswith(".safetensors")]
    assert len(weights) > 2 and all(sum(s.bytes_ for s in i.slots) <= largest for i in weights)
    small = tuple(i for i in folder_images(source, planned, source.config, {}) if not i.slots)
    out = tmp_path / "sharded"
    out.mkdir()
    realised((*small, *images), out, {n: raw(source.read(n)) for n in planned})
    again = SafetensorsFolder(out)
    assert set(again.tensors) == set(source.tensors)
    assert all(torch.equal(again.read(n), source.read(n)) for n in source.tensors)
    assert again.carried == source.carried and dict(again.config) == dict(source.config)
    (out / weights[1].path).unlink()
    with pytest.raises(BadFile, match="missing"):
        SafetensorsFolder(out)


def test_shards_that_disagree(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:4]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[3:]}, folder / "b.safetensors")
    index = {"weight_map": {n: "a.safetensors" if i < 4 else "b.safetensors" for i, n in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadFile, match=r"is in a\.safetensors and in b\.safetensors"):
        SafetensorsFolder(folder)
    save_file({n: tensors[n] for n in names[4:]}, folder / "b.safetensors")
    assert set(SafetensorsFolder(folder).tensors) == set(names)
    index["weight_map"][names[0]] = "b.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadFile, match="which does not hold it"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", "a\\b"]
)
def test_an_index_cannot_lead_outside(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(BadFile):
        SafetensorsFolder(folder)


def test_links_stay_inside(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to(secret)
    with pytest.raises(BadFile, match="leads outside"):
        _ = SafetensorsFolder(folder).carried
    (folder / "generation_config.json").unlink()
    (folder / "model.safetensors").rename(tmp_path / "m.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "m.safetensors")
    with pytest.raises(BadFile, match="leads outside"):
        SafetensorsFolder(folder)


def test_the_hub_cache_is_a_folder_of_links(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    folder = make_model(repo / "snapshots" / "abc", "llama")
    (repo / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(repo / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert SafetensorsFolder(folder).carried


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LIES: dict[str, tuple[dict[str, Any] | bytes, bytes, str]] = {
    "hole": ({"a": {**F4, "data_offsets": [4, 8]}}, bytes(8), "starts at byte 4"),
    "overlap": ({"a": F4, "b": F4}, bytes(4), "starts at byte 0"),
    "trailing": ({"a": F4}, bytes(5), "belong to nothing"),
    "truncated": ({"a": {**F4, "shape": [9], "data_offsets": [0, 36]}}, bytes(4), "has"),
    "exabytes": ({"a": {**F4, "shape": [1 << 61], "data_offsets": [0, 1 << 61]}}, bytes(4), "needs"),
    "product": ({"a": {**F4, "shape": [1 << 61, 1 << 61]}}, bytes(4), "needs"),
    "negative": ({"a": {**F4, "shape": [-1]}}, bytes(4), "impossible shape"),
    "backwards": ({"a": {**F4, "data_offsets": [4, 0]}}, bytes(4), "offsets give -4"),
    "float size": ({"a": {**F4, "shape": [1.0]}}, bytes(4), "impossible shape"),
    "bool size": ({"a": {**F4, "shape": [True]}}, bytes(4), "impossible shape"),
    "dtype": ({"a": {**F4, "dtype": "F33"}}, bytes(4), "not known"),
    "dtype list": ({"a": {**F4, "dtype": ["F32"]}}, bytes(4), "not known"),
    "rank": ({"a": {**F4, "shape": [1] * 9}}, bytes(4), "impossible shape"),
    "entry": ({"a": 3}, b"", "is not made of"),
    "more fields": ({"a": {**F4, "code": "x"}}, bytes(4), "is not made of"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "not json": (b"{nope", b"", "JSON"),
    "not utf-8": (b'{"\xff":1}', b"", "UTF-8"),
    "array": (b"[]", b"", "does not start"),
    "twice": (
        b'{"a":' + json.dumps(F4).encode() + b',"a":' + json.dumps(F4).encode() + b"}",
        bytes(4),
        "twice",
    ),
    "deep": (b'{"a":' * 100_000, b"", "deeply|JSON"),
    "nan": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4), "impossible shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path: Path, lie: str) -> None:
    entries, data, said = LIES[lie]
    path = with_header(tmp_path / "x.safetensors", entries, data)
    with pytest.raises(BadFile, match=said) as caught:
        read_header(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x01", b"\xff" * 8, b"\xff" * 64, (10**9).to_bytes(8, "little") + b"{}"]
)
def test_a_length_is_not_believed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(BadFile):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("cut", [1, 100, 20_000])
def test_a_truncated_shard_is_named(tmp_path: Path, cut: int) -> None:
    folder = make_model(tmp_path, "llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(BadFile, match="ends at byte") as caught:
        SafetensorsFolder(folder)
    assert "model.safetensors" in str(caught.value) and "fetch it again" in str(caught.value)


def test_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no config\.json"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Refused, match="no .*safetensors"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(Refused, match="pickled"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(Refused, match="adapter"):
        SafetensorsFolder(tmp_path)


def test_buffers_are_left_out_and_bare_fp8_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "position_ids": torch.arange(4)}, folder / "model.safetensors")
    assert "position_ids" not in SafetensorsFolder(folder).tensors
    assert TensorFolder(folder).read("position_ids").tolist() == [0, 1, 2, 3]
    save_file({**tensors, "w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(BadFile, match="F8_E4M3"):
        SafetensorsFolder(folder)


def test_digest_changes_with_config_tokenizer_and_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama")
    before = SafetensorsFolder(folder).digest
    assert SafetensorsFolder(folder).digest == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    weights = SafetensorsFolder(folder).digest
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    changed = SafetensorsFolder(folder).digest
    (folder / "tokenizer_config.json").write_text("{}")
    assert len({before, weights, changed, SafetensorsFolder(folder).digest}) == 4
