"""How far each stored tensor is from the original, where it is worst, and how many bits it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitmill.core.axes import Checkpoint, torch_dtype
from bitmill.families.base import LINEAR_ROLES, describe

SEGMENT = 256  # columns of one row: the unit in which the worst places are named
BASIS_CHANGE = 0.02  # a norm this far from the original was not rounded but folded into
_PIECE = 1 << 24  # weights compared at a time
_MATRIX = 2


@dataclass(frozen=True)
class TensorError:
    """One tensor against the original.

    Attributes:
        grid: what it is stored on.
        bits: codes and parameters.
        relative: ‖Ŵ − W‖ / ‖W‖, Frobenius; NaN where a stored value is not a number.
        worst: largest single error, in units of the tensor's root mean square.
        cosine: of the angle between both, as vectors.
        sqnr_db: signal to quantization noise, decibels; infinite for an exact copy.
        place: row and first column of the worst 256 columns of one row, and their relative error.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    grid: str
    bits: int
    relative: float
    worst: float
    cosine: float
    sqnr_db: float
    place: tuple[int, int, float]

    @property
    def bpw(self) -> float:
        """Bits a weight."""
        return self.bits / max(prod(self.shape), 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        row, column, relative = self.place
        return {
            **vars(self),
            "shape": list(self.shape),
            "place": {"row": row, "column": column, "relative": relative},
        }


@dataclass(frozen=True)
class TensorTable:
    """All tensors of a file.

    Attributes:
        rows: one a tensor that both models have, in the reference's order.
        bits: of every stored tensor together.
        parameters: weights of the reference.
        linear_bits, linear_parameters: of the linear layers inside the blocks alone.
        same_basis: whether the weights can be compared: False when norms differ by more than rounding,
            because scales or rotations were folded into the weights.
    """

    rows: tuple[TensorError, ...]
    bits: int
    parameters: int
    linear_bits: int
    linear_parameters: int
    same_basis: bool

    @property
    def bpw(self) -> float:
        """Bits a weight, over all tensors."""
        return self.bits / max(self.parameters, 1)

    @property
    def bpw_linears(self) -> float | None:
        """Bits a weight of the linear layers inside the blocks."""
        return self.linear_bits / self.linear_parameters if self.linear_parameters else None


def tensor_table(
    quantized: Checkpoint, reference: Checkpoint, tell: Callable[[int, int], None] = lambda *_: None
) -> TensorTable:
    """Compare every tensor, one pair in memory at a time.

    Args:
        tell: called with tensors done and in all.
    """
    family = describe(reference.config)
    rows: list[TensorError] = []
    bits = linear_bits = linear_parameters = 0
    names = list(quantized.tensors)
    for done, name in enumerate(names):
        tell(done, len(names))
        role, layer = family.role(name)
        stored = quantized.stored(name)
        facts = quantized.tensors[name]
        grid = facts.dtype if stored is None else str(stored.grid)
        size = prod(facts.shape)
        here = size * torch_dtype(facts.dtype).itemsize * 8 if stored is None else stored.bits
        bits += here
        if layer is not None and role in LINEAR_ROLES and len(facts.shape) == _MATRIX:
            linear_bits += here
            linear_parameters += size
        known = reference.tensors.get(name)
        if known is not None and known.shape == facts.shape:
            ours = quantized.read(name) if stored is None else stored.dense()
            rows.append(
                _compared(name, role, layer, grid, here, ours.reshape(facts.shape), reference.read(name))
            )
    tell(len(names), len(names))
    order = {name: i for i, name in enumerate(reference.tensors)}
    parameters = sum(prod(t.shape) for t in reference.tensors.values())
    norms = [r for r in rows if len(r.shape) == 1 and r.role != "bias"]
    same = all(r.relative < BASIS_CHANGE for r in norms)
    ordered = tuple(sorted(rows, key=lambda r: order[r.name]))
    return TensorTable(ordered, bits, parameters, linear_bits, linear_parameters, same)


def _compared(
    name: str, role: str, layer: int | None, grid: str, bits: int, ours: Tensor, theirs: Tensor
) -> TensorError:
    columns = ours.shape[-1] if ours.dim() > 1 else ours.numel()
    a, b = ours.reshape(-1, columns), theirs.reshape(-1, columns)
    noise = signal = own = dot = peak = 0.0
    place = (0, 0, 0.0)
    step = max(1, _PIECE // max(columns, 1))
    for start in range(0, a.shape[0], step):
        x, w = a[start : start + step].float().contiguous(), b[start : start + step].float().contiguous()
        own += float(torch.dot(x.view(-1), x.view(-1)))
        dot += float(torch.dot(x.view(-1), w.view(-1)))
        x = x - w
        peak = max(peak, float(x.abs().max()))
        wrong, right = _segments(x), _segments(w)
        noise += float(wrong.sum(dtype=torch.float64))
        signal += float(right.sum(dtype=torch.float64))
        row, segment, relative = _worst_place(wrong, right)
        if relative > place[2]:
            place = (start + row, segment * SEGMENT, relative)
    rms = math.sqrt(signal / max(a.numel(), 1))
    return TensorError(
        name=name,
        role=role,
        layer=layer,
        shape=tuple(ours.shape),
        grid=grid,
        bits=bits,
        relative=math.sqrt(noise / signal) if signal else (0.0 if not noise else math.inf),
        worst=peak / rms if rms else 0.0,
        cosine=dot / math.sqrt(own * signal) if own and signal else 1.0,
        sqnr_db=10 * math.log10(signal / noise) if noise and signal else math.inf,
        place=place,
    )


def _segments(x: Tensor) -> Tensor:
    """Sum of squares of each segment of each row."""
    columns = x.shape[1]
    return x.square().view(x.shape[0], -1, SEGMENT if columns % SEGMENT == 0 else columns).sum(-1)


def _worst_place(wrong: Tensor, right: Tensor) -> tuple[int, int, float]:
    """Row, segment and relative error of the worst segment; segments of almost nothing do not count."""
    ratio = torch.where(right > 1e-3 * right.mean(), wrong / right.clamp_min(1e-30), 0.0)
    at = int(ratio.argmax())
    return at // ratio.shape[1], at % ratio.shape[1], math.sqrt(float(ratio.reshape(-1)[at]))
