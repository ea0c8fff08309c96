"""GPTQ folders: what GPTQModel writes and vLLM, SGLang, ExLlama and transformers load.

Codes are packed down the input rows, zero points along the outputs (Frantar et al., arXiv 2210.17323; the
layout is AutoGPTQ's). Version 1 stores zero points minus one and cannot hold 0; version 2 stores them as they
are. Everything reads version 1; GPTQModel, transformers and recent vLLM read version 2 as well.

GPTQModel by itself takes version 1 with zero points from its own folders only: say version=2 for it.

Layers may differ in bits, groups and zero points: the commonest stand in the settings, others in rules by
pattern (``dynamic``), of which the first that matches decides. GPTQModel and vLLM read such folders;
transformers, which loads through optimum, hears no rule and refuses the shapes.
Experts of a mixture are stored one by one; the plan says who is known to take those.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import PackedFolder, quantization_config
from bitmill.checkpoint.patterns import compiled, patterns
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.checkpoint.safetensors_write import (
    Planned,
    bytes_of,
    json_bytes,
    quantized_folder,
)
from bitmill.checkpoint.word_layout import (
    GPTQ_V1,
    GPTQ_V2,
    Said,
    group_said,
    open_words,
    packed_row,
    planned_row,
)
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer, bits_and_group, integers

METHOD = "gptq"

_BITS = (2, 3, 4, 8)
_GROUPS = (0, 16, 32, 64, 128, 256, 512, 1024)
_WEIGHT = ".weight"
_SHOWN = 100
_LAYOUTS = {1: ("gptq", GPTQ_V1), 2: ("gptq_v2", GPTQ_V2)}


@final
@dataclass(frozen=True)
class Gptq(Container):
    """A Hugging Face folder with integer grids for its layers, scales in half precision.

    Attributes:
        version: 1, which everything reads, or 2, whose asymmetric zero points may be 0; either is read.
    """

    single_file: ClassVar[bool] = False

    version: int = 1

    def __post_init__(self) -> None:
        if self.version not in _LAYOUTS:
            raise ValueError(f"there are versions 1 and 2, not {self.version}")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        return _open(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if not isinstance(grid, Integer):
            return f"it holds integer grids only, not {grid}; > bitmill holds nearly all"
        if grid.zero == "fz":
            return "its zero points are whole numbers: say -asym, or write > hqq"
        if grid.bits not in _BITS or grid.group not in _GROUPS:
            return f"it has 2, 3, 4 or 8 bits by groups of 16 to 1024 or by channel, not {grid}"
        if role not in LINEAR_ROLES:
            return f"its readers take only the layers of the blocks quantized, not the {role}"
        if grid.refuses(shape) is not None:
            return grid.refuses(shape)
        if shape[0] % 32 or shape[1] % 32:
            return f"both sides must be multiples of 32, and the weight is {shape[0]} × {shape[1]}"
        return None

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Scales are half precision. In version 1 a zero point is stored as one less, so it starts at 1."""
        if not isinstance(grid, Integer) or grid.zero == "fz":
            return grid
        return replace(grid, scale="f16", zero_floor=int(grid.zero == "asym" and self.version == 1))

    def default_grid(self, dtype: str, role: str) -> str:
        """Kernels compute in 16 bits."""
        return "bf16" if dtype == "bf16" else "f16"

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: a layer is quantized in some blocks only.
        """
        settings = _settings(rows, _LAYOUTS[self.version][0])
        more = {"quantize_config.json": json_bytes(settings)} if settings else {}
        return quantized_folder(source, rows, _planned, settings, notes, more)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        return packed_row(_LAYOUTS[self.version][1], row, quantized, bits_and_group(row.grid))


def _planned(row: Row) -> dict[str, Planned]:
    return planned_row(GPTQ_V1, row, bits_and_group(row.grid))


def _settings(rows: Sequence[Row], layout: str) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized: the commonest bits and groups, and a
    rule for every other. Zero points are always stored; layers are called symmetric where all of a kind are.
    """
    kinds: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        size = bits_and_group(row.grid)
        if size is not None:
            kinds.setdefault(size, []).append(row)
    if not kinds:
        return {}
    common = max(kinds, key=lambda size: len(kinds[size]))
    settings: dict[str, Any] = {
        "quant_method": METHOD,
        **_said(common, kinds[common]),
        "desc_act": False,
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "lm_head": False,
    }
    layers = [r.name.removesuffix(_WEIGHT) for r in rows if r.role in LINEAR_ROLES and r.layer is not None]
    special: dict[str, dict[str, Any]] = {}
    for size, members in kinds.items():
        if size != common:
            names = [row.name.removesuffix(_WEIGHT) for row in members]
            special |= {f"+:{text}": _said(size, members) for text, _ in patterns(names, layers)}
    placed = {row.name.removesuffix(_WEIGHT) for members in kinds.values() for row in members}
    skipped = _skipped(layers, placed)
    special |= skipped.pop("dynamic", {})
    return {**settings, **skipped, **({"dynamic": special} if special else {})}


