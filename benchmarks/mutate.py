"""Headers of GGUF and safetensors, damaged in ways that have broken readers: seeded, endless, small."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from bitmill.checkpoint.gguf_write import Planned, encoded, head

EDGES = (
    0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, 1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1,
)  # fmt: skip
"""Numbers at which sizes, counts and types turn over."""
NUMBERS: tuple[Any, ...] = (
    *EDGES, -1, -(1 << 63), 1e308, 0.5, float("nan"), True, None, "4", [], {}, [[]], [0, 0], 10**40,
)  # fmt: skip


def gguf_seeds() -> list[bytes]:
    """Small whole files: without tensors, with one of each shape and type, with keys of every kind."""
    keys: dict[str, bytes] = {
        "general.architecture": encoded("llama"),
        "general.alignment": struct.pack("<II", 4, 32),
        "llama.block_count": encoded(2),
        "llama.rope.freq_base": encoded(10000.0),
        "tokenizer.ggml.tokens": encoded(["<s>", "</s>", "a", "b"]),
        "tokenizer.ggml.scores": encoded([0.0, -1.0, -2.0, -3.0]),
        "tokenizer.ggml.token_type": encoded([3, 3, 1, 1]),
        "general.quantized": encoded(True),
    }
    tensors = [
        Planned("token_embd.weight", (4, 32), 2, 72),
        Planned("blk.0.attn_norm.weight", (5,), 0, 20),
        Planned("blk.0.ffn_down.weight", (1, 256), 12, 144),
        Planned("x", (3, 2), 1, 12),
    ]
    found = []
    for some_keys in ({}, dict(list(keys.items())[:3]), keys):
        for some in ((), tensors[:1], tensors):
            data, _, size = head(some_keys, some)
            found.append(data.ljust(size, b"\x11"))
    return found


def safetensors_seeds() -> list[bytes]:
    """Small whole files: empty, of one tensor, of several types, with metadata."""
    cases: list[dict[str, Any]] = [
        {},
        {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
            "b.weight": {"dtype": "U8", "shape": [2, 2], "data_offsets": [8, 12]},
            "c": {"dtype": "F8_E4M3", "shape": [0, 7], "data_offsets": [12, 12]},
            "d": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
        },
    ]
    return [_joined(json.dumps(case).encode(), data) for case, data in zip(cases, (0, 24, 20), strict=True)]


def damaged_gguf(random_: random.Random) -> Iterator[bytes]:
    """One damaged file after another, for ever."""
    seeds = gguf_seeds()
    while True:
        yield _damaged(bytearray(random_.choice(seeds)), random_)


def damaged_safetensors(random_: random.Random) -> Iterator[bytes]:
    """One damaged file after another, for ever; every second keeps its JSON well-formed."""
    seeds = safetensors_seeds()
    while True:
        seed = random_.choice(seeds)
        if random_.random() < 0.5:
            yield _damaged(bytearray(seed), random_)
            continue
        length = int.from_bytes(seed[:8], "little")
        entries = json.loads(seed[8 : 8 + length])
        for _ in range(random_.randint(1, 3)):
            _disturb(entries, random_)
        yield _joined(json.dumps(entries).encode(), random_.choice((0, 20, 24, 24, 24)))


def _joined(text: bytes, data: int) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


def _damaged(data: bytearray, random_: random.Random) -> bytes:
    """One to four changes: bytes, whole numbers of any width, pieces cut, doubled, moved or made up."""
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data) + 1)
        kind = random_.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = random_.randrange(256)
        elif kind <= 4:
            width = random_.choice((1, 2, 4, 8))
            value = random_.choice(EDGES) + random_.choice((-1, 0, 0, 1))
            data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 5:
            del data[at : at + random_.choice((1, 4, 8, len(data)))]
        elif kind == 6:
            piece = data[at : at + random_.randint(1, 64)]
            to = random_.randrange(len(data) + 1)
            data[to:to] = piece
        else:
            data[at:at] = random_.randbytes(random_.randint(1, 16))
        if not data:
            break
    return bytes(data)


def _disturb(entries: dict[str, Any], random_: random.Random) -> None:
    """Change one thing of a header's JSON."""
    names = list(entries)
    kind = random_.randrange(6)
    if not names or kind == 0:
        entries[random_.choice(("", "a", "__metadata__", "x" * 200, "\0", "é"))] = _value(random_, NUMBERS)
        return
    entry = entries[random_.choice(names)]
    if kind == 1:
        del entries[random_.choice(names)]
    elif isinstance(entry, dict) and entry and kind < 5:
        key = random_.choice(list(entry))
        value = entry[key]
        if isinstance(value, list) and value and random_.random() < 0.8:
            value[random_.randrange(len(value))] = _value(random_, NUMBERS)
        else:
            entry[key] = _value(random_, (*NUMBERS, "F32", "F4", "BF16", [1 << 62] * 8, [0] * 2000))
    elif isinstance(entry, dict):
        entry[random_.choice(("dtype", "shape", "data_offsets", "more"))] = _value(random_, NUMBERS)


def _value(random_: random.Random, values: Sequence[Any]) -> Any:
    """One of them, as a copy: a list that a later change goes into must not be everybody's."""
    return copy.deepcopy(random_.choice(values))
