"""GGUF, the single-file container of llama.cpp (ggml-org): what llama.cpp, Ollama and LM Studio load."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, final

import torch

from bitmill.checkpoint.gguf import MAGIC, first_parts, scale_of
from bitmill.checkpoint.gguf_arch import (
    Architecture,
    architecture_of_model,
    interleaved,
)
from bitmill.checkpoint.gguf_config import keys_of
from bitmill.checkpoint.gguf_model import GgufCheckpoint
from bitmill.checkpoint.gguf_rope import rope_tensors
from bitmill.checkpoint.gguf_write import Planned, divided, encoded, head
from bitmill.checkpoint.tokenizer import gguf_keys
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row, Slot, Split
from bitmill.families.base import head_dim, traits
from bitmill.numerics import blocks

_VECTOR_ROLES = frozenset(
    {
        "bias",
        "router",
        "norm",
        "attn_in_norm",
        "mlp_in_norm",
        "q_norm",
        "k_norm",
        "post_attn_norm",
        "post_mlp_norm",
        "final_norm",
        "other",
    }
)
"""Roles that llama.cpp wants in single precision."""

_FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "f32": 0,
        "f16": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q8_0": 7,
        "q5_0": 8,
        "q5_1": 9,
        "q2_k": 10,
        "q3_k": 11,
        "q4_k": 14,
        "q5_k": 16,
        "q6_k": 18,
        "iq2_xxs": 19,
        "iq2_xs": 20,
        "iq3_xxs": 23,
        "iq1_s": 24,
        "iq4_nl": 25,
        "iq3_s": 26,
        "iq2_s": 28,
        "iq4_xs": 30,
        "iq1_m": 31,
        "bf16": 32,
        "tq1_0": 36,
        "tq2_0": 37,
        "mxfp4": 38,
        "nvfp4": 39,
    }
)
MIXTURES: Mapping[str, int] = MappingProxyType(
    {
        **{kind.upper(): number for kind, number in _FILE_TYPES.items()},
        "Q3_K_S": 11,
        "Q3_K_M": 12,
        "Q3_K_L": 13,
        "Q4_K_S": 14,
        "Q4_K_M": 15,
        "Q5_K_S": 16,
        "Q5_K_M": 17,
        "Q2_K_S": 21,
        "IQ3_XS": 22,
        "IQ3_M": 27,
        "IQ2_M": 29,
        "MXFP4_MOE": 38,
    }
)
"""Numbers of llama.cpp's mixtures; a row's reason begins with the mixture's name."""
_SCALED_MLP = frozenset({"llama", "qwen3", "qwen3moe"})
"""Architectures in which llama.cpp multiplies an MLP's products, or its experts', by the scales beside its
weights."""
_NOT_COPIED = ("split.", "quantize.", "bitmill.")
"""Prefixes of keys that describe the source file, not the model."""
_QUANTIZATION_VERSION = 2


