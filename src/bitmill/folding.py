"""Folding a change of basis exactly into the weights around a seam; the network's function does not change.

With ``h' = h R``: a reader ``W`` becomes ``R.read(W)``, a writer ``R.write(W)``. A norm is a writer that
only takes
diagonals, so an orthogonal map on the residual stream first moves every norm's weight into its readers. A
final norm of one number for all channels stays, and a head that is the embedding stays that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.core.axes import Checkpoint, LinearMap, Seam, Transform
from bitmill.core.types import TensorFacts
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
        shared: whether it stays so.
        values: rows of a block's value heads: the last ones, where a matrix has queries and keys as well.
    """

    family: Family
    residual: LinearMap | None
    value: Mapping[int, LinearMap]
    tied: bool
    shared: bool
    values: int

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
            before = len(rows) - self.values
            rows = torch.cat([rows[:before], head_map.write(rows[before:])])
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
            kept = self.shared and role == "final_norm"
            return rows if kept else torch.full_like(rows, 1.0 - self.family.norm_offset)
        if role in norms and kind == "weight":
            norm = read(f"{self.family.module(norms[role], layer)}.weight").double() + self.family.norm_offset
            return map_.read(rows.double() * norm)
        if role == "embed":
            return map_.read(rows)
        if role in ("o", "down"):
            return map_.write(rows)
        return rows


Maps = Mapping[str, LinearMap]
"""Learned maps by place: ``residual``, ``value.3``."""


def fixed_fold(
    family: Family, transforms: Sequence[Transform], source: Checkpoint, learned: Maps | None = None
) -> FixedFold:
    """The maps of ``transforms`` that are known before the walk; where some were ``learned``, those."""
    residual: LinearMap | None = None
    value: dict[int, LinearMap] = {}
    known = learned or {}
    for transform in transforms:
        for place, width in places(family, (transform,), source).items():
            name, _, layer = place.partition(".")
            seam, at = family.seam(name), int(layer) if layer else None
            assert seam is not None
            map_ = known[place] if place in known else transform.fit(seam, at, width, ())[0]
            if at is None:
                residual = map_
            else:
                value[at] = map_
    tied = "lm_head.weight" not in source.tensors
    shared = tied and residual is not None and constant_norm(family, source)
    values = traits(source.config)["kv_heads"] * head_dim(source.config) if value else 0
    return FixedFold(family, residual, value, tied, shared, values)


def places(family: Family, transforms: Sequence[Transform], source: Checkpoint) -> dict[str, int]:
    """Where these transforms have maps that are known before the walk, and of how many channels:
    ``residual``, and ``value.3`` for the heads of block 3."""
    found: dict[str, int] = {}
    for transform in transforms:
        for name in transform.seams() if transform.needs == "nothing" else ():
            seam = family.seam(name)
            if seam is None or transform.kind not in seam.allows:
                continue
            if name == "residual":
                found[name] = int(source.config["hidden_size"])
            else:
                head = head_dim(source.config)
                found |= {f"{name}.{layer}": head for layer in range(traits(source.config)["layers"])}
    return found


def rotates(family: Family, transforms: Sequence[Transform]) -> bool:
    """Whether any of these transforms changes the basis of the residual stream."""
    stream = family.seam("residual")
    return stream is not None and any("residual" in t.seams() and t.kind in stream.allows for t in transforms)


def constant_norm(family: Family, source: Checkpoint) -> bool:
    """Whether the final norm multiplies all channels by one number, so that any rotation goes through it."""
    weight = source.read(f"{family.module('final_norm', None)}.weight")
    return bool((weight == weight[0]).all())


def unknown_readers(family: Family, tensors: Mapping[str, TensorFacts]) -> list[str]:
    """Matrices that may read or write the residual stream, and are not said to."""
    stream = family.seam("residual")
    known = {*stream.readers, *stream.writers} if stream is not None else set()
    return [n for n, facts in tensors.items() if len(facts.shape) > 1 and family.role(n)[0] not in known]


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