def _said(size: tuple[int, int], rows: Sequence[Row]) -> dict[str, Any]:
    symmetric = all(isinstance(row.grid, Integer) and row.grid.zero == "sym" for row in rows)
    return {"bits": size[0], "group_size": size[1] or -1, "sym": symmetric}


def _skipped(layers: Sequence[str], chosen: Collection[str]) -> dict[str, Any]:
    """Layers of the blocks that stay dense, in both spellings that readers know.

    Raises:
        Refused: they differ from block to block.
    """
    left = [name for name in layers if name not in chosen]
    if not left:
        return {}
    for name, (text, regular) in zip(left, patterns(left, layers), strict=False):
        if not regular or r"\d+" not in text:
            raise Refused(
                "a GPTQ folder keeps a layer dense in every block or in none",
                where=f"{name} and its like in other blocks",
                fix="keep=<role> for all blocks, or > compressed-tensors",
            )
    placed = [name for name in layers if name in chosen]
    inside = list(dict.fromkeys(name.split(".layers.", 1)[1].split(".", 1)[1] for name in placed))
    skip: dict[str, dict[str, Any]] = {f"-:{text}": {} for text, _ in patterns(left, layers)}
    return {"modules_in_block_to_quantize": [inside], "dynamic": skip}


def _open(path: Path) -> PackedFolder:
    folder, config = TensorFolder(path), read_config(path)
    settings = config["quantization_config"]
    bits, name = settings.get("bits"), settings.get("checkpoint_format", settings.get("format", "gptq"))
    layout = dict(_LAYOUTS.values()).get(name) if type(name) is str else None
    if (
        type(bits) is not int
        or bits not in _BITS
        or layout is None
        or settings.get("pack_dtype", "int32") != "int32"
    ):
        raise Refused(
            f"GPTQ weights of {bits!r} bits in layout {name!r} cannot be read here",
            where=str(path / "config.json"),
            fix="give the original model",
        )
    said = Said(bits, group_said(settings, str(path / "config.json")), _BITS)
    each = partial(_ruled, said, _rules(settings, path), path)
    return PackedFolder(folder, config, open_words(folder, layout, each, integers))


_Rule = tuple[re.Pattern[str], Mapping[str, Any] | None]
"""A pattern for the beginning of a layer's path, and what is otherwise there; None where it stays dense."""


def _rules(settings: Mapping[str, Any], path: Path) -> list[_Rule]:
    """``dynamic`` as GPTQModel reads it: the first that matches decides.

    Raises:
        BadFile: it is not what such rules must be.
    """
    told, where = settings.get("dynamic") or {}, f"{path / 'config.json'}: dynamic"
    if not isinstance(told, dict):
        raise BadFile(f"{told!r} are no rules", where=where)
    rules: list[_Rule] = []
    for text, change in told.items():
        left = text.startswith("-:")
        pattern = text[2:] if text.startswith(("-:", "+:")) else text
        if not isinstance(change, dict) and not left:
            raise BadFile(f"{change!r} says nothing of a layer", where=f"{where}: {text[:_SHOWN]}")
        rules.append((compiled(pattern, where), None if left else change))
    return rules


def _ruled(said: Said, rules: Sequence[_Rule], path: Path, module: str) -> Said:
    """What the settings say of one layer.

    Raises:
        Refused, BadFile: they say what no layer can be.
    """
    where = f"{module} in {path / 'config.json'}: dynamic"
    change = next((change for pattern, change in rules if pattern.match(module)), {})
    if change is None:
        raise BadFile("it is quantized, and a rule says that it is not", where=where)
    bits = change.get("bits", said.bits)
    if type(bits) is not int or bits not in _BITS or change.get("pack_dtype", "int32") != "int32":
        raise Refused(f"GPTQ weights of {bits!r} bits cannot be read here", where=where)
    group = group_said(change, where) if "group_size" in change else said.group
    return replace(said, bits=bits, group=group)
