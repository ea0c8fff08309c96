"""Adam (Kingma and Ba, arXiv 1412.6980), on tensors by name, with a state that can be kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FIRST, SECOND = 0.9, 0.99  # how much of the mean gradient, and of the mean square, each step keeps
TINY = 1e-12  # gradients by single scales are small


@dataclass(frozen=True, eq=False)
class Adam:
    """Means of gradients and of their squares, after ``steps`` of them."""

    steps: int
    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Adam:
        """Before the first step."""
        zeros = {name: torch.zeros_like(value) for name, value in tensors.items()}
        return cls(0, zeros, dict(zeros))

    def seen(self, gradients: Mapping[str, Tensor]) -> Adam:
        """After one more gradient; tensors without one this time stay as they are."""
        mean, square = dict(self.mean), dict(self.square)
        for name, gradient in gradients.items():
            mean[name] = mean[name] * FIRST + gradient * (1 - FIRST)
            square[name] = square[name] * SECOND + gradient.square() * (1 - SECOND)
        return replace(self, steps=self.steps + 1, mean=mean, square=square)

    def direction(self, name: str) -> Tensor:
        """Where to move ``name`` from, in about ±1."""
        mean = self.mean[name] / (1 - FIRST**self.steps)
        square = self.square[name] / (1 - SECOND**self.steps)
        return mean / (square.sqrt() + TINY)
