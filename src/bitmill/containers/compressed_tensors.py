"""compressed-tensors folders: what llm-compressor writes and vLLM, SGLang and transformers load.

Layouts by grid: integers as ``pack-quantized``, FP8 as ``naive-quantized``, MX types and NVFP4 as their own;
with inputs that are rounded too, eight-bit rows as ``int-quantized`` and FP8 as ``float-quantized``. The
``quantization_config`` names the layers of each grid and describes their inputs; scales that calibration
fixed stand beside the weights.

Experts of a mixture are layers like any other. transformers 5.23 loads them on symmetric packed integers and
in FP8; it fails on zero points, on whole bytes and on experts kept dense, and misreads those in
NVFP4 without a word: they are for vLLM, and the plan says so.

Read as well: groups in activation order (``weight_g_idx``) and rotations while the model runs
(``transform_config``), both as dense values, since no grid has them; rotations go into the weights behind
them, and inputs that are rounded behind one are rounded in its basis by ``measure`` and ``load``. Rotations
are written for ``hadamard(r4=true)`` and its like; vLLM runs those of linear layers, transformers
5.23 loads such a folder without them, and the plan says so.

Keys and values that go through a cache in FP8 or int8 have their scales (``k_scale``, ``v_scale``) beside the
attention, and ``kv_cache_scheme`` says so: written by ``cache=``, read, kept by ``convert``, and what
``measure`` and ``load`` compute with, as transformers does. vLLM runs such caches in FP8 only. Caches of 2 to
8 bits whose scales come with each token's head are written and run in the same way, by transformers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.packed_folder import quantization_config
from bitmill.checkpoint.patterns import patterns
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    exactly,
    folder_images,
    model_config,
    to_bytes,
)
from bitmill.containers import _compressed_online as online
from bitmill.containers._compressed_read import open_folder
from bitmill.core.axes import Checkpoint, Grid, torch_dtype
from bitmill.core.errors import Refused
from bitmill.core.inputs import InputGrid
from bitmill.core.online import OnlineContainer
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import head_dim
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer
from bitmill.grids.minifloat import Minifloat
from bitmill.numerics.bits import pack, packed_words
from bitmill.numerics.floats import ELEMENTS

METHOD = "compressed-tensors"

_WEIGHT = ".weight"
_SMALL = {"mxfp4": "mxfp4", "mxfp6-e2m3": "mxfp6", "mxfp8": "mxfp8", "nvfp4": "nvfp4"}
_STRATEGY = {"channel": "channel", "tensor": "tensor", "b128": "block"}
_WITH_SMALL = {
    "mxfp4": ("mxfp4", "mxfp8", "fp8-e4m3-g128-token"),
    "mxfp6-e2m3": ("mxfp6-e2m3", "mxfp8"),
    "mxfp8": ("mxfp8",),
    "nvfp4": ("nvfp4",),
}
"""Input grids that go with weights on these, by the package's own presets and their like."""

_EXTENT = {"head": "attn_head"}
_FIXED = {"scale": "input_scale", "zero": "input_zero_point", "gain": "input_global_scale"}


