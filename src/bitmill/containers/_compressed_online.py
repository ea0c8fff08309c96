"""What a compressed-tensors folder says of rotations while the model runs: ``transform_config``, and the
matrices that its readers do not make themselves.

Groups and locations are the package's: the ``input`` of a linear layer whose weight is stored for such inputs
(``weight_input``, done already). A matrix of an order that is no power of two is stored, once a model, beside
the first layer that uses it, as signs. Queries and keys (``q_attn``, ``k_cache``) are not rotated: the
package then rounds queries as it does keys, and fails where scales are fixed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.safetensors_write import Planned
from bitmill.core.online import DOWN
from bitmill.core.types import Row
from bitmill.numerics import hadamard

WIDEST = 1 << 14
"""Largest order of a matrix that is stored: 512 MiB in bfloat16."""

_LATER = re.compile(r"\.experts\.(?!0\.)\d+\.")

Named = Callable[[Sequence[str], Sequence[str]], list[str]]
"""Targets that name some modules among all."""


def refuses(space: str, order: int) -> str | None:
    """Why ``space`` cannot be rotated by a matrix of that order, or None."""
    if space != DOWN:
        return "its package rounds rotated queries, too, and vLLM rotates none; > bitmill says it"
    if order & (order - 1) and order > WIDEST:
        return f"a matrix of order {order} would be stored; say block=128, or write > bitmill"
    return None


def matrix(row: Row) -> dict[str, Planned]:
    """Type and dimensions of the matrix that is stored with a row, by name; mostly there is none."""
    if not row.turn or row.cache is not None or row.turn & (row.turn - 1) == 0:
        return {}
    if row.layer != 0 or _LATER.search(row.name):
        return {}
    name = f"{row.name.removesuffix('.weight')}.{_down(row.turn)}_input.weight"
    return {name: ("BF16", (row.turn, row.turn))}


def signs(row: Row) -> Tensor:
    """The matrix without its factor, as it is stored."""
    return hadamard.matrix(row.turn).to(torch.bfloat16)


def settings(rows: Sequence[Row], modules: Sequence[str], named: Named) -> dict[str, Any]:
    """``transform_config``, where anything is rotated; empty where nothing is.

    Args:
        modules: paths of all linear layers.
    """
    groups: dict[str, dict[str, Any]] = {}
    linears: dict[int, list[str]] = {}
    for row in rows:
        if row.turn and row.cache is None:
            linears.setdefault(row.turn, []).append(row.name.removesuffix(".weight"))
    for order, chosen in linears.items():
        targets = named(chosen, modules)
        places = [_place("input", targets), _place("weight_input", targets, inverse=True)]
        groups[_down(order)] = _group(order, places)
    return {"transform_config": {"config_groups": groups}} if groups else {}


def _down(order: int) -> str:
    return f"R4_{order}"


def _group(order: int, apply: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "hadamard" if order & (order - 1) == 0 else "random-hadamard",
        "apply": apply,
        "randomize": False,
        "requires_grad": False,
        "head_dim": order,
        "precision": "torch.float32",
    }


def _place(location: str, targets: list[str], *, inverse: bool = False) -> dict[str, Any]:
    return {"targets": targets, "location": location, "inverse": inverse, "ignore": []}
