"""TurboQuant (Zandieh, Daliri, Hadian and Mirrokni, arXiv 2504.19874): a random rotation, after which every
coordinate of a direction has the same known density, and for that density the best levels there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from bitmill.core.caches import CacheCode, CacheMethod, Layout
from bitmill.numerics.cache_channels import learned_order, pieces_code, pieces_layout
from bitmill.numerics.cache_sphere import Sphere

_TEXT = re.compile(r"turboquant-([1-8])(?:\.(25|5|75))?(?:-(prod|nc))?(?:-seed([0-9]{1,6}))?")
_QUARTERS = {None: 0, "25": 1, "5": 2, "75": 3}
_SHARES = {0: "", 1: ".25", 2: ".5", 3: ".75"}
_FEWEST = 3


@final
@dataclass(frozen=True)
class TurboQuantCache(CacheMethod):
    """A length in half precision and ``bits`` a coordinate. A width between two numbers gives one bit more to
    a share of the channels, those that are largest among the first tokens, each part with a rotation and a
    length of its own: half of them for 2.5, and a quarter for 2.25, which is what the paper's example of 32
    channels in 128 comes to.

    Attributes:
        bits: of a coordinate, 1 to 8.
        quarters: how many quarters of the channels have one more.
        variant: ``mse``, the paper's own for squared errors; ``prod``, where one of the bits is a sign of the
            residual's sketch, so that products are unbiased; ``nc``, lengths stored such that the decoded
            vector's is right.
        seed: of the rotation.
    """

    bits: int = 4
    quarters: int = 0
    variant: str = "mse"
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> TurboQuantCache | None:
        """``turboquant-3``, ``turboquant-3.5``, ``turboquant-4-prod``, ``turboquant-2.25-nc-seed7``."""
        found = _TEXT.fullmatch(text)
        if found is None:
            return None
        bits, quarters = int(found[1]), _QUARTERS[found[2]]
        if bits + bool(quarters) > 8:
            return None
        return cls(bits, quarters, found[3] or "mse", int(found[4] or 0))

    @classmethod
    def examples(cls) -> tuple[TurboQuantCache, ...]:
        whole = tuple(cls(bits) for bits in (8, 4, 3, 2, 1))
        return (*whole, cls(3, 2), cls(2, 2), cls(2, 1), cls(4, 0, "prod"), cls(4, 0, "nc"))

    def __str__(self) -> str:
        variant = "" if self.variant == "mse" else f"-{self.variant}"
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"turboquant-{self.bits}{_SHARES[self.quarters]}{variant}{seed}"

    @property
    def window(self) -> int:
        return 0

    def refuses(self, head: int) -> str | None:
        if self.quarters and head % 4:
            return f"a head of {head} numbers has no quarters: turboquant-{self.bits} would go"
        if min(piece.width for piece in self._pieces(head)) < _FEWEST:
            return f"a head of {head} numbers is too small to be rotated in parts"
        return None

    def layout(self, part: str, head: int) -> Layout:
        return pieces_layout(self._pieces(head))

    def learn(self, part: str, x: Tensor) -> dict[str, Tensor]:
        return learned_order(x) if self.quarters else {}

    def code(self, part: str, head: int, learned: Mapping[str, Tensor]) -> CacheCode:
        return pieces_code(self._pieces(head), learned)

    def _pieces(self, head: int) -> list[Sphere]:
        more = head * self.quarters // 4
        corrected, residual = self.variant == "nc", self.variant == "prod"
        widths = ((more, self.bits + 1), (head - more, self.bits))
        return [Sphere(width, bits, self.seed, corrected, residual) for width, bits in widths if width]
