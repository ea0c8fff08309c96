"""A short seeded run of the damaged headers of benchmarks/fuzz.py: refused, or read; nothing else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.mutate import damaged_gguf, damaged_safetensors, gguf_seeds, safetensors_seeds
from bitmill.checkpoint import gguf, safetensors
from bitmill.core.errors import BadFile
from tests.properties.test_gguf_hostile import bounded

COUNT = 6000
PLACE = Path("damaged")

Damaged = Callable[[random.Random], Iterator[bytes]]


def read_gguf(data: bytes) -> None:
    """As any GGUF file is read."""
    gguf.parse_header(data, PLACE)


def read_safetensors(data: bytes) -> None:
    """As any safetensors file is read."""
    safetensors.parse_header(data, len(data), PLACE)


SIDES = [
    pytest.param(read_gguf, damaged_gguf, gguf_seeds, id="gguf"),
    pytest.param(read_safetensors, damaged_safetensors, safetensors_seeds, id="safetensors"),
]


@pytest.mark.parametrize(("read", "damaged", "seeds"), SIDES)
def test_what_is_damaged_is_refused_or_read(
    read: Callable[[bytes], None], damaged: Damaged, seeds: Callable[[], list[bytes]]
) -> None:
    for seed in seeds():
        read(seed)
    refused = 0
    for data in itertools.islice(damaged(random.Random(7)), COUNT):
        try:
            read(data)
        except BadFile:
            refused += 1
    assert COUNT // 2 < refused < COUNT


@pytest.mark.parametrize(("read", "damaged", "seeds"), SIDES)
def test_none_takes_much_memory(
    read: Callable[[bytes], None], damaged: Damaged, seeds: Callable[[], list[bytes]]
) -> None:
    for data in itertools.islice(damaged(random.Random(8)), 300):
        with bounded(1 << 20):
            try:
                read(data)
            except BadFile:
                continue
