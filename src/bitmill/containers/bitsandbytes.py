"""bitsandbytes folders: NF4, FP4 and LLM.int8() as transformers saves them and loads them back, as do vLLM,
PEFT and Unsloth (Dettmers et al., arXiv 2305.14314 and 2208.07339).

Tables of 4 bits are packed two codes a byte, the first in the high half, over the whole weight; what else a
layer needs is a JSON text beside it, with the type it is decoded to: that of what the folder keeps. Integers
of 8 bits stay as they are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.checkpoint.packed_folder import quantization_config
from bitmill.checkpoint.safetensors_write import (
    DENSE_DTYPES,
    Planned,
    bytes_of,
    folder_images,
    model_config,
    to_bytes,
)
from bitmill.containers._bitsandbytes_read import KINDS, NESTED, open_folder
from bitmill.core.axes import Checkpoint, Grid, InputContainer
from bitmill.core.errors import Refused
from bitmill.core.inputs import LOUD, InputGrid, llm_int8_inputs
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES, is_expert
from bitmill.grids.dense import Dense
from bitmill.grids.llm_int8 import LlmInt8
from bitmill.grids.table import Table
from bitmill.numerics.floats import dynamic_map

METHOD = "bitsandbytes"

ROUNDS = llm_int8_inputs()
"""What 8-bit layers that are written here do to their inputs."""

_WEIGHT = ".weight"
_WIDTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_OFFSET = 24  # no number in single precision is longer as text
_LARGEST_OFFSET = "-" + "9" * (_OFFSET - 1)


@final
@dataclass(frozen=True)
class Bitsandbytes(InputContainer):
    """A Hugging Face folder for bitsandbytes 0.46.1 or newer: 4-bit tables, or 8-bit integers."""

    single_file: ClassVar[bool] = False

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return quantization_config(path, METHOD) is not None

    def open(self, path: Path) -> Checkpoint:
        return open_folder(path)

    def refuses(self, grid: Grid, role: str, shape: tuple[int, ...]) -> str | None:
        if isinstance(grid, Dense):
            return None
        if role not in LINEAR_ROLES | {"head"}:
            return f"its readers take only linear layers quantized, not the {role}"
        if isinstance(grid, LlmInt8):
            return grid.refuses(shape)
        if not isinstance(grid, Table) or _kind(grid) is None:
            near = " (llm-int8 is nearest)" if str(grid).startswith("int8-channel") else ""
            return f"it holds nf4 and fp4 tables and llm-int8, not {grid}{near}; > bitmill holds nearly all"
        if grid.width not in _WIDTHS:
            return f"its blocks have {', '.join(map(str, _WIDTHS))} values, not {grid.width}"
        return grid.refuses(shape)

    def refuses_inputs(self, grid: Grid, inputs: InputGrid) -> str | None:
        if isinstance(grid, LlmInt8):
            if inputs == ROUNDS:
                return None
            return f"its 8-bit layers round inputs to {ROUNDS}, and to nothing else; > bitmill holds both"
        return "its 4-bit layers leave inputs as they are; > bitmill holds both"

    def refuses_cache(self, grid: InputGrid) -> str | None:
        return "its readers know no scales of a cache; > compressed-tensors"

    def implied_inputs(self, rows: Sequence[Row]) -> Mapping[str, InputGrid]:
        return {row.name: ROUNDS for row in rows if isinstance(row.grid, LlmInt8)}

    def adapt(self, grid: Grid, dtype: str) -> Grid:
        return grid

    def default_grid(self, dtype: str, role: str) -> str:
        return dtype

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row, source).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder.

        Raises:
            Refused: 4-bit and 8-bit layers together, or experts of a mixture.
        """
        config = model_config(source, rows)
        settings = _settings(rows, config["dtype"])
        if settings:
            config["quantization_config"] = settings
        tensors = {name: planned for row in rows for name, planned in _planned(row, source).items()}
        metadata = {f"bitmill.{key}": text for key, text in notes.items()}
        return folder_images(source, tensors, config, metadata)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        grid, params = row.grid, quantized.params
        if isinstance(grid, Dense):
            return {row.name: to_bytes(quantized.codes)}
        if isinstance(grid, LlmInt8):
            module = row.name.removesuffix(_WEIGHT)
            return {
                row.name: to_bytes(quantized.codes),
                f"{module}.SCB": to_bytes(params["absmax"]),
                f"{module}.weight_format": bytes(1),
            }
        if not isinstance(grid, Table):
            raise ValueError(f"no layout holds {grid}")
        flat = quantized.codes.reshape(-1)
        parts: dict[str, Tensor] = {
            "": flat[0::2] << 4 | flat[1::2],
            ".absmax": params["absmax_code" if grid.double else "absmax"],
            ".quant_map": torch.tensor(grid.levels),
        }
        if grid.double:
            parts |= {".nested_absmax": params["absmax_scale"], ".nested_quant_map": dynamic_map()}
        offset = float(params["absmax_offset"]) if grid.double else 0.0
        text = _state(row, source, repr(offset)).ljust(len(_state(row, source, _LARGEST_OFFSET)))
        return {
            **{row.name + part: to_bytes(value) for part, value in parts.items()},
            f"{row.name}.quant_state.bitsandbytes__{_kind(grid)}": text.encode(),
        }


