"""AutoRound folders: what Intel's auto-round writes and vLLM, SGLang and transformers load with it.

The words are GPTQ's or AWQ's, without an index of groups, and every layer may have bits and groups of its
own (Cheng et al., arXiv 2309.05516). It names a layout, whichever solver filled it. Written are symmetric
integers, as ``auto_round:auto_gptq``, which every reader has a kernel for; all packings of integers are read.
Experts of a mixture are stored one by one; the plan says who is known to take those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from bitmill.checkpoint.hf_folder import read_config
from bitmill.checkpoint.packed_folder import PackedFolder, quantization_config
from bitmill.checkpoint.safetensors import TensorFolder
from bitmill.checkpoint.safetensors_write import (
    Planned,
    bytes_of,
    quantized_folder,
)
from bitmill.checkpoint.word_layout import (
    AWQ_GEMM,
    GPTQ_V1,
    GPTQ_V2,
    Said,
    group_said,
    open_words,
    packed_row,
    planned_row,
)
from bitmill.core.axes import Checkpoint, Container, Grid
from bitmill.core.errors import Refused
from bitmill.core.types import FileImage, Quantized, Row
from bitmill.families.base import LINEAR_ROLES
from bitmill.grids.dense import Dense
from bitmill.grids.integer import Integer, bits_and_group, integers

METHOD = "auto-round"

_BITS = (2, 3, 4, 8)
_GROUPS = (0, 16, 32, 64, 128, 256, 512, 1024)
_WEIGHT = ".weight"
_PACKING = "auto_round:auto_gptq"
_WRITTEN = replace(GPTQ_V1, indexed=False)
_READ = {
    **dict.fromkeys((_PACKING, "auto_round:gptq", "auto_gptq", "gptq"), (GPTQ_V1, _BITS)),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), (GPTQ_V2, _BITS)),
    **dict.fromkeys(("auto_round:auto_awq", "auto_round:awq", "auto_awq", "awq"), (AWQ_GEMM, (4,))),
}


@final
@dataclass(frozen=True)
class AutoRound(Container):
    """A Hugging Face folder whose layers may each have a symmetric integer grid of their own."""

    single_file: ClassVar[bool] = False

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
        if grid.zero != "sym":
            return "its kernels for this packing take symmetric grids only: say -sym, or > gptq, > awq"
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
        """Scales are half precision."""
        return replace(grid, scale="f16") if isinstance(grid, Integer) and grid.zero == "sym" else grid

    def default_grid(self, dtype: str, role: str) -> str:
        """Kernels compute in 16 bits."""
        return "bf16" if dtype == "bf16" else "f16"

    def slots(self, row: Row, source: Checkpoint) -> Mapping[str, int]:
        return {name: bytes_of(planned) for name, planned in _planned(row).items()}

    def files(
        self, rows: Sequence[Row], source: Checkpoint, notes: Mapping[str, str]
    ) -> tuple[FileImage, ...]:
        """The whole folder."""
        return quantized_folder(source, rows, _planned, _settings(rows), notes)

    def pack(self, row: Row, quantized: Quantized, source: Checkpoint) -> Mapping[str, bytes]:
        return packed_row(_WRITTEN, row, quantized, bits_and_group(row.grid))


def _planned(row: Row) -> dict[str, Planned]:
    return planned_row(_WRITTEN, row, bits_and_group(row.grid))


def _settings(rows: Sequence[Row]) -> dict[str, Any]:
    """The ``quantization_config``: the commonest grid, and every layer of a block with another or none."""
    grids = Counter(row.grid for row in rows if isinstance(row.grid, Integer))
    if not grids:
        return {}
    common = grids.most_common(1)[0][0]
    extra: dict[str, dict[str, Any]] = {}
    for row in rows:
        module = row.name.removesuffix(_WEIGHT)
        if isinstance(row.grid, Integer) and row.grid != common:
            extra[module] = _said(row.grid)
        elif isinstance(row.grid, Dense) and row.layer is not None and len(row.shape) == 2:
            extra[module] = {"bits": 16, "data_type": "float"}
    blocks = sorted({row.name.split(".layers.", 1)[0] + ".layers" for row in rows if row.layer is not None})
    settings: dict[str, Any] = {
        "quant_method": METHOD,
        "packing_format": _PACKING,
        **(_said(common) if isinstance(common, Integer) else {}),
        "block_name_to_quantize": ",".join(blocks),
    }
    return {**settings, "extra_config": extra} if extra else settings


def _said(grid: Integer) -> dict[str, Any]:
    return {
        "bits": grid.bits,
        "group_size": grid.group or -1,
        "sym": True,
        "data_type": "int",
    }


def _open(path: Path) -> PackedFolder:
    folder, config = TensorFolder(path), read_config(path)
    settings, where = config["quantization_config"], str(path / "config.json")
    bits, packing = settings.get("bits"), settings.get("packing_format", settings.get("backend"))
    found = _READ.get(packing) if isinstance(packing, str) else None
    wide = settings.get("act_bits") in (None, 16, 32) and settings.get("data_type", "int") == "int"
    if found is None or type(bits) is not int or bits not in found[1] or not wide:
        raise Refused(
            f"AutoRound weights of {bits!r} bits packed as {packing!r} cannot be read here",
            where=where,
            fix=f"give the original model, or integers packed as one of: {', '.join(_READ)}",
        )
    if settings.get("model_free") and found[0] is GPTQ_V2 and not settings.get("sym", True):
        raise Refused(
            "auto-round's model-free mode stores these zero points minus one and says otherwise",
            where=where,
            fix="make the folder with disable_model_free=True, or give the original model",
        )
    said = Said(bits, group_said(settings, where), found[1], bool(settings.get("extra_config")))
    return PackedFolder(folder, config, open_words(folder, found[0], said, integers))
