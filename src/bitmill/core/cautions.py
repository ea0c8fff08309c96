"""What a plan says of a well-formed file that its readers get wrong, or were never seen to load."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from bitmill.core.axes import Container
from bitmill.core.errors import Refused
from bitmill.core.types import Row


@dataclass(frozen=True)
class Caution:
    """One such thing.

    Attributes:
        text: a sentence for the plan.
        grave: whether nobody is known to load it, or somebody does and gets other numbers.
        where: the first tensor of which that is true.
        fix: what would work.
    """

    text: str
    grave: bool
    where: str
    fix: str


class CautiousContainer(Container):
    """A container that knows of rows which it can lay out, and which its readers do not take."""

    @abstractmethod
    def cautions(self, rows: Sequence[Row]) -> tuple[Caution, ...]:
        """What to say of these rows, which are all of a plan's."""


def cautions_of(container: Container, rows: Sequence[Row], strict: bool = False) -> tuple[str, ...]:
    """The sentences for a plan.

    Raises:
        Refused: one is grave, and the plan is to be strict.
    """
    found = container.cautions(rows) if isinstance(container, CautiousContainer) else ()
    for caution in found:
        if strict and caution.grave:
            raise Refused(f"--strict: {caution.text}", where=caution.where, fix=caution.fix)
    return tuple(f"{c.text}{'; --strict refuses this' if c.grave else ''}" for c in found)
