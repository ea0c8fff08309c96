"""Any bytes at all: a GGUF file is refused as bad, or is what it says; no crash, no huge allocation."""

from __future__ import annotations

import functools
import struct
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.gguf_write import Planned, encoded, head
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.checkpoint.tokenizer import tokenizer_from
from bitmill.core.errors import BadFile, Refused
from tests.test_gguf import write
from tests.tiny import make_model

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
MEMORY = 8 << 20

KEYS = {
    "general.name": encoded("naïve"),
    "numbers": encoded([1, -2, 3]),
    "words": encoded(["a", "", "ccc"]),
    "reals": encoded([0.5, 1.5]),
    "yes": encoded(True),
    "count": encoded(7),
}
TENSORS = [Planned("a", (2, 32), 2, 36), Planned("b", (5,), 0, 20), Planned("c", (3, 2), 1, 12)]
HEADER, OFFSETS, SIZE = head(KEYS, TENSORS)
GOOD = HEADER.ljust(SIZE, b"\x11")
LAST = OFFSETS["c"] + 12


def parse(data: bytes, folder: Path) -> GgufFile:
    path = folder / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        file = GgufFile(path)
        for name in file.tensors:
            assert file.raw(name).nbytes == file.tensors[name].bytes_
        return file
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY


def header(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int = 0,
    keys: int = 0,
    body: bytes = b"",
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def record(
    name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, rank: int | None = None
) -> bytes:
    dims = struct.pack(f"<{len(shape)}q", *shape)
    return (
        text(name)
        + struct.pack("<I", len(shape) if rank is None else rank)
        + dims
        + struct.pack("<IQ", kind, offset)
    )


def padded(data: bytes, more: int = 0) -> bytes:
    return data.ljust(-(-len(data) // 32) * 32, b"\0") + bytes(more)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


HUGE = (1 << 63) - 1
CASES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "magic": (header(magic=b"GGML"), "not a GGUF"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "big endian": (header(version=3 << 24), "big endian"),
    "tensors": (header(tensors=HUGE), "tensors"),
    "tensors modestly": (header(tensors=3, body=bytes(71)), "tensors"),
    "keys": (header(keys=HUGE), "keys"),
    "negative keys": (header(keys=(1 << 64) - 1), "keys"),
    "key length": (header(keys=1, body=struct.pack("<Q", HUGE) + bytes(32)), "claims to be"),
    "string length": (header(keys=1, body=key("k", 8, struct.pack("<Q", 1 << 25)) + bytes(9)), "ends inside"),
    "not utf-8": (header(keys=1, body=key("k", 8, text(b"\xff\xfe"))), "UTF-8"),
    "value type": (header(keys=1, body=key("k", 13, bytes(8))), "value type 13"),
    "array type": (header(keys=1, body=key("k", 9, array(77, 1, bytes(8)))), "type 77"),
    "array of arrays": (header(keys=1, body=key("k", 9, array(9, 1, bytes(16)))), "array of arrays"),
    "array length": (header(keys=1, body=key("k", 9, array(0, HUGE))), "elements"),
    "array of strings": (header(keys=1, body=key("k", 9, array(8, 1 << 40))), "elements"),
    "same key": (header(keys=2, body=key("k", 7, b"\1") * 2), "twice"),
    "no key": (header(keys=1, body=key("", 7, b"\1")), "empty"),
    "alignment 0": (header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 0))), "power of two"),
    "alignment 24": (header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 24))), "power of two"),
    "alignment kind": (header(keys=1, body=key("general.alignment", 10, struct.pack("<Q", 32))), "32-bit"),
    "rank": (header(tensors=1, body=record(rank=5) + bytes(64)), "5 dimensions"),
    "rank absurd": (header(tensors=1, body=record(rank=1 << 31) + bytes(64)), "dimensions"),
    "zero": (header(tensors=1, body=padded(record(shape=(0,)), 64)), "shape"),
    "negative": (header(tensors=1, body=padded(record(shape=(-32,)), 64)), "shape"),
    "product": (header(tensors=1, body=padded(record(shape=(1 << 32, 1 << 32)), 64)), "shape"),
    "bytes": (header(tensors=1, body=padded(record(shape=(1 << 40,)), 64)), "needs"),
    "block": (header(tensors=1, body=padded(record(shape=(33,), kind=2), 64)), "block of 32"),
    "type": (header(tensors=1, body=padded(record(kind=4), 256)), "type 4"),
    "type negative": (header(tensors=1, body=padded(record(kind=0xFFFFFFFF), 256)), "type"),
    "name": (header(tensors=1, body=padded(record(name="n" * 64), 256)), "claims to be 64"),
    "offset": (header(tensors=1, body=padded(record(offset=32), 256)), "before it end at 0"),
    "same name": (header(tensors=2, body=padded(record() + record(offset=128), 256)), "twice"),
    "overlap": (header(tensors=2, body=padded(record() + record("u", offset=0), 256)), "end at 128"),
    "hole": (header(tensors=2, body=padded(record() + record("u", offset=256), 512)), "end at 128"),
    "past the end": (header(tensors=1, body=padded(record(), 0)), "needs|ends at"),
    "trailing": (padded(header(tensors=1, body=record()), 128 + 32), "follow the last tensor"),
}


