"""A model as its headers describe it, on disk or only planned: names, element types, shapes and settings.

A loader decides by these alone whether it takes a file; no weight is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from bitmill.checkpoint.gguf import GgufFile, GgufTensor, planned_file
from bitmill.checkpoint.hf_folder import CONFIG, inside, parse_object, read_config, read_object
from bitmill.checkpoint.safetensors import Record, TensorFolder, parse_header
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import FileImage

BESIDE = "hf_quant_config.json"
"""Where older exports of ModelOpt describe themselves."""

_SMALL = 1 << 16  # numbers of a stored scale that is worth comparing


@dataclass(frozen=True)
class Part:
    """One stored tensor: its element type (a ggml type in a GGUF file) and dimensions, outermost first."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stored:
    """A model as a loader meets it.

    Attributes:
        where: the file or folder.
        gguf: whether it is a GGUF file; else a folder.
        config: ``config.json``, or the keys of the GGUF file.
        method: who says how to read it: a ``quant_method``, ``gguf``, ``mlx``, or ``dense``.
        settings: what is said: the ``quantization_config``.
        parts: every stored tensor by name.
        files: names of the files with weights.
        bytes_: size of these together.
        numbers: reads a small stored tensor; None where nothing is on disk yet.
    """

    where: str
    gguf: bool
    config: Mapping[str, Any]
    method: str
    settings: Mapping[str, Any]
    parts: Mapping[str, Part]
    files: tuple[str, ...]
    bytes_: int
    numbers: Callable[[str], Tensor] | None = None

    def small(self, name: str) -> Tensor | None:
        """A stored tensor of few numbers; None where there is none such, or nothing on disk."""
        part = self.parts.get(name)
        if part is None or self.numbers is None or prod(part.shape) > _SMALL:
            return None
        return self.numbers(name)


def model_file(path: Path) -> Path:
    """The file or folder to look at: the one GGUF file of a folder that has nothing else, else ``path``."""
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return path
    found = sorted(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else path


def stored(path: Path) -> Stored:
    """What the headers of a file or folder say; every one is verified as all reading here verifies it.

    Raises:
        Refused: there are no weights that can be looked at.
        BadFile: something does not add up.
    """
    if path.is_file() and path.suffix == ".safetensors":
        raise Refused(
            "one file of weights is not a model", where=str(path), fix=f"give its folder: {path.parent}"
        )
    if path.is_file() or (any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
        return _gguf_file(path)
    config = read_config(path)
    beside = read_object(inside(path, BESIDE)) if (path / BESIDE).is_file() else {}
    method, settings = _method(config, beside, str(path))
    folder = TensorFolder(path)
    files = tuple(dict.fromkeys(r.path for r in folder.records.values()))
    names, bytes_ = tuple(file.name for file in files), sum(file.stat().st_size for file in files)
    return Stored(
        str(path), False, config, method, settings, _parts(folder.records), names, bytes_, folder.read
    )


def _gguf_file(path: Path) -> Stored:
    file = GgufFile(path)
    return _gguf(str(path), file.metadata, file.tensors, (file.path.name,), file.bytes_)


def planned(files: Sequence[FileImage], where: str = "the planned output") -> Stored:
    """The same of an output that is planned: its headers are known to the byte before any weight is read.

    Raises:
        BadFile: settings that mean nothing.
    """
    texts = {image.path: image.head for image in files if not image.slots}
    if CONFIG not in texts:
        found = [planned_file(image.head, image.bytes_) for image in files if image.head[:4] == b"GGUF"]
        tensors = {name: tensor for _, some in found for name, tensor in some.items()}
        names = tuple(image.path or where for image in files)
        return _gguf(where, found[0][0], tensors, names, sum(image.bytes_ for image in files))
    config = parse_object(texts[CONFIG], where, CONFIG)
    method, settings = _method(config, {}, where)
    records: dict[str, Record] = {}
    weights = tuple(image.path for image in files if image.path.endswith(".safetensors"))
    for image in files:
        if image.path in weights:
            header = parse_header(image.head, image.bytes_, Path(image.path))
            records |= {record.name: record for record in header.records}
    bytes_ = sum(image.bytes_ for image in files if image.path in weights)
    return Stored(where, False, config, method, settings, _parts(records), weights, bytes_)


def _gguf(
    where: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    files: tuple[str, ...],
    bytes_: int,
) -> Stored:
    parts = {t.name: Part(t.name, t.type.name.lower(), t.shape) for t in tensors.values()}
    return Stored(where, True, keys, "gguf", MappingProxyType({}), parts, files, bytes_)


def _parts(records: Mapping[str, Record]) -> Mapping[str, Part]:
    return MappingProxyType({r.name: Part(r.name, r.dtype, r.shape) for r in records.values()})


def _method(
    config: Mapping[str, Any], beside: Mapping[str, Any], where: str
) -> tuple[str, Mapping[str, Any]]:
    """Who says how the weights are stored, and what is said."""
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    asked = config.get("quantization_config", inner)
    if isinstance(asked, dict) and isinstance(asked.get("quant_method"), str):
        return asked["quant_method"].lower().replace("intel/", ""), asked
    mlx = config.get("quantization", asked)
    if isinstance(mlx, dict) and "group_size" in mlx:
        return "mlx", mlx
    if isinstance(beside.get("quantization"), dict):
        return "modelopt", beside["quantization"]
    if asked is not None:
        raise BadFile("quantization_config does not say quant_method", where=f"{where}: {CONFIG}")
    return "dense", {}
