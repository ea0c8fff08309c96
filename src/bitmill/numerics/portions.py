"""How much goes through a model at once while it learns: less where memory runs short, in the same steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, final

import torch

from bitmill.core.errors import Interrupted
from bitmill.core.types import Note

T = TypeVar("T")

_SHORT = (
    "can't allocate memory",  # torch on a CPU, under Linux
    "not enough memory",  # the same, elsewhere
    "out of memory",
    "ALLOC_FAILED",  # cuBLAS, cuDNN
)


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not the memory for what was tried."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


@final
class Portions:
    """The size of a portion, halved for good whenever memory does not suffice for it.

    Args:
        size: to begin with.
        unit: what it counts.

    Attributes:
        size: now.
    """

    def __init__(self, size: int, unit: str) -> None:
        self.size, self._first, self._unit = max(size, 1), max(size, 1), unit

    def through(self, work: Callable[[int], T], whole: int, least: int = 1) -> T:
        """``work(size)``, once more from its beginning with half the size until memory suffices.

        Args:
            work: leaves nothing behind where it fails, and its result is the same for every size, but for the
                order of sums.
            whole: what there is to go through; a larger portion is no other.
            least: the smallest portion there is.

        Raises:
            Interrupted: memory does not suffice for the smallest.
        """
        while True:
            try:
                return work(self.size)
            except (MemoryError, RuntimeError) as error:
                if not is_short_of_memory(error):
                    raise
                if min(self.size, whole) <= least:
                    raise Interrupted(
                        f"memory does not suffice to learn from {least} {self._unit} at once, the least",
                        where=str(error).partition("\n")[0],
                        fix="free some, then run the same command again: it takes over what is finished; or "
                        "start anew with shorter windows",
                    ) from error
            # Out of the handler: until then the error holds what was computed so far.
            self.size = max(min(self.size, whole) // 2, least)
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def notes(self, where: str) -> tuple[Note, ...]:
        """What a report says of it: nothing where memory sufficed."""
        if self.size == self._first:
            return ()
        text = (
            f"memory was short: {self.size} {self._unit} at once instead of {self._first}, in the same steps"
        )
        return (Note("memory", where, text, float(self.size)),)
