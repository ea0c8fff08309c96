"""Two files measured on the same positions: whether their difference is more than chance.

The difference of mean KLD by a paired bootstrap over windows (far tighter than two intervals side by side),
and McNemar's test (1947) on the positions where only one of them still predicts the true token: exact while
they are few.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitmill.core.errors import Refused
from bitmill.measurement.logits import Bootstrap, Ids
from bitmill.measurement.record import Record

EXACT = 1000  # discordant positions up to which the binomial is summed


@dataclass(frozen=True)
class Comparison:
    """``first`` against ``second``: negative differences favour the first.

    Attributes:
        tokens: positions that are finite in both.
        kld_difference, ci95: mean KLD of the first less that of the second, and its 95 % interval.
        only_first, only_second: positions where one alone predicts the true token.
        mcnemar_p: two-sided probability of so uneven a split by chance.
        same_top: share of positions where both prefer the same token.
    """

    first: str
    second: str
    tokens: int
    kld_difference: float
    ci95: tuple[float, float] | None
    only_first: int
    only_second: int
    mcnemar_p: float
    same_top: float

    @property
    def settled(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.ci95 is not None and not self.ci95[0] <= 0.0 <= self.ci95[1]

    @property
    def better(self) -> str | None:
        """The file with the lower mean KLD, when that is settled."""
        if not self.settled:
            return None
        return self.first if self.kld_difference < 0 else self.second

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        interval = None if self.ci95 is None else list(self.ci95)
        return {**vars(self), "ci95": interval, "settled": self.settled, "better": self.better}


def compare(first: Record, second: Record, seed: int = 0) -> Comparison:
    """Compare two measurements of the same positions.

    Raises:
        Refused: they were taken on other text, or against another reference.
    """
    if first.corpus["sha256"] != second.corpus["sha256"] or first.protocol != second.protocol:
        raise Refused(
            "these measurements were taken on different positions", fix="measure both files together"
        )
    if first.reference.digest != second.reference.digest:
        raise Refused("these measurements were taken against different originals", fix="use one original")
    both = first.positions.finite & second.positions.finite
    if not both.any():
        raise Refused("no position is finite in both files")
    a, b = first.positions.kept(both), second.positions.kept(both)
    kinds = list(dict.fromkeys(first.kind_of_window))
    stratum: Ids = np.array([kinds.index(kind) for kind in first.kind_of_window])
    boot = Bootstrap(a.window, stratum, seed)
    only_first, only_second = int((a.right & ~b.right).sum()), int((~a.right & b.right).sum())
    return Comparison(
        first=first.quantized.name,
        second=second.quantized.name,
        tokens=len(a.kld),
        kld_difference=float((a.kld - b.kld).mean()),
        ci95=boot.interval(boot.means(a.kld - b.kld)),
        only_first=only_first,
        only_second=only_second,
        mcnemar_p=mcnemar(only_first, only_second),
        same_top=float((a.top == b.top).mean()),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of a split of discordant pairs under a fair coin; continuity-corrected χ² beyond 1,000 of
    them."""
    total = only_first + only_second
    if not total:
        return 1.0
    if total > EXACT:
        statistic = max(abs(only_first - only_second) - 1, 0) ** 2 / total
        return math.erfc(math.sqrt(statistic / 2))
    fewer = min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)
