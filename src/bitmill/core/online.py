"""Rotations that stay behind when all that folds is folded: a transform that asks a runtime for them, and
files that can say so.

A runtime multiplies runs of channels by a Hadamard matrix, with ``1 / √order``: those of the inputs of
``down`` (its weight is stored for such inputs), or those of every head of queries and keys, once positions
have been written into them.
"""

from __future__ import annotations

from abc import abstractmethod

from bitmill.core.axes import InputContainer, Transform

DOWN, KEYS = "down", "keys"
"""What a runtime may be asked to rotate: the inputs of ``down``; keys, with the queries they meet."""


class OnlineTransform(Transform):
    """A transform of which a part may be left to the runtime."""

    @abstractmethod
    def online(self, space: str, width: int) -> int:
        """Order of the Hadamard matrix for each run of as many channels of ``space`` (:data:`DOWN`, ``width``
        inputs; :data:`KEYS`, ``width`` channels of a head); 0 for none. It divides ``width``."""


class OnlineContainer(InputContainer):
    """A container whose file can tell a runtime to rotate. ``Row.turn`` is what it then lays out; any other
    container is refused such rows by the plan."""

    @abstractmethod
    def refuses_rotation(self, space: str, order: int) -> str | None:
        """Why no file here says that ``space`` is rotated by a matrix of that order, and what would work; or
        None."""
