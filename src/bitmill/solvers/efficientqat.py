"""EfficientQAT's first stage, Block-AP: train the weights of a block, and the ends of their ranges, for the
block on its grid to put out what the original's does (Chen et al., arXiv 2407.11062); next comes ``tune``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from bitmill.numerics.adam import Adam
from bitmill.numerics.learned import STEEPEST, Learned
from bitmill.numerics.taught import Move, Rounded, Taught

FLOOR = 0.05  # the rate ends at this part of where it starts


@final
@dataclass(frozen=True)
class EfficientQat(Taught):
    """Adam on all weights of a block, rounded in every step, with rounding taken as the identity.

    Unlike :class:`AutoRound <bitmill.solvers.autoround.AutoRound>` a weight may go as far as the gradient
    takes it, and ranges may grow. What is kept is the state in which windows that did not teach fared best,
    be it the first.

    Attributes:
        steps: of descent; the authors take 4096.
        batch: windows a step.
        rate: how far each weight moves in the first step, in steps of the grid, at most; it falls along half
            a cosine. 0 takes ``3 / steps``, but at most 0.02.
        ranges: whether ranges (scales and zero points) are trained, too.
        amplitude: of the wave whose derivative stands for that of rounding (StableQAT, arXiv 2601.19320; its
            authors take 0.21); 0 takes rounding as the identity.
        half: whether the block is computed in bfloat16 while it learns, where the processor has it, as the
            authors do; what is kept is chosen in float32 either way.
        seed: which windows come when.
    """

    steps: int = 400
    batch: int = 4
    rate: float = 0.0
    ranges: bool = True
    amplitude: float = 0.0
    half: bool = True
    seed: int = 0

    needs: ClassVar[str] = "diagonal"
    lesson: ClassVar[str] = "trained block"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{self.steps} steps of {self.batch} windows teach nothing")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a part of a step from 0 to 1, not {self.rate}")
        if not 0 <= self.amplitude <= STEEPEST:
            raise ValueError(f"amplitude is from 0 to {STEEPEST:.4f}, not {self.amplitude}")

    def mover(self, start: Sequence[Learned]) -> Move:
        """By Adam, on weights and both ends of their ranges."""
        adam = Adam.of({key: v for at, one in enumerate(start) for key, v in _trained(at, one).items()})

        def move(step: int, weights: Sequence[Rounded]) -> list[Learned]:
            nonlocal adam
            slopes: dict[str, Tensor] = {}
            for at, one in enumerate(weights):
                if one.gradient is not None:
                    by = one.learned.slopes(one.gradient, one.value, one.quantized.params, self.amplitude)
                    slopes |= dict(zip(_trained(at, one.learned), by, strict=True))
            adam = adam.seen(slopes)
            return [self._moved(at, one, adam, step) for at, one in enumerate(weights)]

        return move

    def _moved(self, at: int, one: Rounded, adam: Adam, step: int) -> Learned:
        weight, high, low = (adam.direction(key) for key in _trained(at, one.learned))
        if not self.ranges:
            high, low = torch.zeros_like(high), torch.zeros_like(low)
        start = self.rate or min(3 / self.steps, 0.02)
        rate = start * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / self.steps)) / 2)
        return one.learned.trained(weight, high, low, one.quantized.params, rate)


def _trained(at: int, one: Learned) -> dict[str, Tensor]:
    """What is trained of one weight, by name."""
    return {f"{at}.weight": one.weight, f"{at}.high": one.high, f"{at}.low": one.low}
