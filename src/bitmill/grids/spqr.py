"""SpQR's weights: groups of sixteen with scales and zero points of three bits, and a few weights apart in
half precision (Dettmers et al., "SpQR", arXiv 2306.03078)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from bitmill.core.sparse import SparseGrid
from bitmill.core.types import Params, Quantized
from bitmill.numerics.outliers import largest, sensitivity
from bitmill.numerics.search import weights_of
from bitmill.numerics.tiles import PARTS, SIDE, decoded, first_order, fit_tiles, half, nearest

_TEXT = re.compile(r"spqr([234])(?:-g16)?(?:-o(\d{1,2}(?:\.\d)?))?(-act)?")
_COLUMNS = 1 << 16
_CHUNK = 1 << 22  # weights decoded at a time


@final
@dataclass(frozen=True)
class Spqr(SparseGrid):
    """Values ``scale · (code - zero)``, scale and zero codes of three bits themselves, and outliers.

    A tile of 16 × 16 has four numbers in half precision: step and zero of its 16 scales, step and zero of its
    16 zero points. An outlier is a number in half precision that is added to what its code says, as the
    kernels do it. How many there are is part of the grid, so that sizes are exact before any weight is read:
    ``o1`` is one weight in a hundred of the matrix, wherever they are needed most. The paper has a threshold
    instead, and as many outliers as exceed it. With ``-act`` groups are of columns alike in importance, and
    the order of columns is stored. Everything is computed in half precision, operation by operation, as
    readers do.

    Codes are uint8 ``out in``. Parameters: ``scale`` and ``zero`` uint8 ``out in/16``; ``scale_step``,
    ``scale_zero``, ``zero_step``, ``zero_zero`` float32 ``out/16 in/16``; ``outlier`` float32 ``out in``, 0
    where there is none; with ``-act``, ``order`` int32 ``1 in``: the columns as groups take them.

    Attributes:
        bits: 2 to 4, of a code.
        outliers: of a thousand weights, 0 to 100.
        act: whether groups are of any columns.
    """

    bits: int = 3
    outliers: int = 10
    act: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise ValueError(f"codes have 2 to 4 bits, not {self.bits}")
        if not 0 <= self.outliers <= 100:
            raise ValueError(f"0 to 100 weights of a thousand are apart, not {self.outliers}")

    @property
    def block(self) -> tuple[int, int]:
        return (SIDE, SIDE)

    @property
    def span(self) -> tuple[int, int]:
        return (1, 1)

    @property
    def ordered(self) -> bool:
        return self.act

    @classmethod
    def parse(cls, text: str) -> Spqr | None:
        """``spqr3-g16-o1``, ``spqr4-g16-o0.5-act``; one outlier in a hundred when left open."""
        found = _TEXT.fullmatch(text)
        if found is None or float(found[2] or 1) > 10:
            return None
        return cls(int(found[1]), round(10 * float(found[2] or 1)), found[3] is not None)

    @classmethod
    def examples(cls) -> tuple[Spqr, ...]:
        return (cls(3), cls(3, 10, True), cls(4, 5), cls(2, 20))

    def __str__(self) -> str:
        return f"spqr{self.bits}-g16-o{self.outliers / 10:g}{'-act' if self.act else ''}"

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 2:
            return f"{self} holds matrices, not a tensor of {len(shape)} dimensions"
        if shape[0] % SIDE or shape[1] % SIDE:
            return f"{shape[0]} rows and {shape[1]} columns are not whole tiles: multiples of {SIDE}"
        if shape[1] > _COLUMNS:
            return f"the column of an outlier has 16 bits: at most {_COLUMNS} columns, not {shape[1]}"
        return None

    def storage_bits(self, shape: tuple[int, int]) -> int:
        """An outlier has 16 bits and its column another 16; a row, 32 bits for where its outliers start."""
        out, columns = shape
        dense = out * columns * self.bits + out * columns // SIDE * 6 + out * columns // SIDE**2 * 64
        sparse = 32 * (out + 1) + 32 * self.apart(shape)
        return dense + sparse + (16 * columns if self.act else 0)

    def apart(self, shape: tuple[int, int]) -> int:
        return -(-shape[0] * shape[1] * self.outliers // 1000)

    def sensitivity(self, w: Tensor, importance: Tensor) -> Tensor:
        return sensitivity(w, importance, SIDE, self.bits)

    def fit_group(self, w: Tensor, apart: Tensor, importance: Tensor | None = None) -> Params:
        u = 1.0 if importance is None else importance.expand_as(w)
        return fit_tiles(w, torch.where(apart, 0.0, u), self.bits, importance is not None)

    def values_of(self, group: Params) -> Tensor:
        scale, zero = first_order(group)
        return decoded(torch.arange(2.0**self.bits, device=scale.device), scale, zero)

    def joined(self, groups: Sequence[Params], added: Tensor, order: Tensor) -> Params:
        params = {name: torch.cat([group[name] for group in groups], 1) for name in ("scale", "zero", *PARTS)}
        params["outlier"] = added
        if self.act:
            params["order"] = order.to(torch.int32)[None]
        return params

    def fit(self, w: Tensor, importance: Tensor | None = None) -> Params:
        """Outliers are the weights whose groups lose most error without them, and groups are fitted to the
        rest: to its extremes by the plain rule, by search with ``importance``; of the two, each with its own
        outliers, the better is kept. With ``-act`` columns go by falling importance, or else by their own
        mean square."""
        w = w.to(torch.float32).contiguous()
        even = torch.ones(1, w.shape[1], device=w.device)
        plain = self._order(w.square().mean(0))
        if importance is None:
            return self._fitted(w, even, even, plain, False)
        u = weights_of(importance, w).contiguous()
        tried = [self._fitted(w, u, u, self._order(u.mean(0)), True)]
        tried.append(self._fitted(w, even, even, plain, False))
        errors = [float((u * (self._nearest(w, p) - w).square()).double().sum()) for p in tried]
        return tried[errors.index(min(errors))]

    def encode(self, w: Tensor, params: Params, at: int = 0) -> Tensor:
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows, scale, zero, outlier in self._columns(params, at, w.shape[1]):
            x = w[rows].to(torch.float32)
            codes[rows] = nearest(x - outlier, scale, zero, 2**self.bits - 1).to(torch.uint8)
        return codes

    def decode(self, codes: Tensor, params: Params, at: int = 0) -> Tensor:
        values = torch.empty(codes.shape, device=codes.device)
        for rows, scale, zero, outlier in self._columns(params, at, codes.shape[1]):
            values[rows] = decoded(codes[rows].to(torch.float32), scale, zero).add_(outlier)
        return values

    def scales(self) -> tuple[str, ...]:
        """None can move: values are rounded after every operation."""
        return ()

    def stored_scale(self, name: str, values: Tensor) -> Tensor:
        raise ValueError(f"{self} has no scale {name!r} in which its values are linear")

    def round(self, w: Tensor, importance: Tensor | None = None) -> Quantized:
        params = self.fit(w, importance)
        return Quantized(self, self.encode(w, params), params, (w.shape[0], w.shape[1]))

    def _order(self, power: Tensor) -> Tensor:
        """Columns by falling power, where the grid may have them in any order."""
        if self.act:
            return power.argsort(descending=True, stable=True)
        return torch.arange(len(power), device=power.device)

    def _fitted(self, w: Tensor, sought: Tensor, u: Tensor, order: Tensor, search: bool) -> Params:
        """Parameters with the outliers that errors weighted by ``sought`` call for."""
        x, counts = w[:, order], u.expand_as(w)[:, order]
        scores = sensitivity(x, sought.expand_as(w)[:, order], SIDE, self.bits)
        mask = largest(scores, self.apart((w.shape[0], w.shape[1])))
        group = fit_tiles(x, torch.where(mask, 0.0, counts), self.bits, search)
        back = order.argsort()
        params = self.joined([group], torch.zeros_like(w), order)
        missed = half((w - self._nearest(w, params)).clamp(-65504, 65504))
        return {**params, "outlier": torch.where(mask[:, back], missed, 0.0)}

    def _nearest(self, w: Tensor, params: Params) -> Tensor:
        return self.decode(self.encode(w, params), params)

    def _columns(
        self, params: Params, at: int, columns: int
    ) -> Sequence[tuple[slice, Tensor, Tensor, Tensor]]:
        """Scales, zero points and outliers of these columns, some rows at a time."""
        scale, zero = first_order(params)
        places = torch.arange(at, at + columns, device=scale.device)
        if self.act:
            places = params["order"][0].to(torch.int64).argsort()[at : at + columns]
        groups, outlier = places // SIDE, params["outlier"][:, at : at + columns]
        count = max(1, _CHUNK // max(columns, 1))
        runs = [slice(a, min(a + count, len(scale))) for a in range(0, len(scale), count)]
        return [(rows, scale[rows][:, groups], zero[rows][:, groups], outlier[rows]) for rows in runs]
