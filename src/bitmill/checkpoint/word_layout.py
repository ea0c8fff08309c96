"""Integers in 32-bit words under half-precision scales, inputs by outputs: GPTQ and AWQ folders.

A weight ``out in`` is three tensors: ``qweight`` (codes), ``qzeros`` and ``scales``, both ``groups out``.
GPTQ packs codes down the inputs and stores each input's group in ``g_idx``; AWQ packs them across the
outputs, eight to a word, the even ones before the odd ones. Both pack zero points across the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitmill.checkpoint.packed_folder import Packed, check_parts
from bitmill.checkpoint.safetensors import DENSE, TensorFolder
from bitmill.checkpoint.safetensors_write import DENSE_DTYPES, Planned, exactly, to_bytes
from bitmill.core.axes import Grid
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Quantized, Row
from bitmill.numerics.bits import pack, packed_words, unpack

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs stands in each nibble of an AWQ word
_WEIGHT = ".weight"
_CODES = ".qweight"

Hold = Callable[[Tensor, Tensor, Tensor, int, str], Quantized]
"""Codes ``out in``, scales and zero points ``out groups``, bits, the scales' precision: what they make."""


@dataclass(frozen=True)
class WordLayout:
    """Where the words run, and what a zero point is stored as.

    Attributes:
        across: whether codes are packed across the outputs in AWQ's order; else down the inputs.
        less: what is taken off a zero point before it is stored; what falls below 0 wraps around.
        indexed: whether ``g_idx`` is written. It is read wherever it stands.
    """

    across: bool
    less: int
    indexed: bool


GPTQ_V1 = WordLayout(across=False, less=1, indexed=True)
GPTQ_V2 = WordLayout(across=False, less=0, indexed=True)
AWQ_GEMM = WordLayout(across=True, less=0, indexed=False)


@dataclass(frozen=True)
class Said:
    """What a folder's settings say of its weights.

    Attributes:
        bits: of a code.
        group: inputs that share a scale; -1 is all of them.
        widths: bits that this layout can have.
        varied: whether single layers may differ; each must then show it by its shapes.
    """

    bits: int
    group: int
    widths: tuple[int, ...]
    varied: bool = False


