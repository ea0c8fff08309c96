"""Bytes of the tensors themselves, each as it is stored: of a GGUF file, of a folder, of a plan's output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.checkpoint.gguf import GgufTensor, padded
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.core.types import FileImage

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_BLOCK = re.compile(r"blk\.(\d+)\.")
_ANY_BLOCK = re.compile(r"(?:^|\.)(?:blk|layers|h|blocks)\.(\d+)\.")
_ROUTED = re.compile(r"_exps\.|\.experts\.")
_HEADS = ("lm_head.", "output.", "language_model.lm_head.")
_TIED = ("lm_head.weight", ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"))


@dataclass(frozen=True)
class Weights:
    """What the weights of a model take once they are loaded.

    Attributes:
        bytes_: all of them, a head that is tied to the embedding once.
        stays_bytes: the part that llama.cpp leaves in main memory when all else is on a card; nothing where
            the embedding is the head, too.
        head_bytes: what the logits are made with: the head, or the embedding that is one.
        blocks: bytes of each block.
        routed: of these, the bytes of experts among which each token is sent to some.
    """

    bytes_: int
    stays_bytes: int = 0
    head_bytes: int = 0
    blocks: tuple[int, ...] = ()
    routed: tuple[int, ...] = ()


def gguf_weights(tensors: Iterable[GgufTensor], metadata: Mapping[str, Any]) -> Weights:
    """Of a GGUF file, each tensor padded as llama.cpp pads it; blocks that only predict further left out."""
    arch = metadata.get("general.architecture")
    run = metadata.get(f"{arch}.block_count", 0) - metadata.get(f"{arch}.nextn_predict_layers", 0)
    loaded = {t.name: padded(t.bytes_) for t in tensors if _block(t.name) < run or not run}
    stays = loaded.get(_EMBEDDING, 0) if _HEAD in loaded else 0
    return Weights(sum(loaded.values()), stays, *parted(loaded))


def parted(sizes: Mapping[str, int]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Bytes of the head, of each block, and of the experts in each block, from bytes by tensor name."""
    blocks: dict[int, int] = {}
    routed: dict[int, int] = {}
    head = embedding = 0
    for name, bytes_ in sizes.items():
        found = _ANY_BLOCK.search(name)
        if found is not None:
            at = int(found[1])
            blocks[at] = blocks.get(at, 0) + bytes_
            routed[at] = routed.get(at, 0) + bytes_ * (_ROUTED.search(name) is not None)
        elif name.startswith(_HEADS):
            head += bytes_
        elif name == _EMBEDDING or "embed_tokens" in name:
            embedding += bytes_
    order = sorted(blocks)
    return head or embedding, tuple(blocks[i] for i in order), tuple(routed[i] for i in order)


def _block(name: str) -> int:
    found = _BLOCK.match(name)
    return -1 if found is None else int(found[1])


def folder_weights(path: Path, tied: bool) -> Weights:
    """Of a folder's safetensors files, as stored; a head beside the embedding that it is tied to is left out.

    Raises:
        BadFile: a file is not what it claims to be.
        Refused: there are none.
    """
    records = TensorFolder(path).records
    sizes = {name: record.bytes_ for name, record in records.items()}
    if tied and any(name in sizes for name in _TIED[1]):
        sizes.pop(_TIED[0], None)
    return Weights(sum(sizes.values()), 0, *parted(sizes))


def image_weights(images: Iterable[FileImage]) -> Weights:
    """Of the files that a plan would write, other than GGUF."""
    sizes: dict[str, int] = {}
    for image in images:
        for slot in image.slots:
            sizes[slot.name] = sizes.get(slot.name, 0) + slot.bytes_
    return Weights(sum(sizes.values()), 0, *parted(sizes))
