"""Bases in which keys and values are stored: orthonormal, seeded, the same on every machine."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from bitmill.numerics.hadamard import largest_factor, matrix


@cache
def hadamard_basis(width: int) -> Tensor:
    """Hadamard's matrix of the largest order that divides ``width``, on the diagonal as often as it goes:
    orthonormal, ``width width`` float32. Not to be written into."""
    order = largest_factor(width)
    whole = torch.kron(torch.eye(width // order, dtype=torch.float64), matrix(order) / order**0.5)
    return whole.to(torch.float32)


@lru_cache(maxsize=32)
def random_basis(width: int, seed: int) -> Tensor:
    """A rotation or reflection drawn evenly from all of them, ``width width`` float32: the orthogonal factor
    of a matrix of normal numbers whose triangular factor has a positive diagonal. Not to be written into."""
    drawn = np.random.default_rng((seed, width)).standard_normal((width, width))
    q, r = np.linalg.qr(drawn)
    return torch.from_numpy(q * np.sign(np.diagonal(r))).to(torch.float32)


@lru_cache(maxsize=32)
def sketch(rows: int, width: int, seed: int) -> Tensor:
    """Independent standard normal numbers, ``rows width`` float32. Not to be written into."""
    drawn = np.random.default_rng((seed, width, rows)).standard_normal((rows, width))
    return torch.from_numpy(drawn).to(torch.float32)
