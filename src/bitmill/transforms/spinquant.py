"""Learned rotations: those of the residual stream (R1) and of each block's value heads (R2) go downhill among
all rotations, in a network whose inputs and cache are rounded and whose weights are not yet (SpinQuant, Liu
et al., arXiv 2405.16406)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from bitmill.core.axes import Grid, LinearMap, Seam
from bitmill.core.errors import Unsolvable
from bitmill.core.online import DOWN
from bitmill.core.rotating import Learned, LearnedTransform, RotationTask
from bitmill.core.types import Problem
from bitmill.numerics import cayley, hadamard
from bitmill.numerics.distilling import windows_of
from bitmill.numerics.linear_maps import Hadamard

CHECKS = 10  # times that progress is made safe
ORTHOGONAL = 1e-5


@final
@dataclass(frozen=True)
class SpinQuant(LearnedTransform):
    """Cayley SGD from random Hadamard rotations, on the loss of the network with rounded inputs and a rounded
    cache; weights are rounded afterwards, by the solver, which then sees them rotated. What was learned is
    kept if it is better than the start on windows of its own.

    Attributes:
        steps: of descent.
        batch: windows a step.
        rate: of descent, which falls to nothing along half a cosine; long steps are cut.
        loss: ``original``, the divergence from the original model (nats a token), or ``text``, the paper's
            surprise at the calibration text.
        r1: the residual stream.
        r2: the value heads.
        r3: queries and keys by a Hadamard matrix, by the runtime: for ``cache=``, which alone it changes.
        r4: the inputs of ``down`` by a Hadamard matrix, by the runtime.
        block: the largest block of R1, and order of R4; 0 for no limit. Blocks are learned each.
        seed: of the signs that it starts from, and of the order of the windows.
    """

    steps: int = 100
    batch: int = 1
    rate: float = 1.5
    loss: str = "original"
    r1: bool = True
    r2: bool = True
    r3: bool = False
    r4: bool = False
    block: int = 0
    seed: int = 0

    needs: ClassVar[str] = "nothing"
    kind: ClassVar[str] = "orthogonal"

    def __post_init__(self) -> None:
        if not (self.r1 or self.r2):
            raise ValueError("r1 and r2 are false: nothing is learned; hadamard has r3 and r4 alone")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"{self.steps} steps of {self.batch} windows teach nothing")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate} goes nowhere")
        if self.loss not in ("original", "text"):
            raise ValueError(f"loss={self.loss} is neither original nor text")
        if self.block < 0 or self.block == 1:
            raise ValueError(f"block={self.block} is no order; 0 is no limit, 128 is usual")

    def seams(self) -> tuple[str, ...]:
        """The residual stream, and every block's value heads."""
        return ("residual",) * self.r1 + ("value",) * self.r2

    def fit(
        self, seam: Seam, layer: int | None, width: int, readers: Sequence[tuple[Problem, Grid]]
    ) -> tuple[LinearMap, float | None]:
        """Where it starts: random signs, then a Hadamard matrix."""
        return self._start(seam.name if layer is None else f"{seam.name}.{layer}", width), None

    def online(self, space: str, width: int) -> int:
        """R4 for the inputs of ``down``, R3 for keys."""
        if not (self.r4 if space == DOWN else self.r3):
            return 0
        return hadamard.largest_factor(width, self.block if space == DOWN else 0)

    @property
    def passes(self) -> int:
        """Steps."""
        return self.steps

    @property
    def at_once(self) -> int:
        """A batch."""
        return self.batch

    @property
    def distils(self) -> bool:
        """Unless it learns from the text."""
        return self.loss == "original"

    def learn(self, task: RotationTask) -> Learned:
        """The last rotations, or the first where those are better on other windows.

        Raises:
            Unsolvable: one is no rotation any more, or the loss is no number.
        """
        school = task.schooling
        start = {name: self._blocks(name, width) for name, width in task.widths.items()}
        now: dict[str, Tensor] = dict(school.state or start)
        facts: dict[str, Any] = dict(school.record)
        if not school.step:
            facts = {"first": school.judge(start), "trace": [], "off": 0.0}
        for step in range(school.step, self.steps):
            loss, gradients = school.lesson(now, windows_of(school.windows, self.batch, step, self.seed))
            rate = self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            now = {name: cayley.stepped(value, gradients[name], rate) for name, value in now.items()}
            self._check(now, loss, step, facts)
            school.tell(step + 1, f"loss {loss:.4f}")
            if (step + 1) % max(1, self.steps // CHECKS) == 0:
                facts["trace"] = [*facts["trace"], [step + 1, loss]]
                if step + 1 < self.steps:
                    school.keep(step + 1, now, facts)
        last = school.judge(now)
        kept = not last < facts["first"]
        return Learned(start if kept else now, {**facts, "last": last, "kept": kept})

    def _check(self, now: Mapping[str, Tensor], loss: float, step: int, facts: dict[str, Any]) -> None:
        off = max(cayley.off(value) for value in now.values())
        facts["off"] = max(facts["off"], off)
        if not (math.isfinite(loss) and off < ORTHOGONAL):
            raise Unsolvable(
                f"after step {step + 1} the loss is {loss:.4g} and a rotation is off by {off:.2g}",
                where=f"spinquant(rate={self.rate:g})",
                fix="a smaller rate",
            )

    def _start(self, place: str, width: int) -> Hadamard:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{place}/{width}".encode()))
        signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
        limit = self.block if place == "residual" else 0
        return Hadamard(signs, hadamard.largest_factor(width, limit))

    def _blocks(self, place: str, width: int) -> Tensor:
        """The blocks of the start, ``m n n``: one where ``width`` has one block, or ``block`` is no limit."""
        map_ = self._start(place, width)
        size = map_.order if self.block and place == "residual" else width
        whole = map_.turn(torch.eye(width, dtype=torch.float64))
        return torch.stack([whole[a : a + size, a : a + size] for a in range(0, width, size)])
