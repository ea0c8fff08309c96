"""Which tokens the experts of a mixture learn from while a model is calibrated."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bitmill.core.errors import BadRecipe

_TEXT = re.compile(r"(route|all)|(topk|until)=([1-9]\d{0,8})")
_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
SPELLINGS = "route, all, topk=N or until=N"


@dataclass(frozen=True)
class ExpertTokens:
    """``str`` is what a recipe says behind ``experts=``.

    What an expert puts out for tokens that it only learns from is left out of the model's own hidden states.

    Attributes:
        kind: ``route``: those that the router sends it; ``all``: every token; ``topk``: those for which it is
            among the router's first ``count``; ``until``: those that it is sent and, where these are fewer
            than ``count`` in the whole calibration, the next by the router's own score.
        count: of ``topk`` and ``until``.
    """

    kind: str = "route"
    count: int = 0

    def __str__(self) -> str:
        return f"{self.kind}={self.count}" if self.count else self.kind


def expert_of(tensor: str) -> int | None:
    """The number of the expert whose tensor or path in a block this is; None where it is none's."""
    found = _NUMBER.search(tensor)
    return None if found is None else int(found[0])


def stack_of(tensor: str) -> str:
    """A name for all experts' tensors together, with ``{}`` for the number; others' names as they are."""
    return _NUMBER.sub("{}", tensor)


def parse_experts(text: str) -> ExpertTokens:
    """What ``experts=`` says.

    Raises:
        BadRecipe: it is none of the spellings.
    """
    found = _TEXT.fullmatch(text.strip().lower())
    if found is None:
        raise BadRecipe(f"experts={text!r}", fix=f"experts= takes {SPELLINGS}")
    return ExpertTokens(found[1] or found[2], int(found[3] or 0))