def _kind(grid: Table) -> str | None:
    """``nf4`` or ``fp4``; None for a table that bitsandbytes does not have."""
    kind = str(grid).partition("-")[0]
    return kind if kind in KINDS else None


def _planned(row: Row, source: Checkpoint) -> dict[str, Planned]:
    grid = row.grid
    if isinstance(grid, Dense):
        return {row.name: (DENSE_DTYPES[str(grid)], row.shape)}
    if not row.name.endswith(_WEIGHT):
        raise Refused(f"only weights of layers can be on {grid}", where=row.name, fix="keep this tensor")
    if isinstance(grid, LlmInt8):
        module = row.name.removesuffix(_WEIGHT)
        return {
            row.name: ("I8", row.shape),
            f"{module}.SCB": ("F32", row.shape[:1]),
            f"{module}.weight_format": ("U8", ()),
        }
    if not isinstance(grid, Table):
        raise ValueError(f"no layout holds {grid}")
    values = row.shape[0] * row.shape[1]
    blocks = values // grid.width
    parts: dict[str, Planned] = {
        "": ("U8", (values // 2, 1)),
        ".absmax": ("U8" if grid.double else "F32", (blocks,)),
        ".quant_map": ("F32", (len(grid.levels),)),
    }
    if grid.double:
        parts |= {".nested_absmax": ("F32", (-(-blocks // NESTED),)), ".nested_quant_map": ("F32", (256,))}
    text = _state(row, source, _LARGEST_OFFSET)
    parts[f".quant_state.bitsandbytes__{_kind(grid)}"] = ("U8", (len(text),))
    return {row.name + part: planned for part, planned in parts.items()}


def _state(row: Row, source: Checkpoint, offset: str) -> str:
    """The JSON text beside a 4-bit weight; ``offset`` is the only part that the plan cannot know, and spaces
    behind the text make up for its length."""
    grid = row.grid
    if not isinstance(grid, Table):
        raise ValueError(f"no layout holds {grid}")
    state: dict[str, Any] = {
        "quant_type": _kind(grid),
        "blocksize": grid.width,
        "dtype": _TORCH_NAMES[row.dtype or source.tensors[row.name].dtype],
        "shape": list(row.shape),
    }
    if not grid.double:
        return json.dumps(state)
    state |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
    return f'{json.dumps(state)[:-1]}, "nested_offset": {offset}}}'


def _settings(rows: Sequence[Row], dtype: str) -> dict[str, Any]:
    """The ``quantization_config``, or nothing when no row is quantized."""
    placed = [row for row in rows if not isinstance(row.grid, Dense)]
    if not placed:
        return {}
    _refuse_what_does_not_load(placed)
    chosen = {row.name.removesuffix(_WEIGHT) for row in placed}
    linear = [r.name.removesuffix(_WEIGHT) for r in rows if len(r.shape) == 2 and r.role != "embed"]
    skipped = [module for module in linear if module not in chosen]
    if "lm_head" not in linear:
        skipped.append("lm_head")  # tied: the module exists, its weight is the embedding's
    eight = isinstance(placed[0].grid, LlmInt8)
    settings: dict[str, Any] = {
        "quant_method": METHOD,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": LOUD,
    }
    if eight:
        return settings
    tables = Counter(row.grid for row in placed if isinstance(row.grid, Table))
    usual = tables.most_common(1)[0][0]  # each layer's own text is what counts
    return {
        **settings,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": _kind(usual),
        "bnb_4bit_use_double_quant": usual.double,
    }


def _refuse_what_does_not_load(placed: Sequence[Row]) -> None:
    first = placed[0]
    for row in placed:
        if isinstance(row.grid, LlmInt8) != isinstance(first.grid, LlmInt8):
            raise Refused(
                f"a bitsandbytes folder is 4-bit or 8-bit, not {first.grid} and {row.grid} together",
                where=row.name,
                fix="one of the two for every role, or > bitmill, which holds several",
            )
        if is_expert(row.name):
            raise Refused(
                "transformers stacks the experts of a block in one tensor, which is no bitsandbytes layer",
                where=row.name,
                fix="> gguf, or > bitmill",
            )
