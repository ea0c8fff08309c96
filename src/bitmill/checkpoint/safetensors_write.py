"""Model folders to be written, known to the byte before any weight is: safetensors headers, shards and their index,
the configuration and the small files that travel along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

from bitmill.checkpoint.hf_folder import CONFIG, INDEX, SINGLE
from bitmill.checkpoint.safetensors import DTYPE_BYTES
from bitmill.core.axes import Checkpoint
from bitmill.core.types import FileImage, Slot

Planned = tuple[str, tuple[int, ...]]
"""Element type, as the header spells it, and shape of a tensor to be written."""

SHARD_BYTES = 5 * 10**9
_ALIGNMENT = 8


def bytes_of(planned: Planned) -> int:
    """Size of a tensor's data."""
    dtype, shape = planned
    return prod(shape) * DTYPE_BYTES[dtype]


def safetensors_images(
    tensors: Mapping[str, Planned], metadata: Mapping[str, str], max_shard_bytes: int = SHARD_BYTES
) -> tuple[FileImage, ...]:
    """The safetensors files that hold ``tensors``, in order; beyond one shard, their index as well.

    Inside a file the wider element types come first, so that every tensor starts at a multiple of its
    element's size and can be mapped.
    """
    shards: list[dict[str, Planned]] = [{}]
    filled = 0
    for name, planned in tensors.items():
        size = bytes_of(planned)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = planned
        filled += size
    if len(shards) == 1:
        return (_image(SINGLE, shards[0], metadata),)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    places = {name: path for path, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(bytes_of(planned) for planned in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    images = [_image(path, shard, metadata) for path, shard in zip(names, shards, strict=True)]
    return (*images, text_image(INDEX, json_bytes(index)))


def folder_images(
    source: Checkpoint,
    tensors: Mapping[str, Planned],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    more: Mapping[str, bytes] | None = None,
) -> tuple[FileImage, ...]:
    """A whole model folder: ``config.json``, what ``source`` carries, ``more`` small files, the weights."""
    texts = {CONFIG: json_bytes(dict(config)), **source.carried, **(more or {})}
    small = [text_image(path, data) for path, data in texts.items()]
    return (*small, *safetensors_images(tensors, metadata))


def text_image(path: str, data: bytes) -> FileImage:
    """A small file, complete."""
    return FileImage(path, data, (), len(data))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face lays it out."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _image(path: str, tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> FileImage:
    ordered = sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1][0]])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    places: list[Slot] = []
    at = 0
    for name, (dtype, shape) in ordered:
        size = bytes_of((dtype, shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places.append(Slot(name, at, size))
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    slots = tuple(Slot(s.name, len(head) + s.offset, s.bytes_) for s in places)
    return FileImage(path, head, slots, len(head) + at)
