"""MLX folders: what ``mlx_lm.convert`` writes, and mlx-lm and LM Studio run on Apple silicon.

A quantized layer has ``weight`` (codes as one stream of bits a row, in 32-bit words), ``scales`` and, in the
affine mode, ``biases``: a value is ``scale · code + bias``, in the model's own type. The modes ``mxfp4``,
``mxfp8`` and ``nvfp4`` have a byte as scale and no bias. Layers may differ; embedding and head may be
quantized too. Experts of a mixture are one stack a projection (``switch_mlp``), as mlx-lm makes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    folder_images,
    model_config,
    to_bytes,
)
from bitmill.containers._mlx_read import EXPERT_NAMES, STACK, open_folder, settings_of
from bitmill.core.axes import Checkpoint, Container, Grid, torch_dtype
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert, traits
from bitmill.grids.biased import Biased
from bitmill.grids.dense import Dense
from bitmill.grids.ggml_floats import GgmlFloat
from bitmill.grids.integer import Integer
from bitmill.numerics.bits import pack

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_ROLES = LINEAR_ROLES | {"embed", "head", "router"}
_WEIGHT = ".weight"
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_PROJECTIONS = {own: part for part, own in EXPERT_NAMES.items()}
_SMALL = {
    "mxfp4": ("mxfp4", 32, 4),
    "mxfp4-floor": ("mxfp4", 32, 4),
    "mxfp8": ("mxfp8", 32, 8),
    "nvfp4-flat": ("nvfp4", 16, 4),
}
"""Mode, group and bits of the grids that have one."""


@final
@dataclass(frozen=True)
class Mlx(Container):
    """A folder for mlx-lm: integers with a scale and a bias a group, MX types, NVFP4 without gain."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return settings_of(path) is not None

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if role not in _ROLES:
            return f"MLX quantizes linear layers and embeddings, not the {role}"
        if isinstance(grid, Integer | Biased):
            if grid.bits not in _BITS or grid.group not in _GROUPS:
                return f"MLX has 2, 3, 4, 5, 6 or 8 bits by groups of 32, 64 or 128, not {grid}"
        elif str(grid) not in _SMALL:
            return f"MLX has integers, mxfp4, mxfp8 and nvfp4-flat; > bitmill holds {grid}"
        return grid.refuses(shape)

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Scales are of the model's type, and a zero point becomes a bias of that type. That is exact for
        symmetric integers in 16 bits, and for integer zero points under 16-bit scales in a single-precision
        model; all others go on a grid with a bias, which costs no more bytes."""
        if isinstance(grid, Integer):
            if grid.zero == "sym" and dtype != "f32":
                return replace(grid, scale=dtype)
            if grid.zero == "asym" and dtype == "f32" and grid.scale != "f32":
                return replace(grid, scale="f16" if grid.scale == "auto" else grid.scale, zero_floor=0)
            return Biased(grid.bits, grid.group, dtype) if grid.group > 0 else grid
        if isinstance(grid, Biased):
            return replace(grid, scale=dtype)
        return GgmlFloat("nvfp4-flat") if str(grid) == "nvfp4" else grid

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: experts of a block are not all alike, which mlx-lm stores as one.
        """
        config = model_config(source, rows)
        config |= {key: value for key, value in _older_names(config).items() if key not in config}
        settings = _settings(rows)
        if settings:
            config |= {"quantization": settings, "quantization_config": settings}
        slots = {name: planned for row in rows for name, planned in _planned(row).items()}
        tensors, stacks = _stacked(slots, traits(source.config)["experts"])
        metadata = {"format": "mlx", **{f"bitmill.{key}": text for key, text in notes.items()}}
        return folder_images(source, tensors, config, metadata, stacks=stacks)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        module, entry = _place(row.name)
        found = _parts(row.grid, quantized).items()
        return {f"{module}.{name}{entry}": to_bytes(value) for name, value in found}


def _place(weight: str) -> tuple[str, str]:
    """The module that holds a quantized weight, and which entry of its stack where it is an expert's."""
    expert = _EXPERT.fullmatch(weight)
    if expert is None:
        return weight.removesuffix(_WEIGHT), ""
    block, number, part = expert.groups()
    return f"{block}{STACK}{_PROJECTIONS.get(part, part)}", f"[{number}]"


