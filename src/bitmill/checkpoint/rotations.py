"""Rotations that a compressed-tensors folder has its model apply while it runs, folded back into the weights.

``transform_config`` names groups of rotations and where each is applied. Those of weights (``weight_input``,
``weight_output``) are in the stored values already. An input ``x`` that becomes ``x T`` makes the layer
compute ``x (W Tᵀ)ᵀ``, an output ``y U`` makes it ``x (Uᵀ W)ᵀ``: dense weights that need no rotation. Queries
and keys that are both rotated have the products they had before (SpinQuant, arXiv 2405.16406: R3 and R4;
QuIP#, arXiv 2402.04396).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.checkpoint.safetensors import DENSE, TensorFolder
from bitmill.core.errors import BadFile, Refused
from bitmill.core.types import Basis
from bitmill.numerics.linear_maps import Hadamard

Names = Callable[[Sequence[str], str], bool]
"""Whether a list of targets names a module."""

_FOLDED = ("weight_input", "weight_output")
_PAIR = {"q_attn", "k_cache"}
_TYPES = ("hadamard", "random-hadamard", "random-matrix")
_WIDEST = 1 << 14
_NEAR = 1e-2  # matrices are stored in 16 bits, too


@dataclass(frozen=True)
class Rotation:
    """One rotation while the model runs.

    Attributes:
        group: its name in the file.
        kind: how the matrix was made; Hadamard's are stored without their factor of ``1 / √n``.
        location: ``input`` or ``output`` of a linear layer, or ``q_attn`` for queries and keys alike.
        inverse: whether it is the inverse of the stored matrix.
        width: of a block of channels, or None for all of them.
        targets, ignore: the modules.
        permuted: whether rows and columns of the matrix are permuted.
    """

    group: str
    kind: str
    location: str
    inverse: bool
    width: int | None
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    permuted: bool


def rotations(settings: Mapping[str, Any], path: Path) -> tuple[Rotation, ...]:
    """What ``transform_config`` asks of a model that runs, beyond the stored weights.

    Raises:
        Refused: rotations of anything but linear layers, or of queries without keys.
        BadFile: it is not what such an object must be.
    """
    found, told = [], settings.get("transform_config")
    groups = told.get("config_groups") if isinstance(told, dict) else told
    if not groups:
        return ()
    where = f"{path / 'config.json'}: transform_config"
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise BadFile("config_groups are not groups of rotations", where=where)
    for name, group in groups.items():
        kind, width, applied = group.get("type"), group.get("head_dim"), group.get("apply", [])
        if kind not in _TYPES or not isinstance(applied, list):
            raise Refused(f"a rotation of type {kind!r} cannot be undone here", where=f"{where}: {name}")
        if width is not None and (type(width) is not int or not 0 < width <= _WIDEST):
            raise BadFile(f"head_dim is {width!r}", where=f"{where}: {name}")
        pair: dict[str, Any] = {}
        for one in applied:
            place = one.get("location") if isinstance(one, dict) else None
            lists = [_names(one.get(key, [])) for key in ("targets", "ignore")] if place else []
            if place not in (*_FOLDED, *_PAIR, "input", "output") or None in lists:
                raise BadFile(f"{one!r} says no place of a rotation", where=f"{where}: {name}")
            if place in _PAIR:
                pair[place] = (lists, bool(one.get("inverse")))
            elif place not in _FOLDED:
                targets, ignore = (tuple(listed or ()) for listed in lists)
                if any(t[:1].isupper() and t != "Linear" for t in targets):
                    raise Refused(
                        f"rotations of {', '.join(targets)} while the model runs cannot be undone here",
                        where=f"{where}: {name}",
                        fix="give the original model",
                    )
                permuted = bool(group.get("randomize")) and kind != "random-matrix"
                inverse = bool(one.get("inverse"))
                found.append(Rotation(name, kind, place, inverse, width, targets, ignore, permuted))
        if pair:  # their matrices are in the file, too
            found.append(Rotation(name, kind, "q_attn", False, width, (), (), False))
        whole = kind == "random-matrix"
        if pair and (whole or set(pair) != _PAIR or pair["q_attn"] != pair["k_cache"]):
            raise Refused(
                "queries and keys are rotated in different ways while the model runs",
                where=f"{where}: {name}",
                fix="give the original model",
            )
    return tuple(found)


def _names(found: Any) -> list[str] | None:
    listed = [found] if isinstance(found, str) else found
    return listed if isinstance(listed, list) and all(isinstance(t, str) for t in listed) else None


def is_matrix(name: str, asked: Sequence[Rotation]) -> bool:
    """Whether a stored tensor is a matrix, or its permutation, of one of these rotations' groups."""
    module, _, part = name.rpartition(".")
    group = module.rpartition(".")[2]
    ends = ("input", "output", *_PAIR)
    return part in ("weight", "perm") and any(
        group == f"{rotation.group}_{end}" for rotation in asked for end in ends
    )


