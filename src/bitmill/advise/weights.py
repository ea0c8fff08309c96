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
_BLOCK = re.compile(r"blk\.(\d+)\.")
_TIED = ("lm_head.weight", ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"))


@dataclass(frozen=True)
class Weights:
    """What the weights of a model take once they are loaded.

    Attributes:
        bytes_: all of them, a head that is tied to the embedding once.
        stays_bytes: the part that llama.cpp leaves in main memory when all else is on a card; nothing where
            the embedding is the head, too.
    """

    bytes_: int
    stays_bytes: int = 0


def gguf_weights(tensors: Iterable[GgufTensor], metadata: Mapping[str, Any]) -> Weights:
    """Of a GGUF file, each tensor padded as llama.cpp pads it; blocks that only predict further left out."""
    arch = metadata.get("general.architecture")
    run = metadata.get(f"{arch}.block_count", 0) - metadata.get(f"{arch}.nextn_predict_layers", 0)
    loaded = {t.name: padded(t.bytes_) for t in tensors if _block(t.name) < run or not run}
    stays = loaded.get(_EMBEDDING, 0) if "output.weight" in loaded else 0
    return Weights(sum(loaded.values()), stays)


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
    total = sum(record.bytes_ for record in records.values())
    head = records.get(_TIED[0])
    if tied and head is not None and any(name in records for name in _TIED[1]):
        total -= head.bytes_
    return Weights(total)


def image_weights(images: Iterable[FileImage]) -> Weights:
    """Of the files that a plan would write, other than GGUF."""
    return Weights(sum(slot.bytes_ for image in images for slot in image.slots))