@pytest.mark.parametrize("case", CASES)
def test_handmade_lies_are_named(case: str, tmp_path: Path) -> None:
    data, reason = CASES[case]
    with pytest.raises(BadFile, match=reason) as caught:
        parse(data, tmp_path)
    assert "x.gguf" in str(caught.value.where)


def test_the_good_file_is_good(tmp_path: Path) -> None:
    file = parse(GOOD, tmp_path)
    assert file.metadata == {
        "general.name": "naïve",
        "numbers": [1, -2, 3],
        "words": ["a", "", "ccc"],
        "reals": [0.5, 1.5],
        "yes": True,
        "count": 7,
    }
    assert dict(file.raw_keys) == KEYS
    assert {n: t.shape for n, t in file.tensors.items()} == {"a": (2, 32), "b": (5,), "c": (3, 2)}


def test_every_truncation_is_bad(tmp_path: Path) -> None:
    for length in range(LAST):
        with pytest.raises(BadFile):
            parse(GOOD[:length], tmp_path)
    parse(GOOD[:LAST], tmp_path)  # what only pads the end may be missing


def test_flipped_bits_of_the_header_are_bad_or_harmless(tmp_path: Path) -> None:
    for bit in range(0, len(HEADER) * 8, 3):  # three bits of every byte, and other ones in the next
        data = bytearray(GOOD)
        data[bit // 8] ^= 1 << bit % 8
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        try:
            file = GgufFile(path)
        except BadFile:
            continue
        assert sum(t.bytes_ for t in file.tensors.values()) <= len(GOOD)


@QUICK
@given(st.binary(max_size=200))
def test_noise_after_the_magic_is_bad(noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(BadFile):
        parse(b"GGUF\x03\0\0\0" + noise.ljust(16, b"\1"), Path(folder))


@functools.cache
def whole_model() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = SafetensorsFolder(make_model(folder / "model", num_hidden_layers=1))
        write(source, folder / "out.gguf", "q4_0")
        return (folder / "out.gguf").read_bytes()


def _use(path: Path) -> None:
    """Everything that reads a file before weights are quantized."""
    model = GgufCheckpoint(path)
    for name in model.tensors:
        assert tuple(model.read(name).shape) == model.tensors[name].shape
        model.stored(name)
    if model.carried:
        tokenizer_from(model.carried, "x")("some text", add_special_tokens=True)


@QUICK
@given(st.data())
def test_a_damaged_model_is_refused_or_whole(data: st.DataObject) -> None:
    good = whole_model()
    header_bytes = good.rindex(b"output_norm.weight") + 50
    places = st.integers(0, header_bytes)
    damaged = bytearray(good)
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3)):
        damaged[at] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(damaged)
        try:
            _use(path)
        except (BadFile, Refused):
            return


@QUICK
@given(st.data())
def test_damaged_keys_of_a_model_are_refused_or_harmless(data: st.DataObject) -> None:
    """Numbers, types and names of keys: where a single byte does the most harm."""
    good = whole_model()
    names = [
        b"llama.block_count",
        b"head_count",
        b"dimension_count",
        b"embedding_length",
        b"token_type",
        b"merges",
    ]
    name = data.draw(st.sampled_from([*names, b"bos_token_id", b"ggml.tokens", b"ggml.pre", b"freq_base"]))
    start = good.index(name)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[start + data.draw(st.integers(0, len(name) + 24))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(damaged)
        try:
            _use(path)
        except (BadFile, Refused):
            return
