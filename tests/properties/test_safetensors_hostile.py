"""Any bytes at all: a safetensors header is refused as a bad file, or read as the library reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from bitmill.checkpoint.hf_folder import parse_object
from bitmill.checkpoint.safetensors import read_header
from bitmill.core.errors import BadFile

GOOD = save(
    {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.uint8), "c": torch.zeros(0, 2)}
)
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def agrees(path: Path) -> None:
    """Our verdict is the library's wherever we accept."""
    try:
        header = read_header(path)
    except BadFile:
        return
    with safe_open(path, framework="pt") as file:
        assert sorted(r.name for r in header.records) == sorted(file.keys())
        for record in header.records:
            tensor = file.get_tensor(record.name)
            assert tuple(tensor.shape) == record.shape
            stored = path.read_bytes()[record.offset : record.offset + record.bytes_]
            assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == stored


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(GOOD)),
)
def test_mutated_files(tmp_path: Path, changes: list[tuple[int, int]], keep: int) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(data[:keep] if keep % 3 == 0 else data)
    agrees(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F8_E4M3", "I64", "F4", 3]) | JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2) | JSON,
    }
)


@QUICK
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY | JSON, max_size=3),
    st.binary(max_size=16),
)
def test_invented_headers(tmp_path: Path, entries: dict[str, Any], data: bytes) -> None:
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    agrees(path)


@given(st.binary(max_size=64))
def test_json_is_read_or_refused(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data, "here", "it"), dict)
    except BadFile as error:
        assert error.where == "here"


def test_a_number_beyond_reason() -> None:
    with pytest.raises(BadFile):
        parse_object(b'{"a":' + b"1" * 5000 + b"}", "here", "it")
