"""Transforms that learn from moments: fitted at their seams block by block and folded, unless that makes the
block worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bitmill.calibrate.stream import Block
from bitmill.core.axes import LinearMap, Seam, Transform
from bitmill.core.types import Moments, Note, Problem, Row
from bitmill.families.base import Family, head_dim, traits
from bitmill.folding import fold_diagonal
from bitmill.numerics.linear_maps import Diagonal, SharedDiagonal

FIT_TOKENS = 8192
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