def _stacked(slots: Mapping[str, Planned], experts: int) -> tuple[dict[str, Planned], set[str]]:
    """Tensors of the file, with the experts' parts joined to stacks; names of those.

    Raises:
        Refused: an expert or a projection is missing in a stack, or they differ.
    """
    tensors: dict[str, Planned] = {}
    counts: Counter[str] = Counter()
    for slot, (dtype, shape) in slots.items():
        name, entry, _ = slot.partition("[")
        planned: Planned = (dtype, (experts, *shape)) if entry else (dtype, shape)
        counts[name] += bool(entry)
        if tensors.setdefault(name, planned) != planned:
            raise Refused(
                "the experts of a block are one tensor in mlx-lm, all on one grid",
                where=name,
                fix="name the same grid for all experts of a role",
            )
    stacks = {name for name, count in counts.items() if count}
    whole = {name.rpartition(".")[0] for name in stacks if counts[name] == experts}
    for module in sorted({name.rpartition(".")[0] for name in stacks}):
        block = module.partition(STACK)[0]
        if module not in whole or any(f"{block}{STACK}{part}" not in whole for part in _PROJECTIONS.values()):
            raise Refused(
                "the experts of a block are quantized all together in mlx-lm, or not at all",
                where=module,
                fix="quantize gate, up and down, or keep=gate+up+down",
            )
    return tensors, stacks


def _kind(grid: Grid) -> tuple[str, int, int]:
    """Mode, group and bits."""
    if isinstance(grid, Integer | Biased):
        return "affine", grid.group, grid.bits
    return _SMALL[str(grid)]


def _planned(row: Row) -> dict[str, Planned]:
    if isinstance(row.grid, Dense):
        return {row.name: (DENSE_DTYPES[str(row.grid)], row.shape)}
    module, entry = _place(row.name)
    if not row.name.endswith(_WEIGHT) or (is_expert(row.name) and not entry):
        raise Refused(f"mlx-lm has no place for {row.grid} here", where=row.name, fix="keep this tensor")
    mode, group, bits = _kind(row.grid)
    out, columns = row.shape
    scales: Planned = ("U8" if mode != "affine" else _number(row.grid), (out, columns // group))
    parts: dict[str, Planned] = {"weight": ("U32", (out, columns * bits // 32)), "scales": scales}
    if mode == "affine":
        parts["biases"] = scales
    return {f"{module}.{name}{entry}": planned for name, planned in parts.items()}


def _number(grid: Grid) -> str:
    """What scales and biases are stored in. Integer zero points stay exact in single precision only."""
    if not isinstance(grid, Integer | Biased):
        raise ValueError(f"{grid} has no such scales")
    whole = isinstance(grid, Integer) and grid.zero == "asym"
    return "F32" if whole else DENSE_DTYPES["f16" if grid.scale == "auto" else grid.scale]


def _parts(grid: Grid, quantized: Quantized) -> dict[str, Tensor]:
    mode, _, bits = _kind(grid)
    params = quantized.params
    words = {"weight": pack(quantized.codes, bits)}
    if mode == "nvfp4":
        return {**words, "scales": exactly(params["scale"], torch.float8_e4m3fn).view(torch.uint8)}
    if mode != "affine":
        return {**words, "scales": params["exponent"]}
    scale = params["scale"]
    if isinstance(grid, Integer):
        bias = -scale * params.get("zero", torch.tensor(2.0 ** (bits - 1)))
    else:
        bias = params["bias"]
    dtype = {spelled: torch_dtype(name) for name, spelled in DENSE_DTYPES.items()}[_number(grid)]
    return {**words, "scales": exactly(scale, dtype), "biases": exactly(bias, dtype)}


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """``quantization``: the commonest kind, and every layer of another; nothing when all is dense."""
    kinds = {_place(row.name)[0]: _kind(row.grid) for row in rows if not isinstance(row.grid, Dense)}
    if not kinds:
        return {}
    common = Counter(kinds.values()).most_common(1)[0][0]

    def said(kind: tuple[str, int, int]) -> dict[str, Any]:
        return {"group_size": kind[1], "bits": kind[2], "mode": kind[0]}

    return {**said(common), **{name: said(kind) for name, kind in kinds.items() if kind != common}}


def _older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as mlx-lm reads them: transformers 5 has gathered those of rotary positions, and most of
    mlx-lm's models take a default for what they do not find."""
    ropes, experts = config.get("rope_parameters"), config.get("num_local_experts")
    counted = {} if experts is None else {"num_experts": experts}
    if not isinstance(ropes, dict):
        return counted
    nested = isinstance(ropes.get("full_attention"), dict)
    whole, local = (ropes["full_attention"], ropes.get("sliding_attention", {})) if nested else (ropes, {})
    named = {
        "rope_theta": whole.get("rope_theta"),
        "partial_rotary_factor": whole.get("partial_rotary_factor"),
    }
    named["rope_local_base_freq"] = local.get("rope_theta")
    if whole.get("rope_type", "default") != "default":
        named["rope_scaling"] = {**whole, "type": whole["rope_type"]}
    layers = config.get("layer_types")
    if isinstance(layers, list) and "full_attention" in layers and "sliding_attention" in layers:
        named["sliding_window_pattern"] = layers.index("full_attention") + 1
    return counted | {key: value for key, value in named.items() if value is not None}
