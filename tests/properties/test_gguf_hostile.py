"""Any bytes at all: a GGUF file is refused as bad, or is what it says; no crash, no huge allocation."""

from __future__ import annotations

import functools
import struct
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitmill.checkpoint.gguf import GgufFile
from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.gguf_write import Planned, encoded, head
from bitmill.checkpoint.safetensors import SafetensorsFolder
from bitmill.checkpoint.tokenizer import tokenizer_from
from bitmill.core.errors import BadFile, Refused
from tests.test_gguf import EXTRA, write
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


@contextmanager
def bounded(bytes_: int) -> Iterator[None]:
    """Whatever happens inside, it does not take more memory than this."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < bytes_


def parse(data: bytes, folder: Path) -> GgufFile:
    path = folder / "x.gguf"
    path.write_bytes(data)
    with bounded(MEMORY):
        file = GgufFile(path)
        for name in file.tensors:
            assert file.raw(name).nbytes == file.tensors[name].bytes_
        return file


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
    "negative tensors": (header(tensors=(1 << 64) - 1), "tensors"),
    "tensors modestly": (header(tensors=3, body=bytes(71)), "tensors"),
    "keys": (header(keys=HUGE), "keys"),
    "negative keys": (header(keys=(1 << 64) - 1), "keys"),
    "key length": (header(keys=1, body=struct.pack("<Q", HUGE) + bytes(32)), "claims to be"),
    "string length": (header(keys=1, body=key("k", 8, struct.pack("<Q", 1 << 25)) + bytes(9)), "ends inside"),
    "string length wraps": (
        header(keys=1, body=key("k", 8, struct.pack("<Q", (1 << 64) - 1))),
        "claims to be",
    ),
    "not utf-8": (header(keys=1, body=key("k", 8, text(b"\xff\xfe"))), "UTF-8"),
    "value type": (header(keys=1, body=key("k", 13, bytes(8))), "value type 13"),
    "value type negative": (header(keys=1, body=key("k", 0xFFFFFFFF, bytes(8))), "value type 4294967295"),
    "array type negative": (header(keys=1, body=key("k", 9, array(0xFFFFFFFF, 1, bytes(8)))), "elements of"),
    "array length wraps": (header(keys=1, body=key("k", 9, array(12, 1 << 61, bytes(64)))), "elements"),
    "array type": (header(keys=1, body=key("k", 9, array(77, 1, bytes(8)))), "type 77"),
    "array of arrays": (header(keys=1, body=key("k", 9, array(9, 1, bytes(16)))), "array of arrays"),
    "array length": (header(keys=1, body=key("k", 9, array(0, HUGE))), "elements"),
    "array of strings": (header(keys=1, body=key("k", 9, array(8, 1 << 40))), "elements"),
    "same key": (header(keys=2, body=key("k", 7, b"\1") * 2), "twice"),
    "no key": (header(keys=1, body=key("", 7, b"\1")), "empty"),
    "alignment 0": (header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 0))), "power of two"),
    "alignment 24": (header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 24))), "power of two"),
    "alignment 4": (header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 4))), "power of two"),
    "alignment 2 GiB": (
        header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 1 << 31))),
        "65536",
    ),
    "alignment twice": (
        header(keys=2, body=key("general.alignment", 4, struct.pack("<I", 32)) * 2),
        "twice",
    ),
    "alignment kind": (header(keys=1, body=key("general.alignment", 10, struct.pack("<Q", 32))), "32-bit"),
    "rank": (header(tensors=1, body=record(rank=5) + bytes(64)), "5 dimensions"),
    "rank absurd": (header(tensors=1, body=record(rank=1 << 31) + bytes(64)), "dimensions"),
    "zero": (header(tensors=1, body=padded(record(shape=(0,)), 64)), "shape"),
    "negative": (header(tensors=1, body=padded(record(shape=(-32,)), 64)), "shape"),
    "product": (header(tensors=1, body=padded(record(shape=(1 << 32, 1 << 32)), 64)), "shape"),
    "product wraps to 0": (header(tensors=1, body=padded(record(shape=(1 << 31,) * 3), 64)), "shape"),
    "negative twice": (header(tensors=1, body=padded(record(shape=(-32, -1)), 128)), "shape"),
    "padding wraps": (header(tensors=1, body=padded(record(shape=(HUGE,), kind=24), 64)), "needs"),
    "bytes wrap": (header(tensors=1, body=padded(record(shape=(1 << 62,), kind=28), 64)), "needs"),
    "block of rank 0": (header(tensors=1, body=padded(record(shape=(), kind=2), 64)), "block of 32"),
    "bytes": (header(tensors=1, body=padded(record(shape=(1 << 40,)), 64)), "needs"),
    "block": (header(tensors=1, body=padded(record(shape=(33,), kind=2), 64)), "block of 32"),
    "type": (header(tensors=1, body=padded(record(kind=4), 256)), "type 4"),
    "type negative": (header(tensors=1, body=padded(record(kind=0xFFFFFFFF), 256)), "type"),
    "name": (header(tensors=1, body=padded(record(name="n" * 64), 256)), "claims to be 64"),
    "offset": (header(tensors=1, body=padded(record(offset=32), 256)), "before it end at 0"),
    "same name": (header(tensors=2, body=padded(record() + record(offset=128), 256)), "twice"),
    "name not utf-8": (header(tensors=1, body=text(b"\xff") + record()[9:] + bytes(256)), "UTF-8"),
    "no name": (header(tensors=1, body=padded(record(name=""), 256)), "no name"),
    "unaligned": (header(tensors=2, body=padded(record() + record("u", offset=132), 512)), "end at 128"),
    "aligned otherwise": (
        header(
            tensors=2,
            keys=1,
            body=key("general.alignment", 4, struct.pack("<I", 64))
            + record(shape=(40,))
            + record("u", offset=160)
            + bytes(512),
        ),
        "end at 192",
    ),
    "offset wraps": (
        header(tensors=2, body=padded(record() + record("u", offset=(1 << 64) - 128), 512)),
        "end at 128",
    ),
    "all together too large": (
        header(
            tensors=4,
            body=padded(b"".join(record(f"t{k}", shape=(64,), offset=256 * k) for k in range(4)), 512),
        ),
        "the data of 't2' ends at",
    ),
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


def test_arrays_together_have_a_limit(tmp_path: Path) -> None:
    """Each of them is really there, and all of them are more than any model has."""
    path, count = tmp_path / "x.gguf", (1 << 22) + 1
    with path.open("wb") as file:
        file.write(header(keys=3))
        for name in ("a", "b", "c"):
            file.write(text(name) + struct.pack("<I", 9) + array(0, count))
            file.seek(count, 1)
        file.truncate()
    with pytest.raises(BadFile, match="absurd"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("m-00003-of-00002.gguf", "part 3 of 2"),
        ("m-00000-of-00002.gguf", "part 0 of 2"),
        ("m-00001-of-00000.gguf", "part 1 of 0"),
        ("m-00001-of-99999.gguf", "99998 of the 99999"),
        ("m-00001-of-00002.gguf", "1 of the 2"),
    ],
)
def test_names_of_parts_that_lie(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(BadFile, match=reason):
        GgufFile(tmp_path / name)


@pytest.mark.parametrize("value", [0, 1, 1 << 16, (1 << 64) - 1, -1, 2.0, "2", True, [2]], ids=str)
def test_parts_that_say_something_else(value: Any, tmp_path: Path) -> None:
    """``split.count`` of any type and size, in one file of two and in one that is alone."""
    kinds = {int: ("q" if value == -1 else "Q", 11 if value == -1 else 10), float: ("d", 12)}
    letter, kind = kinds.get(type(value), ("", 0))
    raw = struct.pack("<I" + letter, kind, value) if letter else encoded(value)
    for at in (1, 2):
        data = head({"split.no": encoded(at - 1), "split.count": raw}, [Planned(f"t{at}", (8,), 0, 32)])
        (tmp_path / f"m-0000{at}-of-00002.gguf").write_bytes(data[0].ljust(data[2], b"\0"))
    with pytest.raises(BadFile, match="says it is number") if value != 2 else nullcontext():
        GgufFile(tmp_path / "m-00002-of-00002.gguf")


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


HOSTILE: dict[str, bytes | None] = {
    "absent": None,
    "0": struct.pack("<II", 4, 0),
    "u32": struct.pack("<II", 4, (1 << 32) - 1),
    "u64": struct.pack("<IQ", 10, (1 << 64) - 1),
    "negative": struct.pack("<Ii", 5, -1),
    "0.0": encoded(0.0),
    "nan": encoded(float("nan")),
    "infinite": encoded(float("inf")),
    "text": encoded("x"),
    "empty": encoded([]),
    "numbers": encoded([1 << 30, -1, 0]),
    "texts": encoded(["a", "b"]),
}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_key_of_a_model_may_be_anything(family: str, tmp_path: Path) -> None:
    """Numbers that divide, count layers or index the vocabulary; absent, absurd, or of another type."""
    path = tmp_path / "x.gguf"
    shape = {"num_hidden_layers": 1, **EXTRA.get(family, {})}
    write(SafetensorsFolder(make_model(tmp_path / "model", family, **shape)), path, "f16")
    good, refused = GgufFile(path), set()
    tensors = [Planned(n, t.shape, int(t.type), t.bytes_) for n, t in good.tensors.items()]
    data = path.read_bytes()[min(t.offset for t in good.tensors.values()) :]
    names = [k for k in good.raw_keys if family == "llama" or k.startswith(family)]
    for name in names:
        for kind, value in HOSTILE.items():
            keys = {**good.raw_keys, name: value or b""}
            if value is None:
                del keys[name]
            path.write_bytes(head(keys, tensors)[0] + data)
            try:
                with bounded(16 << 20):
                    model = GgufCheckpoint(path)
                    if name.startswith("tokenizer") and model.carried:
                        tokenizer_from(model.carried, "x")("some text", add_special_tokens=True)
            except (BadFile, Refused):
                refused.add((name, kind))
    for name in (f"{family}.block_count", f"{family}.embedding_length", f"{family}.attention.head_count"):
        assert {kind for n, kind in refused if n == name} >= HOSTILE.keys() - {"texts"}, name
    if family == "llama":
        ids = {kind for name, kind in refused if name == "tokenizer.ggml.bos_token_id"}
        assert {"u32", "u64", "negative"} <= ids


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
            with bounded(MEMORY + 16 * len(good)):
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
