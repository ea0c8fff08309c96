"""A model by its configuration alone: every tensor's name and shape, and what a recipe would make of them.

No weight is read or needed: transformers builds the empty model, and the plan's own rules place every
tensor. So a model can be judged before it is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bitmill.advise.weights import Weights, parted
from bitmill.calibrate.skeleton import empty_model
from bitmill.checkpoint.hf_folder import parse_object, read_config
from bitmill.checkpoint.hub import fetch_config, is_hub_id
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.types import Quantized, Row, TensorFacts
from bitmill.families.base import Family, describe
from bitmill.planning import placed
from bitmill.recipe import Recipe
from bitmill.source import EMBEDDED, locate, open_path

_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_STACKED = 3
_MATRIX = 2
_WIDTH = {"f32": 32, "f16": 16, "bf16": 16}
_MOST_CONFIG = 16 << 20


class Bare(Checkpoint):
    """A checkpoint of which only shapes are known; one expert of a block stands for all of them.

    Attributes:
        copies: by tensor name, how many of it there are.
    """

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        inner = config.get("text_config")
        self._config = dict(inner if isinstance(inner, dict) else config)
        self.path = path
        self.copies: dict[str, int] = {}
        facts: dict[str, TensorFacts] = {}
        family, dtype = describe(self._config), _dtype(self._config)
        for name, shape in _parameters(self._config):
            for part, part_shape, copies in _single(name, shape, family):
                facts[part] = TensorFacts(part, part_shape, dtype)
                self.copies[part] = copies
        self._facts = MappingProxyType(facts)

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        return self._facts

    def read(self, name: str) -> Tensor:
        raise Refused(f"{name} has a shape here and no values", where=str(self.path))

    def stored(self, name: str) -> Quantized | None:
        return None

    @property
    def carried(self) -> Mapping[str, bytes]:
        return {}

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._config, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """Weights, all experts counted."""
        return sum(math.prod(fact.shape) * self.copies[name] for name, fact in self._facts.items())


def _parameters(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    model = empty_model(config, torch.device("cpu"))
    return [(name, tuple(value.shape)) for name, value in model.named_parameters()]


def _dtype(config: Mapping[str, Any]) -> str:
    """What the model is published in; 16 bits where nothing is said."""
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"float32": "f32", "float16": "f16"}.get(said, "bf16")


def _single(name: str, shape: tuple[int, ...], family: Family) -> list[tuple[str, tuple[int, ...], int]]:
    """A parameter of transformers' model by names of checkpoints: of a stack, one expert's parts."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return [(name, shape, 1)]
    stem, path = found[1], found[2]
    parts = family.joined.get(path)
    if parts is None and len(shape) == _STACKED and ".experts." in path:
        inside, _, leaf = path.removesuffix(".weight").rpartition(".")
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        parts = tuple(f"{inside}.{{}}.{leaf}" for leaf in leaves)
    if parts is None:
        return [(f"{stem}{family.canonical(path)}", shape, 1)]
    stacked = len(shape) == _STACKED
    rows, columns = shape[-2:] if len(shape) > 1 else (shape[0], 0)
    one = (rows // len(parts), columns) if columns else (rows // len(parts),)
    return [(f"{stem}{part.format(0)}.weight", one, shape[0] if stacked else 1) for part in parts]


def bare_model(text: str, revision: str | None = None) -> Bare:
    """The model that ``text`` names, by its configuration: only that is read, or fetched.

    Args:
        text: a folder with ``config.json``, that file itself under any name ending in ``.json``, a GGUF file,
            a hub id, or ``smollm2``.

    Raises:
        Refused: there is none, or transformers does not know the architecture.
        BadFile: it is not what it claims to be.
    """
    path = Path(text).expanduser()
    if path.suffix == ".json" and path.is_file():
        if path.stat().st_size > _MOST_CONFIG:
            raise Refused(f"{path.name} is too large to be a configuration", where=str(path))
        return Bare(parse_object(path.read_bytes(), str(path), path.name), path)
    if path.is_dir() and (path / "config.json").is_file():
        return Bare(read_config(path), path)
    if not path.exists() and text != EMBEDDED and is_hub_id(text):
        return Bare(read_config(fetch_config(text, revision).parent), Path(text))
    found = locate(text, revision=revision)
    return Bare(open_path(found).config, found)


@dataclass(frozen=True)
class Sized:
    """What a recipe would make of a model, in numbers.

    Attributes:
        weights: bytes, in parts.
        bpw: bits a weight over all of it.
        bits: bits a weight of the linears inside the blocks.
    """

    weights: Weights
    bpw: float
    bits: float


def sized(model: Bare, recipe: Recipe) -> Sized:
    """The bytes of every tensor under ``recipe``, exact but for padding and headers.

    Raises:
        Refused: the recipe cannot work on these shapes.
    """
    sizes: dict[str, int] = {}
    linear_bits = linear = 0
    for row in placed(recipe, model):
        copies = model.copies.get(row.name, 1)
        bits = _bits(row)
        sizes[row.name] = -(-bits // 8) * copies
        if row.solved:
            linear_bits, linear = linear_bits + bits * copies, linear + math.prod(row.shape) * copies
    whole = sum(sizes.values())
    stays = sizes.get("model.embed_tokens.weight", 0) if "lm_head.weight" in sizes else 0
    weights = Weights(whole, stays if recipe.container == "gguf" else 0, *parted(sizes))
    return Sized(weights, 8 * whole / model.parameters, linear_bits / linear if linear else 16.0)


def _bits(row: Row) -> int:
    text = str(row.grid)
    if len(row.shape) == _MATRIX:
        return row.grid.storage_bits((row.shape[0], row.shape[1]))
    return _WIDTH.get(text, 32) * math.prod(row.shape)
