"""What shares one type in a container, what it may be, and how a recipe says so: the terms of a budget.

A GGUF file and mlx-lm have one type for all experts of a stack. Servers of compressed-tensors, GPTQ and
AutoRound join queries, keys and values, gate and up, and the experts of a block, and want these alike. In
Bitmill's own folders every matrix is by itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from bitmill.calibrate.damage import IN_32, IN_256
from bitmill.checkpoint.gguf_arch import architecture_of_model
from bitmill.core.axes import Checkpoint
from bitmill.core.errors import Refused
from bitmill.core.experts import stack_of
from bitmill.core.types import Row
from bitmill.families.base import LINEAR_ROLES

MENUS: Mapping[str, tuple[str, ...]] = {
    "gguf": (),
    "bitmill": (),
    "compressed_tensors": ("int4-g128-asym", "int4-g32-asym", "int8-g128-asym"),
    "gptq": ("int2-g64-sym", "int3-g64-sym", "int4-g64-sym", "int8-g64-sym"),
    "auto_round": ("int2-g64-sym", "int3-g64-sym", "int4-g64-sym", "int8-g64-sym"),
    "mlx": tuple(f"int{bits}-g64-bias" for bits in (2, 3, 4, 5, 6, 8)),
}
"""By container: grids to measure where nobody names any; empty for llama.cpp's types, by a tensor's width."""
ALL_OR_NONE = ("gptq", "auto_round", "mlx")
"""Containers where a linear of one block is not left in 16 bits while its like in another is not."""
_STACKED = ("gguf", "mlx")
_ALONE = ("bitmill",)
_FUSED = (
    (re.compile(r"(?<=\.self_attn\.)[qkv]_proj(?=\.)"), "{q_proj|k_proj|v_proj}"),
    (re.compile(r"(?<=\.mlp\.)(?:gate|up)_proj(?=\.)"), "{gate_proj|up_proj}"),
    (re.compile(r"(?<=\.experts\.\{\}\.)(?:gate|up|down)_proj(?=\.)"), "{gate_proj|up_proj|down_proj}"),
    (re.compile(r"(?<=\.experts\.\{\}\.)w[123](?=\.)"), "{w1|w2|w3}"),
)
_BLOCK = re.compile(r"^(blk|model\.layers)\.(\d+)\.(.+)$")
_PLACE = re.compile(r"\\\{(.*?)\\\}")  # as it stands in an escaped name


@dataclass(frozen=True, eq=False)
class Lot:
    """Matrices that have one type.

    Attributes:
        name: of the only one; or of several, with what differs in braces.
        rows: they.
        stored: what a recipe's patterns find them by: llama.cpp's name in GGUF, else ``name``.
    """

    name: str
    rows: tuple[Row, ...]
    stored: str

    @property
    def inside(self) -> bool:
        """Whether these are linears of a block."""
        return self.rows[0].role in LINEAR_ROLES and self.rows[0].layer is not None


def refuse_container(container: str) -> None:
    """Only some containers hold several types that a budget could choose among.

    Raises:
        Refused: this one does not.
    """
    if container not in MENUS:
        raise Refused(
            f"budgets do not choose types for {container.replace('_', '-')}",
            fix=f"one of: {', '.join(name.replace('_', '-') for name in MENUS)}",
        )


def menu(container: str, types: Collection[str] = ()) -> tuple[str, ...]:
    """Grids to measure for ``container`` when ``types`` are asked for; empty for llama.cpp's."""
    usual = MENUS[container] or (*IN_256, *IN_32)
    more = [kind for kind in types if kind not in usual]
    return (*usual, *more) if MENUS[container] or more else ()


def lots_of(rows: Sequence[Row], container: str, source: Checkpoint) -> tuple[Lot, ...]:
    """The matrices of ``rows`` that have one type each in ``container``, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_lot(row.name, container), []).append(row)
    if container != "gguf":
        return tuple(Lot(name, tuple(own), name) for name, own in found.items())
    arch = architecture_of_model(source.config)
    return tuple(Lot(n, tuple(own), arch.gguf_name(own[0].name) or n) for n, own in found.items())


def patterns(chosen: Collection[tuple[Lot, str]]) -> tuple[tuple[str, str], ...]:
    """Patterns that give each lot its type: one for all blocks in which a part has the same."""
    parts: dict[tuple[str, str], list[str]] = {}
    for lot, kind in chosen:
        parts.setdefault((_part(lot.stored), kind), []).append(lot.stored)
    return tuple((_pattern(names), kind) for (_, kind), names in sorted(parts.items()))


def longest_pattern(lot: Lot) -> str:
    """The pattern of a lot that shares it with no other block."""
    return _pattern((lot.stored,))


def _lot(name: str, container: str) -> str:
    if container in _ALONE:
        return name
    name = stack_of(name)
    for fused, together in () if container in _STACKED else _FUSED:
        name = fused.sub(together, name)
    return name


def _part(stored: str) -> str:
    block = _BLOCK.match(stored)
    return stored if block is None else block[3]


def _pattern(names: Sequence[str]) -> str:
    """One pattern for a part of some blocks, in the regular expressions that llama.cpp has too."""
    part = _PLACE.sub(_any, re.escape(_part(names[0])))
    blocks = [block for block in map(_BLOCK.match, names) if block is not None]
    if not blocks:
        return f"^{part}$"
    numbers = [block[2] for block in blocks]
    chosen = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
    return rf"^{re.escape(blocks[0][1])}\.{chosen}\.{part}$"


def _any(place: re.Match[str]) -> str:
    """Numbers, or what stands between bars."""
    return "({})".format(place[1].replace(r"\|", "|")) if place[1] else r"\d+"
