"""Sixteen numbers as one radius and fifteen angles, halved again and again (PolarQuant)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import pi

import torch
from torch import Tensor

from bitmill.core.caches import DirectAngles, Fields
from bitmill.numerics.bits import pack, packed_words, unpack
from bitmill.numerics.cache_sphere import half
from bitmill.numerics.lloyd_max import angle_levels

BLOCK = 16
BITS = (4, 2, 2, 2)
"""Of an angle, by level: between two numbers, and between the radii of two halves."""


def polar_fields(head: int) -> Fields:
    """What is stored of ``head`` numbers."""
    angles = {
        f"angle{level}": (torch.uint8, (packed_words(head >> (level + 1), bits, 8),))
        for level, bits in enumerate(BITS)
    }
    return {**angles, "radius": (torch.float16, (head // BLOCK,))}


def polar_pack(x: Tensor) -> dict[str, Tensor]:
    """Of ``… head`` float32."""
    found: dict[str, Tensor] = {}
    radii = x
    for level, bits in enumerate(BITS):
        first, second = radii[..., 0::2], radii[..., 1::2]
        angle = torch.atan2(second, first)
        if level == 0:
            codes = (angle * (2**bits / (2 * pi))).floor().remainder(2**bits)
        else:
            levels = _levels(level, angle.device)
            codes = torch.bucketize(angle, (levels[1:] + levels[:-1]) / 2)
        found[f"angle{level}"] = pack(codes.to(torch.uint8), bits, 8)
        radii = torch.hypot(first, second)
    return {**found, "radius": half(radii)}


def polar_unpack(fields: Mapping[str, Tensor], head: int) -> Tensor:
    """``… head`` float32."""
    radii = fields["radius"].to(torch.float32)
    for level in reversed(range(len(BITS))):
        codes = unpack(fields[f"angle{level}"], BITS[level], head >> (level + 1))
        angle = _levels(level, codes.device)[codes.to(torch.int32)]
        radii = torch.stack((radii * angle.cos(), radii * angle.sin()), -1).flatten(-2)
    return radii


@lru_cache(maxsize=64)
def polar_direct(head: int) -> DirectAngles:
    """How compiled loops read it."""
    angles = tuple(f"angle{level}" for level in range(len(BITS)))
    levels = tuple(_levels(level, torch.device("cpu")) for level in range(len(BITS)))
    return DirectAngles(angles, "radius", levels, 0, head)


def _levels(level: int, device: torch.device) -> Tensor:
    if level == 0:
        count = 2 ** BITS[0]
        return (torch.arange(count, device=device) + 0.5) * (2 * pi / count)
    return torch.from_numpy(angle_levels(2**level - 1, BITS[level])).to(device, torch.float32)
