"""AutoRound: learn where each weight rounds to, and how far each range reaches, from the error of the block's
output, by the sign of its gradient (Cheng et al., arXiv 2309.05516)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from bitmill.numerics.learned import Learned
from bitmill.numerics.taught import Move, Rounded, Taught


@final
@dataclass(frozen=True)
class AutoRound(Taught):
    """Signed gradient descent on the rounding of a whole block at once.

    Every weight may be rounded half a step away from where it is, and each range may shrink at either end.
    What is kept is the state in which windows that did not teach fared best, be it the first: a block is
    never left worse than plain rounding makes it on those.

    Attributes:
        steps: of descent; 50 are a quick try, 1000 the authors' slow setting.
        batch: windows a step.
        rate: how far each offset moves in the first step, in steps of the grid; it falls to nothing over the
            run. 0 takes ``1 / steps``.
        ranges: whether ranges are learned, too.
        half: whether the block is computed in bfloat16 while it learns, where the processor has it, as the
            authors do; what is kept is chosen in float32 either way.
        seed: which windows come when.
    """

    steps: int = 200
    batch: int = 8
    rate: float = 0.0
    ranges: bool = True
    half: bool = True
    seed: int = 0

    needs: ClassVar[str] = "diagonal"
    lesson: ClassVar[str] = "learned rounding"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{self.steps} steps of {self.batch} windows teach nothing")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a part of a step from 0 to 1, not {self.rate}")

    def mover(self, start: Sequence[Learned]) -> Move:
        """Against the gradient's sign, in steps that shrink to nothing."""

        def move(step: int, weights: Sequence[Rounded]) -> list[Learned]:
            rate = (self.rate or 1 / self.steps) * (1 - step / self.steps)
            return [self._moved(one, rate) for one in weights]

        return move

    def _moved(self, one: Rounded, rate: float) -> Learned:
        if one.gradient is None:
            return one.learned
        return one.learned.moved(one.gradient, one.value, one.quantized.params, rate, self.ranges)
