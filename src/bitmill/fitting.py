"""Transforms that learn from moments: fitted at their seams block by block and folded, unless that makes the
block worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitmill.calibrate.stream import Block
from bitmill.core.axes import LinearMap, Seam, Transform
from bitmill.core.registry import parse_grid
from bitmill.core.types import Moments, Note, Problem, Row
from bitmill.families.base import Family, head_dim, traits
from bitmill.folding import fold_diagonal
from bitmill.numerics.linear_maps import Diagonal, SharedDiagonal

FIT_TOKENS = 8192
KEY = "key"
"""The seam between keys and queries, which is fitted on keys as a cache gets them."""
CHECK_TOKENS = 1024


@dataclass(frozen=True)
class Fitting:
    """The fitted transforms of a recipe, on one model.

    Attributes:
        family: who reads and writes what.
        config: the model's; it says which heads are shared.
        transforms: with their names in the recipe.
    """

    family: Family
    config: Mapping[str, Any]
    transforms: tuple[tuple[str, Transform], ...]

    def seam(self, name: str, transform: Transform) -> Seam | None:
        """The seam of that name where this transform folds exactly, or None."""
        seam, facts = self.family.seam(name), traits(self.config)
        if seam is None or transform.kind not in seam.allows:
            return None
        if name == KEY:
            return seam if self.config.get("partial_rotary_factor", 1) == 1 else None
        times = facts["heads"] // max(facts["kv_heads"], 1)
        if not seam.per_head or times == 1:
            return seam
        return replace(seam, shared=(head_dim(self.config), times)) if transform.kind == "diagonal" else None

    def fold(
        self, index: int, rows: Sequence[Row], tensors: dict[str, Tensor], moments: Mapping[str, Moments]
    ) -> tuple[dict[str, Moments], list[Note]]:
        """Fit and fold at every seam; ``tensors`` changes in place.

        Returns:
            Moments of the inputs as they are then, and the gains.
        """
        by_role = {row.role: row for row in rows if row.solved}
        changed, notes = dict(moments), []
        for name, transform in self.transforms:
            for seam_name in transform.seams():
                seam = self.seam(seam_name, transform)
                if seam is not None and seam_name == KEY:
                    notes.append(self._keys(index, name, transform, seam, tensors, changed))
                    continue
                readers = [] if seam is None else [by_role[r] for r in seam.readers if r in by_role]
                if seam is None or len(readers) != len(seam.readers):
                    continue
                problems = [
                    (Problem(row.name, row.role, tensors[row.name], changed[row.name], row.inputs), row.grid)
                    for row in readers
                ]
                map_, gain = transform.fit(seam, index, readers[0].shape[1], problems)
                map_ = _shared(map_, seam)
                tensors.update(fold_diagonal(self.family, seam, map_, index, tensors))
                after = map_.moments(changed[readers[0].name])
                changed.update({row.name: after for row in readers})
                text = f"{name}: error x {gain or 1:.3f}"
                notes.append(Note("transform", f"block {index} {seam_name}", text, gain))
        return changed, notes

    def keys(self, block: Block, hidden: Tensor) -> dict[str, Moments]:
        """The largest key of each channel that this block makes of ``hidden``, rotated by its position;
        nothing where no transform asks."""
        if not any(self.seam(KEY, t) for _, t in self.transforms if KEY in t.seams()):
            return {}
        found: list[Tensor] = []

        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            found.append(keys.detach().abs().amax((0, 2)).float().flatten())
            return keys, values

        path = self.family.module("k", block.index).rpartition(".")[0]
        block.watch_cache(path.removeprefix(block.prefix), see)
        block.run(hidden, max(1, FIT_TOKENS // hidden.shape[1]))
        largest = torch.stack(found).amax(0).cpu()
        tokens = hidden.shape[0] * hidden.shape[1]
        return {f"{path}.keys": Moments(tokens, tokens * largest.square(), absmax=largest)}

    def _keys(
        self,
        index: int,
        name: str,
        transform: Transform,
        seam: Seam,
        tensors: dict[str, Tensor],
        moments: Mapping[str, Moments],
    ) -> Note:
        """Fit and fold between keys and queries: what writes the ones is divided, what writes the others is
        multiplied."""
        head, facts = head_dim(self.config), traits(self.config)
        path = self.family.module("k", index)
        seen = moments[f"{path.rpartition('.')[0]}.keys"]
        largest = seen.square if seen.absmax is None else seen.absmax
        writer, reader = seam.writers[0], seam.readers[0]
        times = facts["heads"] // max(facts["kv_heads"], 1)
        if writer.endswith("norm"):  # one for all heads
            largest, times = largest.reshape(-1, head).amax(0), 1
        weight = tensors[f"{self.family.module(reader, index)}.weight"]
        problem = Problem(path, reader, weight, replace(seen, absmax=largest))
        map_, gain = transform.fit(seam, index, head, [(problem, parse_grid("f32"))])
        scale = map_.read(torch.ones(1, len(largest)))[0]
        wide = scale.reshape(-1, 1, head).expand(-1, times, -1).flatten()
        for role, factor in ((writer, 1 / scale), (reader, wide)):
            offset = self.family.norm_offset if role.endswith("norm") else 0.0
            stem = self.family.module(role, index)
            for tensor in (f"{stem}.weight", f"{stem}.bias"):
                if tensor in tensors:
                    value = tensors[tensor].float() + offset
                    tensors[tensor] = value * (factor if value.dim() == 1 else factor[:, None]) - offset
        return Note("transform", f"block {index} {KEY}", f"{name}: error x {gain or 1:.3f}", gain)

    def sample(self, hidden: Tensor) -> Tensor:
        """Whole windows from everywhere in ``hidden`` (``n T H``), enough to fit on. A transform that learns
        from Gram matrices chooses among few maps; one that learns from extremes needs all there are."""
        if any(transform.needs != "gram" for _, transform in self.transforms):
            return hidden
        return hidden[:: max(1, hidden.shape[0] * hidden.shape[1] // FIT_TOKENS)]

    def gain(
        self,
        block: Block,
        rows: Sequence[Row],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        hidden: Tensor,
    ) -> float:
        """Squared error of the block's output when it is rounded to nearest after the fold, relative to that
        before it; 0 where the transforms are not meant to help the weights alone. ``block`` holds other
        weights afterwards."""
        if any(transform.needs != "gram" for _, transform in self.transforms):
            return 0.0
        few = hidden[: max(1, CHECK_TOKENS // hidden.shape[1])]
        wanted = block.forward(few)
        errors = []
        for tensors in (before, after):
            for row in rows:
                value = tensors[row.name]
                value = row.grid.round(value).dense() if row.solved else value
                block.assign(row.name.removeprefix(block.prefix), value)
            errors.append(float((block.forward(few) - wanted).double().square().sum()))
        return errors[1] / errors[0] if errors[0] > 0 else 1.0


def _shared(map_: LinearMap, seam: Seam) -> LinearMap:
    if seam.shared[1] == 1 or not isinstance(map_, Diagonal):
        return map_
    return SharedDiagonal.of(map_.scale, *seam.shared)
