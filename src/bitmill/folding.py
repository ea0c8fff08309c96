"""Folding a change of basis exactly into the weights around a seam; the network's function does not change.

With ``h' = h R``: a reader ``W`` becomes ``R.read(W)``, a writer ``R.write(W)``. A norm is a writer that
only takes
diagonals, so an orthogonal map on the residual stream first moves every norm's weight into its readers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.core.axes import Checkpoint, LinearMap, Seam, Transform
from bitmill.families.base import Family, head_dim, traits

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class FixedFold:
    """Maps that are known before the walk, applied to each tensor as it is read.

    Attributes:
        family: the table that says who reads and writes what.
        residual: map of the residual stream, or None.
        value: map of every block's value heads by layer; empty for none.
        tied: whether the source's head is its embedding.
    """

    family: Family
    residual: LinearMap | None
    value: Mapping[int, LinearMap]
    tied: bool

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        return self.residual is None and not self.value

    def source_name(self, name: str) -> str:
        """The source tensor that ``name`` is made from: the embedding, for a rotated tied head."""
        if self.tied and self.residual is not None and self.family.role(name)[0] == "head":
            return f"{self.family.module('embed', None)}.weight"
        return name

    def apply(self, name: str, rows: Tensor, read: Read) -> Tensor:
        """``rows`` of ``name`` (some of them, of an embedding or head) after every fixed map, float32."""
        if self.identity:
            return rows
        stem, _, kind = name.rpartition(".")
        role, layer = self.family.role(f"{stem}.weight")
        rows = rows.float()
        if self.residual is not None:
            rows = self._residual(role, layer, kind, rows, read, self.residual)
        head_map = self.value.get(layer) if layer is not None else None
        if head_map is not None and role == "v":
            rows = head_map.write(rows)
        if head_map is not None and role == "o" and kind == "weight":
            rows = head_map.read(rows)
        return rows

    def _residual(
        self, role: str, layer: int | None, kind: str, rows: Tensor, read: Read, map_: LinearMap
    ) -> Tensor:
        norms = {
            reader: s.writers[0] for s in self.family.seams if s.name.endswith("_in") for reader in s.readers
        }
        norms["head"] = "final_norm"
        if role in norms.values():
            return torch.full_like(rows, 1.0 - self.family.norm_offset)
        if role in norms and kind == "weight":
            norm = read(f"{self.family.module(norms[role], layer)}.weight").float() + self.family.norm_offset
            return map_.read(rows * norm)
        if role == "embed":
            return map_.read(rows)
        if role in ("o", "down"):
            return map_.write(rows)
        return rows


def fixed_fold(family: Family, transforms: Sequence[Transform], source: Checkpoint) -> FixedFold:
    """The maps of ``transforms`` that are known before the walk."""
    residual: LinearMap | None = None
    value: dict[int, LinearMap] = {}
    for transform in transforms:
        if transform.needs != "nothing":
            continue
        for name in transform.seams():
            seam = family.seam(name)
            if seam is None or transform.kind not in seam.allows:
                continue
            if name == "residual":
                residual, _ = transform.fit(seam, None, int(source.config["hidden_size"]), ())
            else:
                for layer in range(traits(source.config)["layers"]):
                    value[layer], _ = transform.fit(seam, layer, head_dim(source.config), ())
    return FixedFold(family, residual, value, tied="lm_head.weight" not in source.tensors)


def fold_diagonal(
    family: Family, seam: Seam, map_: LinearMap, layer: int, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one block that change when ``map_`` is folded at ``seam``: new values by name."""
    changed: dict[str, Tensor] = {}
    for role in seam.writers:
        stem = family.module(role, layer)
        offset = family.norm_offset if role.endswith("norm") else 0.0
        for name in (f"{stem}.weight", f"{stem}.bias"):
            if name in tensors:
                changed[name] = map_.write(tensors[name].float() + offset) - offset
    for role in seam.readers:
        name = f"{family.module(role, layer)}.weight"
        changed[name] = map_.read(tensors[name].float())
    return changed