@final
@dataclass(frozen=True)
class Gguf(Container):
    """One file with everything in it: weights in ggml's block types, numbers, tokenizer, chat template.

    Or a folder of parts, of which the first holds all but weights.

    Attributes:
        split: the most that a part may hold; None for one file.
        pre_tokenizer: llama.cpp's name of how text is cut into words; None recognises it.
    """

    single_file: ClassVar[bool] = True
    split: Split | None = None
    pre_tokenizer: str | None = None

    @classmethod
    def recognises(cls, path: Path) -> bool:
        if path.is_dir():
            return not (path / "config.json").exists() and len(first_parts(path)) == 1
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def open(self, path: Path) -> Checkpoint:
        return GgufCheckpoint(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        kind = str(grid)
        if blocks.type_of(kind) not in blocks.TYPES:
            return f"GGUF holds {', '.join(blocks.TYPES)}; {kind} is none of them"
        if (len(shape) < 2 or role in _VECTOR_ROLES - {"other"}) and kind != "f32":
            return f"llama.cpp wants norms, biases and other vectors as f32, not {kind}"
        if kind == "nvfp4" and role == "embed":
            return "llama.cpp has no scale for an embedding, which nvfp4 needs; nvfp4-flat and mxfp4 fit"
        return grid.refuses(shape)

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        return grid

    def default_grid(self, dtype: str, role: str) -> str:
        if role in _VECTOR_ROLES:
            return "f32"
        return "bf16" if dtype == "bf16" else "f16"

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {planned.name: planned.bytes_ for planned in _planned(row, _architecture(source))}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """One image with an empty path, or one a part.

        Tensors that llama.cpp derives from the configuration come first; their bytes are part of the head.

        Raises:
            Refused: llama.cpp has no architecture for the model, or no place for one of its tensors.
        """
        arch = _architecture(source)
        _check_complete(rows, source)
        _check_scaled(rows, arch)
        extras = _extras(source)
        ordered = sorted(rows, key=lambda r: (r.layer is not None, r.layer or 0, r.name))
        planned = _stacked([p for row in ordered for p in _planned(row, arch)], source)
        first = [Planned(n, tuple(t.shape), blocks.TYPES["f32"].id, t.nbytes) for n, t in extras.items()]
        keys = {**_model_keys(source, arch, self.pre_tokenizer), **_quantization_keys(rows)}
        keys.update({f"bitmill.{name}": encoded(text) for name, text in notes.items()})
        if self.split is None:
            return (_image("", keys, [*first, *planned], extras),)
        parts = divided(keys, [*first, *planned], self.split)
        stem = _stem(source) or arch.name
        paths = [f"{stem}-{no:05d}-of-{len(parts):05d}.gguf" for no in range(1, len(parts) + 1)]
        return tuple(_image(path, *part, extras) for path, part in zip(paths, parts, strict=True))

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        arch = _architecture(source)
        name = _slot_name(row.name, arch)
        if name is None:
            return {}
        if arch.is_permuted(row.name):
            quantized = quantized.rows(interleaved(row.shape[0], head_dim(source.config)))
        codes, offset = quantized.codes, arch.offset(row.name)
        if offset:
            codes = codes.to(torch.float32) + offset
        packed = {name: blocks.pack(blocks.type_of(str(row.grid)), codes, quantized.params).tobytes()}
        if "gain" in quantized.params:
            gain = quantized.params["gain"].to("cpu", torch.float32)
            packed[_scale_slot(name)] = (1 / gain).numpy().tobytes()
        return packed


def _image(
    path: str, keys: Mapping[str, bytes], tensors: Sequence[Planned], extras: Mapping[str, torch.Tensor]
) -> FileImage:
    header, offsets, size = head(keys, tensors)
    for name in (t.name for t in tensors if t.name in extras):
        header = header.ljust(offsets[name], b"\0") + extras[name].contiguous().numpy().tobytes()
    slots = [slot for t in tensors if t.name not in extras for slot in _slots(t, offsets[t.name])]
    return FileImage(path, header, tuple(slots), size)


def _architecture(source: Checkpoint) -> Architecture:
    return source.arch if isinstance(source, GgufCheckpoint) else architecture_of_model(source.config)


def _slot_name(name: str, arch: Architecture) -> str | None:
    """What a tensor is called in the file; with its number behind, when it is one expert of a stack."""
    stored, expert = arch.gguf_name(name), arch.expert(name)
    return stored if expert is None else f"{stored}[{expert}]"


def _scale_slot(slot: str) -> str:
    """Where the scale beside a tensor, or beside one expert of a stack, goes."""
    name, bracket, number = slot.partition("[")
    return scale_of(name) + bracket + number


def _stacked(planned: Sequence[Planned], source: Checkpoint) -> list[Planned]:
    """Experts joined to stacks: rows are independent, so that their bytes only follow each other.

    Raises:
        Refused: an expert is missing, or experts of one stack differ in type or shape.
    """
    experts = traits(source.config)["experts"]
    joined: dict[str, Planned] = {}
    parts: dict[str, dict[int, Planned]] = {}
    for one in planned:
        name, _, number = one.name.rstrip("]").partition("[")
        joined.setdefault(name, one)
        if number:
            parts.setdefault(name, {})[int(number)] = one
    for name, found in parts.items():
        kinds = {(one.type, one.shape) for one in found.values()}
        if set(found) != set(range(experts)) or len(kinds) > 1:
            raise Refused(
                f"{len(found)} experts of {len(kinds)} types and shapes; a stack has {experts}, all alike",
                where=name,
            )
        ((kind, shape),) = kinds
        joined[name] = Planned(name, (experts, *shape), kind, experts * found[0].bytes_, experts)
    return list(joined.values())


def _slots(planned: Planned, offset: int) -> list[Slot]:
    """Where a tensor goes, or each expert of a stack."""
    if not planned.stacked:
        return [Slot(planned.name, offset, planned.bytes_)]
    size = planned.bytes_ // planned.stacked
    return [Slot(f"{planned.name}[{e}]", offset + e * size, size) for e in range(planned.stacked)]


def _planned(row: Row, arch: Architecture) -> tuple[Planned, ...]:
    """What a row becomes: nothing, a tensor, or one with a scale of the whole beside it."""
    name = _slot_name(row.name, arch)
    if name is None:
        return ()
    kind = blocks.TYPES[blocks.type_of(str(row.grid))]
    columns = row.shape[-1] if row.shape else 1
    planned = Planned(name, tuple(row.shape), kind.id, prod(row.shape[:-1]) * kind.row_bytes(columns))
    if str(row.grid) != "nvfp4":
        return (planned,)
    one = () if name.endswith("]") else (1,)  # those of a stack's experts are one vector
    return planned, Planned(_scale_slot(name), one, blocks.TYPES["f32"].id, 4)


def _check_complete(rows: Sequence[Row], source: Checkpoint) -> None:
    names = {row.name for row in rows}
    if "lm_head.weight" not in names and not source.config.get("tie_word_embeddings", False):
        raise Refused(
            "the model has no lm_head.weight and does not tie it to the embedding",
            where=str(source.path),
            fix='set "tie_word_embeddings": true in config.json if the output shares the embedding',
        )


def _check_scaled(rows: Sequence[Row], arch: Architecture) -> None:
    """Refuse scales beside tensors that llama.cpp loads and then forgets."""
    for row in rows:
        scaled = str(row.grid) == "nvfp4" and row.role in ("gate", "up", "down")
        if scaled and arch.name not in _SCALED_MLP:
            raise Refused(
                f"llama.cpp's {arch.name} does not apply the scale that nvfp4 has beside an MLP's weight",
                where=row.name,
                fix="nvfp4-flat, which has none, or mxfp4",
            )


def _extras(source: Checkpoint) -> Mapping[str, torch.Tensor]:
    if isinstance(source, GgufCheckpoint):
        return source.extras
    return rope_tensors(source.config)


def _model_keys(source: Checkpoint, arch: Architecture, words: str | None) -> dict[str, bytes]:
    """Everything about the model: copied from a GGUF source as it stands there, built for any other."""
    if isinstance(source, GgufCheckpoint):
        kept = {k: v for k, v in source.file.raw_keys.items() if not k.startswith(_NOT_COPIED)}
        kept.pop("general.alignment", None)
        if words is not None and "tokenizer.ggml.model" in kept:
            kept["tokenizer.ggml.pre"] = encoded(words)
        return kept
    keys = {
        "general.architecture": arch.name,
        "general.type": "model",
        "general.name": _model_name(source) or arch.name,
        "general.size_label": _size_label(sum(prod(f.shape) for f in source.tensors.values())),
        **keys_of(source.config, arch),
        **gguf_keys(source.carried, source.config, words),
    }
    return {name: encoded(value) for name, value in keys.items()}


def _model_name(source: Checkpoint) -> str:
    """The last part of the model's name or folder; never a whole path, which would tell where it was made."""
    folder = source.path.parent.parent if source.path.parent.name == "snapshots" else source.path
    named = str(source.config.get("_name_or_path") or folder.name)
    return named.rstrip("/").rsplit("/", 1)[-1].rsplit("--", 1)[-1]


def _stem(source: Checkpoint) -> str:
    """The model's name as a part of a file's."""
    named = source.metadata.get("general.name") if isinstance(source, GgufCheckpoint) else None
    return re.sub(r"[^A-Za-z0-9_.]+", "-", str(named or _model_name(source)))[:96].strip("-.")


def _size_label(weights: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if weights >= size:
            count = weights / size
            return f"{count:.1f}{unit}" if count < 10 and unit != "M" else f"{count:.0f}{unit}"
    return str(weights)


def _quantization_keys(rows: Sequence[Row]) -> dict[str, bytes]:
    """The mixture, or else the type that holds most weights, as llama.cpp numbers it."""
    weights: Counter[str] = Counter()
    for row in rows:
        if len(row.shape) > 1:
            weights[blocks.type_of(str(row.grid))] += prod(row.shape)
    kind = weights.most_common(1)[0][0] if weights else "f32"
    mixtures = {row.why.partition(":")[0] for row in rows} & set(MIXTURES)
    return {
        "general.file_type": encoded(MIXTURES[mixtures.pop()] if mixtures else _FILE_TYPES[kind]),
        "general.quantization_version": encoded(_QUANTIZATION_VERSION),
    }
