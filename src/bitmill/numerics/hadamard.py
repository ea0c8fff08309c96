"""Hadamard matrices by construction: Sylvester (1867), Paley I and II (1933), four circulants (Williamson,
1944; Goethals and Seidel, 1967), and Kronecker products of those. Derived, not pasted: the table below is
four rows of signs an order, and everything else follows from squares in a finite field.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

CIRCULANTS: Mapping[int, tuple[str, str, str, str]] = MappingProxyType(
    {
        92: (
            "-++--+----++++----+--++",
            "+---++-+-++++++-+-++---",
            "+-----+++--++--+++-----",
            "+++-+-+-++-++-++-+-+-++",
        ),
        116: (
            "++-++++----+--++--+----++++-+",
            "++-+++------+-++-+------+++-+",
            "-++--+-+-+----++----+-+-+--++",
            "+++--+++-+-++-++-++-+-+++--++",
        ),
        156: (
            "-+-----++--++++-+---+++-+-+--++--+++++-",
            "-+++-+---+--+-+-+--+-++-+--+++++++-++--",
            "+++-++----+---+-++-+-+++++--++-+++-+--+",
            "++++++---++---+-++-+-+++++-+++-+++-+--+",
        ),
        172: (
            "++--+--+-+-+-++++++--+---++-+++---+++----+-",
            "-+--+--+-+-+-++++++--+---++-+++---+++----+-",
            "-++-+---++-+-+++++---++--+-+----+--++--+-++",
            "++--+----+-+-+++++---+---+---------++----+-",
        ),
        260: (
            "+--++++--+-++-++-+--++++---+-+-+------++-+++-++-+++-++------+-+-+",
            "-++--+-++----+-++-+++---+-+-+---+++-++-+----++-+--+++-+-++++++-+-",
            "-++-++++++-+--+++-+-++------++-+++--++---+---+++-++++---+++-++-++",
            "-+-+++---+---++++---+--+-----+------+-+----+-+--++++++--+---++--+",
        ),
        292: (
            "+++-+---+----+--++-------+++-+-+++++-+-----+-+---+++++++--++-++++-+++-+--",
            "+++-+---+--+---+++---++--+-+--+-++++-+----+-++-+-++--+++---+++-++-+++-+--",
            "-++++++++-+-+-+-+--++--+++-++---+--+-++++-----+-+++---+++----+--+--+--+--",
            "+++-++-++-+---+-+---+----+-++---+--+-+-++--------++---+++----+--+--+--+--",
        ),
        372: (
            "-++++-+-++-+++--+-+---+++-+--+--++-++--+----+++++--+++----+--+-++-+--++-++---++--+-+-+-++++++",
            "+--+-+++--+-+-+----+++-+++--++---+----+++++--++-+++-----++++-+-+--++-+-+---++++-+++-++-+-++++",
            "+++++++++-+-+-+-+--++---++--+---+--+--+-++---+-++++-----+--+----+--+-+++----+---+++----+--+--",
            "+++-++--+-+-----++--++----------+-++-+--++++-+-+-+-----+-+------++-+++++--++---++++-+-++--+--",
        ),
        404: (
            "+----++--+++++++++--++-+-+--++-++-++---+-+--+--+++--+-+--+--+-+-++---+-+----+--++-+--------+++-----++",
            "-+-+-+-++--+++-++---+-++++--++++--+++--+----+---+-+-+++-+-+++---+-+-++++-------++-++++++--++++-+++-+-",
            "+-+-++--+-+-+---+--+--+--++++++++++--+-+++-++++-----+++--+--+-++--++-+++++---+++++---++-+++++---+--+-",
            "+---+++----+-++++++-+-+++-++--++-+-+--+++-+++++-+--+---++-+-++-+++--++++--++-+-+--+--+-----+-++-+++-+",
        ),
    }
)
"""First rows of four circulant matrices A, B, C, D with AAᵀ + BBᵀ + CCᵀ + DDᵀ = order · I, by order: orders
that no other construction here reaches."""

_LARGEST_POWER_OF_TWO = 64
_LARGEST = 512
"""Largest orders that are applied as one dense product; anything above is a Kronecker product."""

_PASS = 32
"""What a factor costs beside its order, in operations a value: a pass over the data."""


@cache
def factors(order: int) -> tuple[int, ...] | None:
    """Orders, each built directly, whose Kronecker product is this one, the cheapest such product;
    None when no construction here reaches it."""
    if order == 1:
        return ()
    known: list[tuple[int, ...]] = [(order,)] if _direct(order) else []
    for part in range(2, min(order, _LARGEST + 1)):
        if order % part == 0 and _direct(part):
            rest = factors(order // part)
            if rest is not None:
                known.append((part, *rest))
    return min(known, key=lambda parts: sum(parts) + _PASS * len(parts), default=None)


def largest_factor(width: int, limit: int = 0) -> int:
    """The largest order that divides ``width`` and can be built: the block of a block-diagonal transform.

    Args:
        limit: of the order; 0 for none.
    """
    largest = min(width, limit) if limit else width
    return next(n for n in range(largest, 0, -1) if width % n == 0 and factors(n) is not None)


def matrix(order: int) -> Tensor:
    """A Hadamard matrix: signs ``order order`` in float64, whose rows are orthogonal.

    Raises:
        ValueError: no construction reaches this order.
    """
    parts = factors(order)
    if parts is None:
        raise ValueError(f"no Hadamard matrix of order {order} can be built; see largest_factor")
    whole = np.ones((1, 1))
    for part in parts:
        whole = np.kron(whole, _signs(part))
    return torch.from_numpy(whole)


def apply(x: Tensor, order: int, *, transposed: bool = False) -> Tensor:
    """``x (I ⊗ H)`` (or ``Hᵀ``) on the last dimension, ``… n``, with ``H`` orthonormal of ``order``.

    The Kronecker factors act one after the other, so the cost is ``n`` times the sum of the factors.

    Raises:
        ValueError: no construction reaches ``order``, or it does not divide ``n``.
    """
    parts = factors(order)
    if parts is None or x.shape[-1] % order:
        raise ValueError(f"order {order} does not apply to {x.shape[-1]} columns")
    shape, inner = x.shape, order
    for part in parts:
        inner //= part
        signs = torch.from_numpy(_signs(part)).to(x.device, x.dtype)
        signs = (signs if transposed else signs.T) / part**0.5
        x = torch.matmul(signs, x.reshape(-1, part, inner)).reshape(shape)
    return x


@cache
def _signs(order: int) -> np.ndarray:
    if order & (order - 1) == 0:
        whole = np.ones((1, 1))
        while len(whole) < order:
            whole = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), whole)
        return whole
    if order in CIRCULANTS:
        return _goethals_seidel(CIRCULANTS[order])
    if _prime_power(order - 1):
        return _paley_one(order - 1)
    return _paley_two(order // 2 - 1)


@cache
def _direct(order: int) -> bool:
    if order & (order - 1) == 0:
        return 1 < order <= _LARGEST_POWER_OF_TWO
    if order % 4 or order > _LARGEST:
        return False
    half = order // 2 - 1
    return order in CIRCULANTS or _prime_power(order - 1) > 0 or (half % 4 == 1 and _prime_power(half) > 0)


def _prime_power(q: int) -> int:
    """The prime that ``q`` is the first, second or third power of, or 0."""
    for p in range(2, q + 1):
        if p * p > q:
            return q if q > 1 else 0
        if q % p == 0:
            return p if q in (p, p**2, p**3) else 0
    return 0


def _character(q: int) -> np.ndarray:
    """χ(a - b) for all a, b of the field of ``q`` elements: 0, 1 for a square, -1 otherwise."""
    p = _prime_power(q)
    degree = next(k for k in (1, 2, 3) if p**k == q)
    elements = np.array(list(product(range(p), repeat=degree)))  # lowest coefficient first
    reduction = _irreducible(p, degree)
    squares = np.zeros((q, 2 * degree - 1), np.int64)
    for i, j in product(range(degree), repeat=2):
        squares[:, i + j] += elements[:, i] * elements[:, j]
    for top in range(2 * degree - 2, degree - 1, -1):
        squares[:, top - degree : top] += squares[:, top : top + 1] * reduction
    places = p ** np.arange(degree)
    chi = np.full(q, -1.0)
    chi[squares[:, :degree] % p @ places] = 1.0
    chi[0] = 0.0
    differences = (elements[:, None, :] - elements[None, :, :]) % p @ places
    return chi[differences]


def _irreducible(p: int, degree: int) -> np.ndarray:
    """``x**degree`` modulo a monic polynomial that has no root; up to degree 3 it is then irreducible."""
    values = np.arange(p)
    for low in product(range(p), repeat=degree):
        remainder = sum(c * values**i for i, c in enumerate(low))
        if degree == 1 or ((values**degree - remainder) % p).all():
            return np.array(low)
    raise ValueError(f"no irreducible polynomial of degree {degree} over {p}")


def _paley_one(q: int) -> np.ndarray:
    skew = np.ones((q + 1, q + 1))
    skew[1:, 0] = -1.0
    skew[1:, 1:] = _character(q)
    skew[0, 0] = 0.0
    return skew + np.eye(q + 1)


def _paley_two(q: int) -> np.ndarray:
    conference = np.ones((q + 1, q + 1))
    conference[0, 0] = 0.0
    conference[1:, 1:] = _character(q)
    on, diagonal = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(conference, on) + np.kron(np.eye(q + 1), diagonal)


def _goethals_seidel(rows: tuple[str, str, str, str]) -> np.ndarray:
    """[A BR CR DR; -BR A DᵀR -CᵀR; -CR -DᵀR A BᵀR; -DR CᵀR -BᵀR A] with R the reversal."""
    n = len(rows[0])
    index = (np.arange(n)[None, :] - np.arange(n)[:, None]) % n
    a, b, c, d = (np.array([1.0 if sign == "+" else -1.0 for sign in row])[index] for row in rows)
    r = np.eye(n)[::-1]
    blocks = [
        [a, b @ r, c @ r, d @ r],
        [-b @ r, a, d.T @ r, -c.T @ r],
        [-c @ r, -d.T @ r, a, b.T @ r],
        [-d @ r, c.T @ r, -b.T @ r, a],
    ]
    return np.block(blocks)