@final
@dataclass(frozen=True)
class CompressedTensors(OnlineContainer):
    """A Hugging Face folder in the layouts of the compressed-tensors package, 0.19 or newer (MXFP6: 0.20)."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if role == "embed":
            return "its readers take embeddings as dense values only"
        reason = _unknown(grid)
        return grid.refuses(shape) if reason is None else reason

    def refuses_inputs(self, grid: Grid, inputs: InputGrid) -> str | None:
        if inputs.clip != 1:
            return _CLIPPED
        if isinstance(grid, Integer):
            small = inputs.scaling != "real"
            return "whole numbers go with int8-token, fp8-e4m3-token and their like" if small else None
        allowed = _WITH_SMALL.get(str(grid))
        if allowed is not None:
            return None if str(inputs) in allowed else f"with this weight go {', '.join(allowed)}"
        fits = isinstance(grid, Minifloat) and (inputs.element, inputs.scaling) == ("e4m3", "real")
        return None if fits else "FP8 weights go with fp8-e4m3-token, -tensor, -tensor-static and -g128-token"

    def refuses_cache(self, grid: InputGrid) -> str | None:
        if grid.method:
            return "it knows scales and no other ways; name one that does: > bitmill"
        return None if grid.clip == 1 else _CLIPPED

    def refuses_rotation(self, space: str, order: int) -> str | None:
        return online.refuses(space, order)

    def implied_inputs(self, rows: Sequence[Row]) -> Mapping[str, InputGrid]:
        return {}

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        """Readers hold scales in the model's own type, so a 16-bit model gets scales of that type; single
        precision holds any, and 16 bits are enough."""
        if not isinstance(grid, Integer) or grid.zero == "fz":
            return grid
        free = "f16" if grid.scale == "auto" else grid.scale
        return replace(grid, scale=free if dtype == "f32" else dtype, zero_floor=0)

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: MX or NVFP4 weights in a model whose kept values are not bfloat16.
        """
        config = model_config(source, rows)
        groups = _groups(rows)
        if groups or any(row.cache or row.turn for row in rows):
            _refuse_precision(groups, config["dtype"])
            config["quantization_config"] = _settings(rows, groups, head_dim(source.config))
        tensors = {name: planned for row in rows for name, planned in _planned(row).items()}
        metadata = {f"bitmill.{key}": text for key, text in notes.items()}
        return folder_images(source, tensors, config, metadata)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        turned = {name: to_bytes(online.signs(row)) for name in online.matrix(row)}
        if isinstance(row.grid, Dense):
            return {row.name: to_bytes(quantized.codes), **turned}
        module = row.name.removesuffix(_WEIGHT)
        if isinstance(row.grid, Integer):
            parts = _plain(row.grid, quantized) if _is_plain(row) else _integer(row.grid, quantized)
        else:
            parts = _small(quantized)
        for key in row.inputs.fixed if row.inputs is not None else ():
            value = quantized.inputs[key]
            parts[_FIXED[key]] = exactly(value, torch.int8) if key == "zero" else value.to(torch.float32)
        return {**{f"{module}.{name}": to_bytes(value) for name, value in parts.items()}, **turned}


_CLIPPED = "its readers take scales from the whole range: leave out -clip, or write > bitmill"


def _unknown(grid: Grid) -> str | None:
    """Why no layout holds ``grid``, and which container would."""
    if isinstance(grid, Integer):
        if grid.zero == "fz":
            return "its zero points are whole numbers: say -asym, or write > hqq"
        return "it has no packed layout with one scale for a whole tensor" if grid.group == -1 else None
    if isinstance(grid, Minifloat):
        if str(grid) in _SMALL or (grid.element == "e4m3" and grid.scaling in _STRATEGY):
            return None
        other = "> fp8 or > bitmill holds" if grid.element == "e5m2" else "> bitmill holds"
        return f"it has FP8 in E4M3 only, and {', '.join(_SMALL)}; {other} {grid}"
    text = str(grid)
    if text.startswith("q"):
        return "K-quants and their kin live in GGUF files: write > gguf"
    if text.startswith(("nf4", "fp4", "llm-int8")):
        return f"{text} is bitsandbytes' own: write > bitsandbytes"
    return f"it has no layout for {text}; > bitmill holds it"


def _planned(row: Row) -> dict[str, Planned]:
    if row.cache is not None and not row.cache.static:
        return {}
    if isinstance(row.grid, Dense):
        return {row.name: (DENSE_DTYPES[str(row.grid)], row.shape), **online.matrix(row)}
    if not row.name.endswith(_WEIGHT):
        raise Refused(f"only weights of layers can be on {row.grid}", where=row.name, fix="keep this tensor")
    module = row.name.removesuffix(_WEIGHT)
    parts = _parts(row.grid, (row.shape[0], row.shape[1]), _is_plain(row))
    for key in row.inputs.fixed if row.inputs is not None else ():
        parts[_FIXED[key]] = ("I8" if key == "zero" else "F32", (1,))
    return {**{f"{module}.{name}": planned for name, planned in parts.items()}, **online.matrix(row)}


def _is_plain(row: Row) -> bool:
    """Whether whole bytes are stored, as kernels that multiply whole numbers want them."""
    return row.inputs is not None and isinstance(row.grid, Integer) and _is_int8(row.grid, row.inputs)


