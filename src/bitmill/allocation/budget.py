"""The type of each tensor by measured damage: the least predicted KL divergence that a budget in bytes buys.

Choosing one type a tensor under a limit is a multiple-choice knapsack. Each tensor's choices are cut down to
the lower convex hull of damage over bytes, and its edges are bought in order of gain a byte (Shoham & Gersho
1988; Dantzig 1957 for the bound): wherever everything up to an edge is bought, no other choice of these types
in as few bytes is predicted to be better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from bitmill.core.axes import Allocation, Choice, Weight


@dataclass(frozen=True)
class Offer:
    """A type that a tensor could have.

    Attributes:
        kind: the grid's text.
        bytes_: what the tensor then takes.
        damage: what it is predicted to cost, nats.
    """

    kind: str
    bytes_: int
    damage: float


@final
@dataclass(frozen=True)
class Budget(Allocation):
    """A type for each tensor that was measured; the others stay dense.

    Attributes:
        types: pairs of a tensor's name, as the model has it, and its offer; see :func:`spend`.
    """

    types: tuple[tuple[str, Offer], ...] = ()

    def choose(self, weight: Weight) -> Choice | None:
        """What was bought for the tensor of this name."""
        offer = dict(self.types).get(weight.name)
        return None if offer is None else Choice(offer.kind, f"budget: {offer.damage:.2g} nats")

    @property
    def bytes_(self) -> int:
        """Of all tensors together."""
        return sum(offer.bytes_ for _, offer in self.types)

    @property
    def damage(self) -> float:
        """Predicted KL divergence, nats a token: damages of small errors add up."""
        return sum(offer.damage for _, offer in self.types)


def spend(offers: Mapping[str, Sequence[Offer]], limit: int) -> Budget | None:
    """The best that at most ``limit`` bytes buy; None if they do not buy every tensor's smallest offer.

    More bytes never buy a worse prediction. Edges are met in one order, by gain a byte. Let a larger limit be
    the first to afford one that a smaller limit cannot: all that the smaller can still buy has less gain a
    byte and costs less than that edge, so the edge alone outweighs it. An edge that is too dear ends its own
    tensor's and the next ones are tried.
    """
    hulls = {name: hull(of) for name, of in offers.items()}
    taken = dict.fromkeys(hulls, 0)
    left = limit - sum(edges[0].bytes_ for edges in hulls.values())
    if left < 0:
        return None
    edges = [(_rate(a, b), name, i) for name, h in hulls.items() for i, (a, b) in enumerate(pairwise(h))]
    for _, name, at in sorted(edges, key=lambda e: (-e[0], e[1], e[2])):
        price = hulls[name][at + 1].bytes_ - hulls[name][at].bytes_
        if taken[name] == at and price <= left:
            taken[name], left = at + 1, left - price
    return Budget(tuple((name, hulls[name][at]) for name, at in taken.items()))


def hull(offers: Sequence[Offer]) -> tuple[Offer, ...]:
    """The offers that some price of a byte would choose, smallest first: more bytes, less damage, and ever
    less gain a byte."""
    found: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.bytes_, o.damage, o.kind)):
        if found and offer.damage >= found[-1].damage:
            continue
        while len(found) > 1 and _rate(found[-1], offer) >= _rate(found[-2], found[-1]):
            found.pop()
        found.append(offer)
    return tuple(found)


def _rate(a: Offer, b: Offer) -> float:
    """Nats saved a byte from ``a`` to the larger ``b``."""
    return (a.damage - b.damage) / (b.bytes_ - a.bytes_)
