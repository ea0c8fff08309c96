"""Which compiled loops read packed caches where."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from bitmill.core.caches import Packed
from bitmill.numerics import cache_kernels


class Loops(Protocol):
    """A module of them; see :mod:`bitmill.numerics.cache_kernels`."""

    def reads(self, direct: tuple[Packed, ...]) -> bool:
        """Whether they can read all of these."""

    def scores(
        self, direct: tuple[Packed, ...], fields: Mapping[str, Tensor], tokens: int, queries: Tensor
    ) -> Tensor:
        """Products of queries with the first tokens."""

    def sums(self, direct: tuple[Packed, ...], fields: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Weighted sums of the first tokens."""


def loops_for(device: torch.device) -> Loops | None:
    """Numba's on a processor; Triton's on an NVIDIA or AMD GPU where there is Triton; None elsewhere."""
    if device.type == "cpu":
        return cast(Loops, cache_kernels)
    if device.type == "cuda" and find_spec("triton") is not None:
        return cast(Loops, import_module("bitmill.numerics.cache_triton"))
    return None