def _is_int8(grid: Integer, inputs: InputGrid) -> bool:
    return grid.bits == 8 and grid.group == 0 and inputs.element == "int"


def _parts(grid: Grid, shape: tuple[int, int], plain: bool) -> dict[str, Planned]:
    """Element type and dimensions of every stored tensor of one weight."""
    out, columns = shape
    if isinstance(grid, Integer) and plain:
        scale: Planned = (DENSE_DTYPES[_scale(grid)], (out, 1))
        whole: dict[str, Planned] = {"weight": ("I8", shape), "weight_scale": scale}
        return whole if grid.zero == "sym" else {**whole, "weight_zero_point": ("I8", (out, 1))}
    if isinstance(grid, Integer):
        groups = columns // grid.group if grid.group else 1
        parts: dict[str, Planned] = {
            "weight_packed": ("I32", (out, packed_words(columns, grid.bits))),
            "weight_scale": (DENSE_DTYPES[_scale(grid)], (out, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if grid.zero == "asym":
            parts["weight_zero_point"] = ("I32", (packed_words(out, grid.bits), groups))
        return parts
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    bits = ELEMENTS[grid.element].bits
    codes: Planned = ("U8", (out, columns * bits // 8)) if bits < 8 else ("F8_E4M3", shape)
    name = "weight_packed" if bits < 8 else "weight"
    if grid.scaling == "mx":
        return {name: codes, "weight_scale": ("U8", (out, columns // 32))}
    if grid.scaling == "nv":
        scale = ("F8_E4M3", (out, columns // 16))
        return {name: codes, "weight_scale": scale, "weight_global_scale": ("F32", (1,))}
    tiles = (-(-out // 128), -(-columns // 128))
    return {
        name: codes,
        "weight_scale": ("F32", {"channel": (out, 1), "tensor": (1,)}.get(grid.scaling, tiles)),
    }


def _scale(grid: Integer) -> str:
    return "f16" if grid.scale == "auto" else grid.scale


def _integer(grid: Integer, quantized: Quantized) -> dict[str, Tensor]:
    """Codes and zero points keep their offset of ``2**(bits - 1)``; zero points are packed down the rows."""
    parts = {
        "weight_packed": pack(quantized.codes, grid.bits),
        "weight_scale": exactly(quantized.params["scale"], torch_dtype(_scale(grid))),
        "weight_shape": torch.tensor(quantized.shape, dtype=torch.int64),
    }
    if grid.zero == "asym":
        zero = exactly(quantized.params["zero"], torch.uint8)
        parts["weight_zero_point"] = pack(zero.T.contiguous(), grid.bits).T
    return parts


def _plain(grid: Integer, quantized: Quantized) -> dict[str, Tensor]:
    """Codes and zero points as signed bytes."""
    parts = {
        "weight": (quantized.codes.to(torch.int16) - 128).to(torch.int8),
        "weight_scale": exactly(quantized.params["scale"], torch_dtype(_scale(grid))),
    }
    if grid.zero == "asym":
        parts["weight_zero_point"] = exactly(quantized.params["zero"] - 128, torch.int8)
    return parts


def _small(quantized: Quantized) -> dict[str, Tensor]:
    grid, params = quantized.grid, quantized.params
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    bits = ELEMENTS[grid.element].bits
    codes = {"weight": quantized.codes} if bits == 8 else {"weight_packed": pack(quantized.codes, bits, 8)}
    if grid.scaling == "mx":
        return {**codes, "weight_scale": params["exponent"]}
    if grid.scaling == "nv":
        scale = exactly(params["scale"], torch.float8_e4m3fn)
        return {**codes, "weight_scale": scale, "weight_global_scale": params["gain"].reshape(1)}
    return {**codes, "weight_scale": params["scale"].to(torch.float32)}


_Kind = tuple[Grid, InputGrid | None]


def _groups(rows: Sequence[Row]) -> dict[_Kind, list[str]]:
    """Modules by the grids of their weights and inputs, in order."""
    groups: dict[_Kind, list[str]] = {}
    for row in rows:
        if not isinstance(row.grid, Dense):
            groups.setdefault((row.grid, row.inputs), []).append(row.name.removesuffix(_WEIGHT))
    return groups


def _refuse_precision(groups: Mapping[_Kind, Sequence[str]], dtype: str) -> None:
    for (grid, _), modules in groups.items():
        if str(grid) in _SMALL and dtype != "bfloat16":
            raise Refused(
                f"readers decode {grid} to bfloat16, and the rest of this model is {dtype}",
                where=modules[0],
                fix="add dtype=bf16 to the recipe",
            )


def _settings(rows: Sequence[Row], groups: Mapping[_Kind, Sequence[str]], head: int) -> dict[str, Any]:
    """The ``quantization_config``: one group a grid, and the layers that stay dense."""
    modules = [r.name.removesuffix(_WEIGHT) for r in rows if len(r.shape) == 2 and r.role != "embed"]
    chosen = {module for members in groups.values() for module in members}
    ignore = _named([m for m in modules if m not in chosen], modules)
    if "lm_head" not in modules:
        ignore.append("lm_head")  # tied: the module exists, its weight is the embedding's
    made = {}
    for index, ((grid, inputs), members) in enumerate(groups.items()):
        layout, weights = _scheme(grid, inputs)
        made[f"group_{index}"] = {
            "targets": ["Linear"] if len(groups) == 1 else _named(members, modules),
            "weights": weights,
            "input_activations": None if inputs is None else _inputs(inputs),
            "output_activations": None,
            "format": layout,
        }
    layouts = {group["format"] for group in made.values()} or {"dense"}
    caches = [_inputs(_by_head(row.cache, head)) for row in rows if row.cache is not None]
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": made,
        "ignore": ignore,
        "kv_cache_scheme": caches[0] if caches else None,
        "global_compression_ratio": None,
        **online.settings(rows, modules, _named),
    }


def _by_head(cache: InputGrid, head: int) -> InputGrid:
    """A scale for each token's head is one for a group of its channels: by ``token`` the package means all
    tokens of a sequence."""
    return replace(cache, extent="group", group=head) if cache.extent == "token" else cache


def _named(chosen: Sequence[str], everything: Sequence[str]) -> list[str]:
    return [f"re:{text}" if regular else text for text, regular in patterns(chosen, everything)]


def _inputs(inputs: InputGrid) -> dict[str, Any]:
    """The description of inputs."""
    about: dict[str, Any] = {
        "num_bits": inputs.bits,
        "type": "int" if inputs.element == "int" else "float",
        "symmetric": inputs.symmetric,
        "strategy": "tensor_group" if inputs.scaling == "nv" else _EXTENT.get(inputs.extent, inputs.extent),
        "group_size": inputs.group or None,
        "dynamic": "local" if inputs.scaling == "nv" else not inputs.static,
    }
    types = {"mx": "torch.uint8", "nv": "torch.float8_e4m3fn"}
    return about if inputs.scaling == "real" else {**about, "scale_dtype": types[inputs.scaling]}


def _scheme(grid: Grid, inputs: InputGrid | None) -> tuple[str, dict[str, Any]]:
    """Name of the layout, and the description of the weights on it."""
    about: dict[str, Any] = {"symmetric": True, "dynamic": False, "group_size": None, "actorder": None}
    if isinstance(grid, Integer):
        width = {"strategy": "group", "group_size": grid.group} if grid.group else {"strategy": "channel"}
        symmetric = grid.zero == "sym"
        plain = inputs is not None and _is_int8(grid, inputs)
        return "int-quantized" if plain else "pack-quantized", {
            **about,
            "num_bits": grid.bits,
            "type": "int",
            **width,
            "symmetric": symmetric,
        }
    if not isinstance(grid, Minifloat):
        raise ValueError(f"no layout holds {grid}")
    about |= {"num_bits": ELEMENTS[grid.element].bits, "type": "float"}
    if grid.scaling == "nv":
        kind = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        return "nvfp4-pack-quantized", {**about, **kind}
    if grid.scaling == "mx":
        layout = "mxfp8-quantized" if grid.element == "e4m3" else f"{_SMALL[str(grid)]}-pack-quantized"
        return layout, {**about, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    block = {"block_structure": [128, 128]} if grid.scaling == "b128" else {}
    layout = "naive-quantized" if inputs is None else "float-quantized"
    return layout, {**about, "strategy": _STRATEGY[grid.scaling], **block}
