"""Transforms that learn their rotations from what the whole model does, and what they are given for it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitmill.core.online import OnlineTransform
from bitmill.core.schooling import Schooling


@dataclass(frozen=True, eq=False)
class RotationTask:
    """A model whose weights are as they were, whose inputs and cache are rounded, and the places where a
    rotation may be put before that.

    Attributes:
        widths: channels of each place, by name: ``residual``, and ``value.3`` for the heads of block 3.
        schooling: by the loss under rotations (blocks ``m n n``, float64); derivatives are by their entries.
    """

    widths: Mapping[str, int]
    schooling: Schooling


@dataclass(frozen=True, eq=False)
class Learned:
    """What came of a :class:`RotationTask`.

    Attributes:
        rotations: blocks ``m n n`` by place, float64.
        facts: for the report: ``first`` and ``last`` loss of the judge, whether the start was ``kept``,
            ``trace``, ``off`` (the farthest that any was from being orthogonal).
    """

    rotations: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class LearnedTransform(OnlineTransform):
    """A transform that learns before the walk, on weights that are not rounded; :meth:`Transform.fit` is what
    it starts from."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Steps of learning."""

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Windows that go through the model in a step."""

    @property
    @abstractmethod
    def distils(self) -> bool:
        """Whether the loss is the divergence from the original model, rather than the surprise at the
        text."""

    @abstractmethod
    def learn(self, task: RotationTask) -> Learned:
        """Learn."""
