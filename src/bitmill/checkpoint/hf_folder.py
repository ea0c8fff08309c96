"""A Hugging Face model folder as files: which may be read, the configuration, what travels with the model.

A folder may come from anybody: JSON is capped and parsed strictly, and no name in it, nor a link it holds,
may lead outside of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitmill.core.errors import BadFile, Refused

CONFIG = "config.json"
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)
"""Small files that travel with a model; nothing else of the folder is copied."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that are pickled by habit: loading one can run any code it contains."""

_MOST_JSON = 64 << 20
_MOST_CARRIED = 256 << 20


def parse_object(text: bytes, where: str, what: str) -> dict[str, Any]:
    """A JSON object in which no key appears twice.

    Raises:
        BadFile: anything else, nesting too deep for a parser included.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise BadFile(f"{what} is nested too deeply", where=where) from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{what} is not UTF-8 text", where=where) from error
    except ValueError as error:
        raise BadFile(f"{what} is not valid JSON: {error}", where=where) from error
    if not isinstance(value, dict):
        raise BadFile(f"{what} is not a JSON object", where=where)
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB.

    Raises:
        BadFile: too large, unreadable, or not a JSON object.
    """
    return parse_object(_read(path, _MOST_JSON), str(path), path.name)


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, once it is certain that it is in there.

    Links may lead elsewhere in the folder, and from a snapshot of the Hugging Face cache to its blobs.

    Raises:
        BadFile: the name or a link leads outside.
    """
    if not name or name.startswith(".") or any(c in name for c in "/\\:\0"):
        raise BadFile(f"{name!r} is not the name of a file in this folder", where=str(folder))
    path = folder / name
    real, root = path.resolve(), folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise BadFile(
            f"{name!r} is a link that leads outside the folder",
            where=str(path),
            fix="copy the file itself into the folder",
        )
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        Refused: there is none.
        BadFile: it is not what it claims to be.
    """
    path = inside(folder, CONFIG)
    if not path.is_file():
        raise Refused(
            "the folder has no config.json",
            where=str(folder),
            fix="give the folder that holds config.json and the *.safetensors files of one model",
        )
    return read_object(path)


def read_carried(folder: Path) -> dict[str, bytes]:
    """The small files that travel with the model, by name."""
    return {
        name: _read(inside(folder, name), _MOST_CARRIED)
        for name in CARRIED
        if (folder / name).is_file() or (folder / name).is_symlink()
    }


def weight_files(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str]]:
    """The safetensors files of a folder and, when there is an index, the file it gives for each tensor.

    Raises:
        Refused: there are only pickled weights, an adapter, or nothing.
        BadFile: the index leads outside, or a shard is missing.
    """
    if (folder / SINGLE).exists():
        return (inside(folder, SINGLE),), {}
    if (folder / INDEX).exists():
        return _indexed(folder)
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if (folder / "adapter_config.json").exists():
        raise Refused(
            "the folder holds an adapter, not a model",
            where=str(folder),
            fix="merge it first: bitmill merge MODEL ADAPTER -o OUT",
        )
    if len(found) == 1:
        return (inside(folder, found[0]),), {}
    if found:
        raise BadFile(
            f"{len(found)} safetensors files and no {INDEX}",
            where=str(folder),
            fix="fetch the index file too",
        )
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLED)
    if pickled:
        raise Refused(
            f"the weights are pickled ({pickled[0]}): loading them can run any code they contain",
            where=str(folder),
            fix="where you trust the file, save it once as safetensors: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    raise Refused("the folder has no *.safetensors file", where=str(folder))


def _indexed(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str]]:
    path = inside(folder, INDEX)
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise BadFile("the index has no weight_map from names to files", where=str(path))
    shards = []
    for name in sorted(set(places.values())):
        if not name.endswith(".safetensors"):
            raise BadFile(f"the index names {name!r}, which is not a safetensors file", where=str(path))
        shard = inside(folder, name)
        if not shard.is_file():
            raise BadFile(f"shard {name!r} is missing", where=str(folder), fix="fetch the missing file")
        shards.append(shard)
    return tuple(shards), places


def _read(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most:
            raise BadFile(f"{path.name} has {size:,} bytes; at most {most:,} make sense", where=str(path))
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"cannot read the file: {error.strerror}", where=str(path)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice")
            seen.add(key)
    return found