def planned_words(
    layout: WordLayout, name: str, shape: tuple[int, ...], bits: int, group: int
) -> dict[str, Planned]:
    """Stored tensors of the weight ``name``; a ``group`` of 0 is a whole row."""
    if not name.endswith(_WEIGHT) or len(shape) != 2:
        raise Refused("only weights of layers can be quantized", where=name, fix="keep this tensor")
    out, columns = shape
    groups = columns // (group or columns)
    codes = (columns, out * bits // 32) if layout.across else (columns * bits // 32, out)
    parts: dict[str, Planned] = {
        "qweight": ("I32", codes),
        "qzeros": ("I32", (groups, out * bits // 32)),
        "scales": ("F16", (groups, out)),
    }
    if layout.indexed:
        parts["g_idx"] = ("I32", (columns,))
    return {f"{name.removesuffix(_WEIGHT)}.{part}": planned for part, planned in parts.items()}


def words_of(layout: WordLayout, name: str, quantized: Quantized, bits: int, group: int) -> dict[str, Tensor]:
    """The stored tensors themselves; a symmetric grid has its zero points in the middle.

    Raises:
        ValueError: a scale or a zero point cannot be stored: the grid was not adapted.
    """
    scale, columns = quantized.params["scale"], quantized.shape[1]
    middle = torch.full_like(scale, 2 ** (bits - 1))
    zero = exactly(quantized.params.get("zero", middle) - layout.less, torch.uint8).T.contiguous()
    if layout.across:
        codes, zero = pack(_shuffled(quantized.codes.T), bits), _shuffled(zero)
    else:
        codes = pack(quantized.codes, bits).T
    parts = {"qweight": codes, "qzeros": pack(zero, bits), "scales": exactly(scale, torch.float16).T}
    if layout.indexed:
        parts["g_idx"] = torch.arange(columns, dtype=torch.int32) // (group or columns)
    return {f"{name.removesuffix(_WEIGHT)}.{part}": value for part, value in parts.items()}


def planned_row(layout: WordLayout, row: Row, size: tuple[int, int] | None) -> dict[str, Planned]:
    """Stored tensors of a row: words of so many bits by groups of so many columns, or dense without these."""
    if size is None:
        return {row.name: (DENSE_DTYPES[str(row.grid)], row.shape)}
    return planned_words(layout, row.name, row.shape, *size)


def packed_row(
    layout: WordLayout, row: Row, quantized: Quantized, size: tuple[int, int] | None
) -> dict[str, bytes]:
    """Bytes of what :func:`planned_row` lists."""
    dense = {row.name: quantized.codes}
    parts = dense if size is None else words_of(layout, row.name, quantized, *size)
    return {name: to_bytes(value) for name, value in parts.items()}


def one_grid(rows: Sequence[Row], kind: str) -> tuple[Grid | None, list[Row]]:
    """The grid of all quantized rows, and these rows; None and nothing when all are dense.

    Raises:
        Refused: they are on several grids.
    """
    placed = [row for row in rows if str(row.grid) not in DENSE_DTYPES]
    for row in placed:
        if row.grid != placed[0].grid:
            raise Refused(
                f"{kind} folder has one grid for all its layers, not {placed[0].grid} and {row.grid}",
                where=row.name,
                fix="one grid for every role; > compressed-tensors, > auto-round and > gptq hold several",
            )
    return (placed[0].grid if placed else None), placed


def open_words(
    folder: TensorFolder, layout: WordLayout, said: Said | Callable[[str], Said], hold: Hold
) -> dict[str, Packed]:
    """Every weight of the folder that is stored in this layout, by name; only headers are read. ``said`` is
    of all layers, or a function of each one's path.

    Raises:
        BadFile: a tensor is missing, or shapes do not fit together or to what the settings say.
    """
    modules = [name.removesuffix(_CODES) for name in folder.records if name.endswith(_CODES)]
    each = {m: said if isinstance(said, Said) else said(m) for m in modules}
    return {f"{m}{_WEIGHT}": _packed(folder, m, layout, each[m], hold) for m in modules}


def _packed(folder: TensorFolder, module: str, layout: WordLayout, said: Said, hold: Hold) -> Packed:
    weight, scales = folder.record(f"{module}{_CODES}"), folder.record(f"{module}.scales")
    zeros = folder.record(f"{module}.qzeros")
    two = all(len(r.shape) == 2 and 0 not in r.shape for r in (weight, scales, zeros))
    if not two or weight.dtype != "I32" or scales.dtype not in DENSE:
        raise BadFile(f"{module!r} is not laid out as packed integers are", where=str(weight.path))
    groups, out = scales.shape
    bits = _bits(said, out, zeros.shape[1])
    if bits is None:
        raise BadFile(
            f"{module}.qzeros has {zeros.shape[1]} words a group, and {out} codes of {said.bits} bits not",
            where=str(weight.path),
        )
    columns = weight.shape[0] if layout.across else weight.shape[0] * 32 // bits
    group, indexed = _group(said, columns, groups), f"{module}.g_idx" in folder.records
    if group is None or (columns % group and not indexed):
        raise BadFile(
            f"{module}.scales has {groups} groups, and {columns} inputs by {said.group} have not",
            where=str(weight.path),
        )
    lying = (columns, packed_words(out, bits)) if layout.across else (packed_words(columns, bits), out)
    wanted: dict[str, Planned] = {
        f"{module}{_CODES}": ("I32", lying),
        f"{module}.qzeros": ("I32", (groups, packed_words(out, bits))),
        f"{module}.scales": (scales.dtype, (groups, out)),
    }
    if indexed:
        wanted[f"{module}.g_idx"] = ("I32", (columns,))
    check_parts(folder, wanted)
    parts = partial(_read, folder, module, layout, bits, (out, columns), group)
    dtype = DENSE[scales.dtype]
    return Packed(
        (out, columns),
        tuple(wanted),
        lambda: _dense(*parts()),
        lambda: _stored(*parts(), group, lambda codes, scale, zero: hold(codes, scale, zero, bits, dtype)),
    )


def _bits(said: Said, out: int, words: int) -> int | None:
    widths = (said.bits, *(said.widths if said.varied else ()))
    return next((bits for bits in widths if packed_words(out, bits) == words), None)


def _group(said: Said, columns: int, groups: int) -> int | None:
    size = columns if said.group == -1 else said.group
    if size > 0 and -(-columns // size) == groups:
        return min(size, columns)
    return columns // groups if said.varied and columns % groups == 0 else None


def _read(
    folder: TensorFolder, module: str, layout: WordLayout, bits: int, shape: tuple[int, int], group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes ``out in``, scales and zero points ``out groups``, the group of each column.

    A file that says version 1, is symmetric, and stores the middle itself is version 2 under the wrong name.
    """
    out, columns = shape
    words = folder.read(f"{module}{_CODES}")
    stored = unpack(folder.read(f"{module}.qzeros"), bits, out)
    if layout.across:
        codes, stored = _unshuffled(unpack(words, bits, out)).T.contiguous(), _unshuffled(stored)
    else:
        codes = unpack(words.T.contiguous(), bits, columns)
    stored = stored.T.to(torch.int32)
    misnamed = layout.less > 0 and bool((stored == 2 ** (bits - 1)).all())
    zero = stored if misnamed else (stored + layout.less) & (2**bits - 1)
    scale = folder.read(f"{module}.scales").to(torch.float32).T.contiguous()
    index = torch.arange(columns, dtype=torch.int32) // group
    if f"{module}.g_idx" in folder.records:
        index = folder.read(f"{module}.g_idx")
    if int(index.min()) < 0 or int(index.max()) >= scale.shape[1]:
        raise BadFile(f"{module}.g_idx points outside the {scale.shape[1]} groups", where=str(folder.path))
    return codes, scale, zero.to(torch.float32).contiguous(), index


def _dense(codes: Tensor, scale: Tensor, zero: Tensor, index: Tensor) -> Tensor:
    chosen = index.to(torch.int64)
    return (codes.to(torch.float32) - zero[:, chosen]) * scale[:, chosen]


def _stored(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    index: Tensor,
    group: int,
    hold: Callable[[Tensor, Tensor, Tensor], Quantized],
) -> Quantized | None:
    """None where groups are not even runs of columns: no grid has that."""
    columns = codes.shape[1]
    in_order = torch.equal(index, torch.arange(columns, dtype=torch.int32) // group)
    return hold(codes, scale, zero) if in_order and columns % group == 0 else None


def _shuffled(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, 8))[..., list(_ORDER)].flatten(-2)


def _unshuffled(codes: Tensor) -> Tensor:
    back = sorted(range(8), key=_ORDER.__getitem__)
    return codes.unflatten(-1, (-1, 8))[..., back].flatten(-2)


def group_said(settings: Mapping[str, object], where: str) -> int:
    """``group_size`` of a folder's settings, -1 for whole rows.

    Raises:
        BadFile: it is neither.
    """
    group = settings.get("group_size", 128)
    if type(group) is not int or not (group == -1 or 0 < group < 1 << 31):
        raise BadFile(f"group_size {group!r} is no number of inputs", where=where)
    return group
