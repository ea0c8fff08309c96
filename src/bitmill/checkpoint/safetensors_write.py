"""Model folders to be written, known to the byte before any weight is: safetensors headers, shards and their
index, the configuration and the small files that travel along."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.hf_folder import CONFIG, INDEX, SINGLE
from bitmill.checkpoint.safetensors import DTYPE_BYTES
from bitmill.core.axes import Checkpoint
from bitmill.core.types import FileImage, Row, Slot

Planned = tuple[str, tuple[int, ...]]
"""Element type, as the header spells it, and shape of a tensor to be written."""

DENSE_DTYPES: Mapping[str, str] = MappingProxyType({"f32": "F32", "f16": "F16", "bf16": "BF16"})
"""Spelling in a header of what a :class:`~bitmill.grids.dense.Dense` grid stores."""

SHARD_BYTES = 5 * 10**9
_ALIGNMENT = 8


_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def bytes_of(planned: Planned) -> int:
    """Size of a tensor's data."""
    dtype, shape = planned
    return prod(shape) * DTYPE_BYTES[dtype]


def safetensors_images(
    tensors: Mapping[str, Planned],
    metadata: Mapping[str, str],
    max_shard_bytes: int = SHARD_BYTES,
    stacks: Collection[str] = (),
) -> tuple[FileImage, ...]:
    """The safetensors files that hold ``tensors``, in order; beyond one shard, their index as well. Each of
    ``stacks`` has a slot for every entry of its first dimension: ``NAME[0]``, ``NAME[1]`` …

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
        return (_image(SINGLE, shards[0], metadata, stacks),)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    places = {name: path for path, shard in zip(names, shards, strict=True) for name in shard}
    total = sum(bytes_of(planned) for planned in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    images = [_image(path, shard, metadata, stacks) for path, shard in zip(names, shards, strict=True)]
    return (*images, text_image(INDEX, json_bytes(index)))


def folder_images(
    source: Checkpoint,
    tensors: Mapping[str, Planned],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    more: Mapping[str, bytes] | None = None,
    stacks: Collection[str] = (),
) -> tuple[FileImage, ...]:
    """A whole model folder: ``config.json``, what ``source`` carries, ``more`` small files, the weights, of
    which ``stacks`` are written an entry at a time."""
    texts = {CONFIG: json_bytes(dict(config)), **source.carried, **(more or {})}
    small = [text_image(path, data) for path, data in texts.items()]
    return (*small, *safetensors_images(tensors, metadata, stacks=stacks))


def quantized_folder(
    source: Checkpoint,
    rows: Sequence[Row],
    planned: Callable[[Row], Mapping[str, Planned]],
    settings: Mapping[str, Any],
    notes: Mapping[str, str],
    more: Mapping[str, bytes] | None = None,
) -> tuple[FileImage, ...]:
    """A model folder with ``settings``, if there are any, as the ``quantization_config``.

    Args:
        planned: stored tensors of a row.
        notes: provenance, for the header.
        more: further files, as :func:`folder_images` takes them.
    """
    config = model_config(source, rows)
    if settings:
        config["quantization_config"] = settings
    tensors = {name: part for row in rows for name, part in planned(row).items()}
    metadata = {f"bitmill.{key}": text for key, text in notes.items()}
    return folder_images(source, tensors, config, metadata, more)


def model_config(source: Checkpoint, rows: Iterable[Row]) -> dict[str, Any]:
    """The configuration of what is written: the source's, with the element type that most kept values have,
    and the head tied where none is stored; not how the source was quantized, no pointers to code."""
    gone = ("quantization_config", "auto_map", "torch_dtype", "dtype")
    config = {k: v for k, v in source.config.items() if k not in gone}
    kept: Counter[str] = Counter()
    names = set()
    for row in rows:
        names.add(row.name)
        if str(row.grid) in _TORCH_NAMES:
            kept[str(row.grid)] += prod(row.shape)
    config["dtype"] = _TORCH_NAMES[kept.most_common(1)[0][0]] if kept else "float32"
    if "model.embed_tokens.weight" in names:
        config["tie_word_embeddings"] = "lm_head.weight" not in names
    return config


def to_bytes(tensor: Tensor) -> bytes:
    """A tensor's data, row by row, little endian."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def exactly(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype``, without rounding.

    Raises:
        ValueError: a value is not one of ``dtype``; a container must never change what a solver decided.
    """
    narrow = values.to(dtype)
    if not torch.equal(narrow.to(values.dtype), values):
        raise ValueError(f"values are not {dtype} numbers: the grid was not adapted to the container")
    return narrow


def text_image(path: str, data: bytes) -> FileImage:
    """A small file, complete."""
    return FileImage(path, data, (), len(data))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """JSON as Hugging Face lays it out."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _image(
    path: str, tensors: Mapping[str, Planned], metadata: Mapping[str, str], stacks: Collection[str] = ()
) -> FileImage:
    ordered = sorted(tensors.items(), key=lambda item: -DTYPE_BYTES[item[1][0]])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    places: list[Slot] = []
    at = 0
    for name, (dtype, shape) in ordered:
        size = bytes_of((dtype, shape))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        if name in stacks:
            each = size // shape[0]
            places.extend(Slot(f"{name}[{i}]", at + i * each, each) for i in range(shape[0]))
        else:
            places.append(Slot(name, at, size))
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    slots = tuple(Slot(s.name, len(head) + s.offset, s.bytes_) for s in places)
    return FileImage(path, head, slots, len(head) + at)