def folded(
    folder: TensorFolder, module: str, shape: tuple[int, int], asked: Sequence[Rotation], names: Names
) -> Callable[[Tensor], Tensor] | None:
    """What turns the stored weight of a linear layer into the one of a model that rotates nothing; None where
    it is that already.

    Raises:
        Refused: two rotations of one side, or of an output that has a bias.
        BadFile: a matrix is missing, or does not fit.
    """
    mine = [r for r in asked if names(r.targets, module) and not names(r.ignore, module)]
    if not mine:
        return None
    where = f"{module} in {folder.path}"
    if len({r.location for r in mine}) != len(mine):
        raise Refused("one side of a layer is rotated twice", where=where, fix="give the original model")
    if f"{module}.bias" in folder.records and any(r.location == "output" for r in mine):
        raise Refused(
            "the output of a layer with a bias is rotated", where=where, fix="give the original model"
        )
    sizes = {"input": shape[1], "output": shape[0]}
    wanted = [(r, _record(folder, r, module, sizes[r.location], where)) for r in mine]

    def fold(weight: Tensor) -> Tensor:
        wide = weight.to(torch.float64)
        for rotation, record in wanted:
            turn = _matrix(folder, rotation, record)
            if rotation.location == "input":
                wide = (wide.unflatten(-1, (-1, len(turn))) @ turn.T).flatten(-2)
            else:
                wide = (turn.T @ wide.unflatten(0, (-1, len(turn)))).flatten(0, 1)
        return wide.to(torch.float32)

    return fold


def basis_of_inputs(
    folder: TensorFolder, module: str, columns: int, asked: Sequence[Rotation], names: Names
) -> Callable[[], Basis] | None:
    """What a layer's inputs are multiplied by before they are rounded, read when it is asked for; None where
    only its outputs are rotated.

    Raises:
        Refused: the matrix need not be orthogonal, so that there is no rounding in another basis.
        BadFile: it is missing or does not fit; when it is read, it is not orthogonal.
    """
    mine = [r for r in asked if names(r.targets, module) and not names(r.ignore, module)]
    rotation = next((r for r in mine if r.location == "input"), None)
    if rotation is None:
        return None
    where = f"{module} in {folder.path}"
    if rotation.kind == "random-matrix":
        raise Refused(
            "its inputs are rounded in a basis that is not orthogonal, which is not simulated here",
            where=where,
            fix="give the original model",
        )
    return partial(_orthogonal, folder, rotation, _record(folder, rotation, module, columns, where))


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The same orthogonal matrix for each run of channels."""

    matrix: Tensor

    def turn(self, rows: Tensor) -> Tensor:
        return self._times(rows, self.matrix)

    def turn_back(self, rows: Tensor) -> Tensor:
        return self._times(rows, self.matrix.T)

    def _times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        matrix = matrix.to(rows.device, rows.dtype)
        return (rows.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


@lru_cache(maxsize=4)
def _orthogonal(folder: TensorFolder, rotation: Rotation, record: tuple[str, int]) -> Basis:
    """The matrix in float32; the last few are kept, which most layers of a model share."""
    name, width = record
    if not name and not rotation.permuted:  # symmetric, and its own inverse
        return Hadamard.plain(width)
    turn = _matrix(folder, rotation, record)
    if not torch.allclose(turn @ turn.T, torch.eye(len(turn), dtype=turn.dtype), atol=_NEAR):
        raise BadFile(
            f"the rotation {record[0] or rotation.group!r} is not orthogonal", where=str(folder.path)
        )
    return _Blocks(turn.to(torch.float32))


def _record(folder: TensorFolder, rotation: Rotation, module: str, size: int, where: str) -> tuple[str, int]:
    """Where the matrix of a rotation is stored (beside another layer, where several share one; empty where it
    can be computed) and its width.

    Raises:
        BadFile: it is not there, or of another size.
    """
    width = rotation.width or size
    end = f".{rotation.group}_{rotation.location}.weight"
    known = [
        n
        for n, r in folder.records.items()
        if n.endswith(".weight") and is_matrix(n, (rotation,)) and r.shape == (width, width)
    ]
    own = [n for n in known if n == f"{module}{end}"]
    name = next(iter(own if rotation.kind == "random-matrix" else (*own, *known)), "")
    plain = rotation.kind == "hadamard" and not rotation.permuted and width & (width - 1) == 0
    if size % width or width > _WIDEST or (not name and not plain):
        raise BadFile(f"the rotation {end[1:]} of {size} channels has no matrix that fits", where=where)
    if name and folder.record(name).dtype not in (*DENSE, "F64"):
        raise BadFile(f"{name!r} is {folder.record(name).dtype}, and no matrix", where=where)
    if rotation.permuted and f"{name.removesuffix('weight')}perm" not in folder.records:
        raise BadFile(f"{name!r} has no permutation beside it", where=where)
    return name, width


def _matrix(folder: TensorFolder, rotation: Rotation, record: tuple[str, int]) -> Tensor:
    """``T`` in float64, so that a row vector becomes ``x T``."""
    name, width = record
    turn = folder.read(name).to(torch.float64) if name else _sylvester(width)
    if rotation.permuted:
        order = folder.read(f"{name.removesuffix('weight')}perm").to(torch.int64)
        if not torch.equal(order.sort().values, torch.arange(width)):
            raise BadFile(f"the permutation of {name!r} is none", where=str(folder.path))
        turn = turn[order][:, order]
    if rotation.kind == "random-matrix":  # an inverse is stored as such
        return turn
    turn = turn / width**0.5
    return turn.T if rotation.inverse else turn


def _sylvester(order: int) -> Tensor:
    """Signs ``order order`` of the matrix that a power of two has without being stored."""
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < order:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), signs)
    return signs
