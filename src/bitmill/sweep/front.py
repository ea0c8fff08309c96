"""Which of several files to take: those that nothing beats in both size and loss, and where more bytes stop
paying.

The front is Pareto's. Its knee is the point farthest below the straight line between its ends, sizes as they
are and losses as logarithms (Satopää et al., "Finding a 'Kneedle' in a Haystack", 2011, without smoothing).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]
Difference = Callable[[str, str], Interval | None]
_SMALLEST_KNEE = 3  # points of a front with a knee


@dataclass(frozen=True)
class Point:
    """One file: its size, and its mean KL divergence in nats a token."""

    name: str
    bytes_: int
    kld: float


@dataclass(frozen=True)
class Standing:
    """How one file stands among the others.

    Attributes:
        front: nothing is both as small and as good.
        knee: where more bytes stop paying.
        beaten_by: what is no larger and loses less, or loses no more and is smaller; of several, what loses
            least.
        settled: whether its lower loss is more than chance, by the paired interval; None without one.
    """

    front: bool
    knee: bool = False
    beaten_by: str | None = None
    settled: bool | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))


def standings(points: Sequence[Point], difference: Difference = lambda *_: None) -> Mapping[str, Standing]:
    """Where each point stands.

    Args:
        difference: the 95 % interval of the first's mean loss less the second's, over the same positions;
            None where there is none.
    """
    found: dict[str, Standing] = {}
    for point in points:
        better = [other for other in points if _beats(other, point)]
        if not better:
            found[point.name] = Standing(front=True)
            continue
        best = min(better, key=lambda other: (other.kld, other.bytes_))
        interval = difference(point.name, best.name)
        settled = None if interval is None else interval[0] > 0
        found[point.name] = Standing(False, beaten_by=best.name, settled=settled)
    front = sorted((p for p in points if found[p.name].front), key=lambda p: p.bytes_)
    knee = _knee(front)
    if knee is not None:
        found[knee.name] = Standing(front=True, knee=True)
    return found


def largest_within(points: Sequence[Point], budget: int) -> Point | None:
    """What loses least of all that is at most ``budget`` bytes."""
    return min((p for p in points if p.bytes_ <= budget), key=lambda p: (p.kld, p.bytes_), default=None)


def _beats(one: Point, other: Point) -> bool:
    no_worse = one.bytes_ <= other.bytes_ and one.kld <= other.kld
    return no_worse and (one.bytes_ < other.bytes_ or one.kld < other.kld)


def _knee(front: Sequence[Point]) -> Point | None:
    """The knee of a front in order of size; None where it has too few points, or bends nowhere."""
    if len(front) < _SMALLEST_KNEE or min(p.kld for p in front) <= 0:
        return None
    first, last = front[0], front[-1]
    drop = math.log(first.kld / last.kld)
    depths = {
        p.name: math.log(first.kld / p.kld) / drop - (p.bytes_ - first.bytes_) / (last.bytes_ - first.bytes_)
        for p in front
    }
    deepest = max(front, key=lambda p: depths[p.name])
    return deepest if depths[deepest.name] > 0 else None
